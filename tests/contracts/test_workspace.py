import shutil

import pytest

from contracts.errors import InputError
from contracts.workspace import ARTEFACTS, Workspace, table


def test_training_table_has_a_fold_for_every_row(sample_workspace):
    workspace = Workspace(sample_workspace)
    rows = workspace.training_table()
    folds = workspace.folds()
    assert rows["fold"].tolist() == [folds[sample_id] for sample_id in rows["sample_id"]]
    assert set(rows["fold"]) == set(range(10))


def test_a_row_without_a_fold_is_named(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace, tmp_path / "w")
    folds = tmp_path / "w" / "data" / "folds.csv"
    header, first, *rest = folds.read_text().splitlines()
    folds.write_text("\n".join([header, *rest]) + "\n")
    with pytest.raises(InputError, match=f"no fold for sample_id {first.split(',')[0]} .1 rows"):
        Workspace(tmp_path / "w").training_table()


def test_a_row_with_two_folds_is_named(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace, tmp_path / "w")
    folds = tmp_path / "w" / "data" / "folds.csv"
    repeated = folds.read_text().splitlines()[1]
    folds.write_text(folds.read_text() + repeated + "\n")
    with pytest.raises(InputError, match=f"{repeated.split(',')[0]} has two folds"):
        Workspace(tmp_path / "w").folds()


def test_every_artefact_stands_in_the_printed_table():
    printed = table()
    assert all(f"`{artefact.path}`" in printed for artefact in ARTEFACTS.values())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../data", "a/../..", "/tmp/x", "a//b", "a b", "a/", ".hidden", "a\n"]
)
def test_a_name_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(InputError, match="use letters, digits"):
        Workspace(tmp_path).path("run", name=name)


def test_names_may_have_parts(tmp_path):
    assert (
        Workspace(tmp_path).path("run", name="minilm/fold_0")
        == tmp_path / "checkpoints" / "minilm" / "fold_0"
    )
