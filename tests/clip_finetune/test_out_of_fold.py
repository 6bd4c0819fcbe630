"""Out-of-fold runs: which model sees which row, one space for all, and what later stages may score with them."""

import shutil

import numpy as np
import pytest

from clip_finetune import extract_embeddings, train
from clip_finetune.encoder import Encoder
from clip_finetune.out_of_fold import OutOfFoldEncoder
from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from contracts.files import read_json
from contracts.predictions import read_predictions
from contracts.splits import N_FOLDS, fitted_out_of_fold, leaked_folds, roles
from contracts.workspace import CLIP_IMAGE, Workspace
from training.run_folder import RunFolder

QUICK = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--folds", "2", "--run", "oof"]
ALL_FOLDS = tuple(range(N_FOLDS))


@pytest.fixture(scope="module")
def finished(sample_workspace, tmp_path_factory) -> Workspace:
    """A run of two hold-outs, and its embeddings of train and test; read only."""
    root = tmp_path_factory.mktemp("clip_out_of_fold")
    shutil.copytree(sample_workspace / "data", root / "data")
    train.main([*QUICK, "--workspace", str(root)])
    for table in ("train", "test"):
        command = [table, "--run", "oof", "--workspace", str(root), "--device", "cpu"]
        extract_embeddings.main([*command, "--shard-rows", "150"])
    return Workspace(root)


def embeddings(workspace: Workspace, table: str):
    return read_embeddings(workspace.path("embeddings", name=CLIP_IMAGE, split=table))


def part(workspace: Workspace, name: str) -> Encoder:
    return Encoder.open(workspace.path("run", name=f"oof/{name}"), device="cpu")


def test_each_model_is_fitted_without_the_rows_of_its_holdout(finished):
    for holdout in (0, 1):
        encoder = part(finished, f"fold_{holdout}")
        assert encoder.meta["fitted_on"] == [list(roles(holdout, 2).fitted_on)] * N_FOLDS
        assert not set(roles(holdout, 2).validate) & set(encoder.meta["fitted_on"][0])
    assert part(finished, "all").meta["fitted_on"] == [list(ALL_FOLDS)] * N_FOLDS
    counts = [
        read_json(finished.path("run", name=f"oof/fold_{k}") / "summary.json")["pictures"] for k in (0, 1)
    ]
    assert counts[0]["fit"] + counts[0]["stop"] == counts[1]["validate"]


def test_the_embedding_of_train_may_be_scored_on_any_fold(finished):
    content = embeddings(finished, "train")
    assert content.meta["fitted_on"] == fitted_out_of_fold(2)
    assert leaked_folds(content.meta["fitted_on"], ALL_FOLDS) == []
    assert content.meta["checkpoint"] == embeddings(finished, "test").meta["checkpoint"]
    assert content.meta["run"] == "oof"
    predictions = read_predictions(finished, "oof", "train")
    assert predictions.unseen.all()
    assert len(predictions.price) == content.valid.sum()


def test_a_training_row_is_embedded_and_priced_by_the_model_that_has_not_seen_it(finished):
    table = finished.training_table()
    images = finished.images_folder()
    content = embeddings(finished, "train")
    log_price = dict(zip(*_ids_and_log_price(finished), strict=True))
    whole = part(finished, "all").encode(table, images).embeddings
    for holdout in (0, 1):
        rows = np.flatnonzero(content.valid & table["fold"].isin(roles(holdout, 2).validate).to_numpy())
        own = part(finished, f"fold_{holdout}")
        alone = own.encode(table, images).embeddings[rows]
        stored = content.embeddings[rows]
        # a rotation of what the own model says: all cosines are those of that model, and of no other
        np.testing.assert_allclose(stored @ stored.T, alone @ alone.T, atol=1e-5)
        assert np.abs(stored @ stored.T - whole[rows] @ whole[rows].T).max() > 1e-3
        priced = [log_price[sample_id] for sample_id in content.sample_ids[rows]]
        np.testing.assert_allclose(priced, own.log_price(alone), atol=1e-4)


def _ids_and_log_price(workspace):
    predictions = read_predictions(workspace, "oof", "train")
    return predictions.sample_ids.tolist(), predictions.log_price.tolist()


def test_the_spaces_are_brought_together(finished):
    """Seen from the model of all rows, the stored embeddings lie nearer than those of the models of the hold-outs."""
    table = finished.training_table()
    images = finished.images_folder()
    content = embeddings(finished, "train")
    whole = part(finished, "all").encode(table, images).embeddings
    unaligned = np.zeros_like(whole)
    for holdout in (0, 1):
        rows = table["fold"].isin(roles(holdout, 2).validate).to_numpy()
        unaligned[rows] = part(finished, f"fold_{holdout}").encode(table[rows], images).embeddings
    valid = content.valid
    distance = np.linalg.norm(content.embeddings[valid] - whole[valid])
    assert distance < 0.9 * np.linalg.norm(unaligned[valid] - whole[valid])
    np.testing.assert_allclose(np.linalg.norm(content.embeddings[valid], axis=1), 1, atol=1e-5)


def test_any_other_table_is_embedded_by_the_model_of_all_rows(finished):
    content = embeddings(finished, "test")
    images = finished.images_folder()
    of_all = part(finished, "all").encode(finished.prepared("test"), images)
    np.testing.assert_allclose(content.embeddings, of_all.embeddings, atol=1e-5)
    opened = Encoder.open(finished.path("run", name="oof"), device="cpu")
    np.testing.assert_allclose(
        opened.encode(finished.prepared("test"), images).embeddings, content.embeddings, atol=1e-5
    )
    assert opened.meta.items() <= content.meta.items()
    # this one model has seen every training row, and says so
    assert opened.meta["fitted_on"] == [list(ALL_FOLDS)] * N_FOLDS


def test_a_batch_may_mix_rows_of_all_holdouts(finished):
    """Batches of three and of fifty rows give the same."""
    table = finished.training_table()
    content = embeddings(finished, "train")
    encoder = OutOfFoldEncoder(
        finished.path("run", name="oof"), table, finished.images_folder(), device="cpu", batch_size=3
    )
    rows = encoder.rows()
    usable = np.flatnonzero(content.valid)[:9]
    batch, _ = rows.collate([rows[row] for row in usable])
    assert len(batch[1].unique()) == 2
    np.testing.assert_allclose(encoder.encode_batch(batch), content.embeddings[usable], atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_next_model(finished, tmp_path, capsys, killed_at):
    shutil.copytree(finished.root / "data", tmp_path / "data")
    command = [*QUICK, "--workspace", str(tmp_path)]
    with killed_at(RunFolder, "finish", 2):  # of fold_1, when only fold_0 is complete
        train.main(command)
    with pytest.raises(InputError, match="no finished run"):
        extract_embeddings.main(["train", "--run", "oof", "--workspace", str(tmp_path), "--device", "cpu"])
    capsys.readouterr()
    train.main([*command, "--resume"])
    assert capsys.readouterr().out.count("this run is complete") == 1
    for name in ("fold_0", "fold_1", "all"):
        weights = f"checkpoints/oof/{name}/open_clip_model.safetensors"
        assert (tmp_path / weights).read_bytes() == (finished.root / weights).read_bytes()

    train.main([*command, "--resume"])
    assert capsys.readouterr().out.count("this run is complete") == 1
    with pytest.raises(InputError, match="--resume: folds was 2 when oof started and is 5 now"):
        train.main([*command, "--resume", "--folds", "5"])


def test_a_catalogue_without_pictures_has_neither_embeddings_nor_prices(finished, tmp_path):
    shutil.copytree(finished.root / "data", tmp_path / "data")
    table = Workspace(tmp_path).prepared("train").assign(image="")
    table.to_csv(Workspace(tmp_path).path("prepared", split="train"), index=False)
    train.main([*QUICK, "--workspace", str(tmp_path)])
    extract_embeddings.main(["train", "--run", "oof", "--workspace", str(tmp_path), "--device", "cpu"])
    assert not embeddings(Workspace(tmp_path), "train").valid.any()
    assert not Workspace(tmp_path).path("predictions", name="oof", split="train").exists()


def test_folds_that_do_not_divide_ten_are_refused(tmp_path):
    with pytest.raises(InputError, match="2, 5 or 10"):
        train.main(["--folds", "3", "--workspace", str(tmp_path)])
