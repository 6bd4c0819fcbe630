"""The rule by which the pipeline skips a stage: nothing that it depends on has changed."""

import json

import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.tables import table_writer
from pipeline import run
from pipeline.run import run_stages
from pipeline.stages import PipelineSettings, Stage, pipeline_stages


@pytest.fixture
def ran(monkeypatch):
    """The stages that really ran; each writes what it read into every file that it declares."""
    names = []

    def fake(command):
        module, *arguments = command[2:]
        workspace, stage = arguments[-1], PLAN[module]
        names.append(module)
        read = "".join(sorted(run.contents(run.Path(workspace), stage.reads).values()))
        for file in stage.writes:
            path = run.Path(workspace) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{module} {arguments[:-2]} {read}")
        return 0.1, 1, 0

    monkeypatch.setattr(run, "_run", fake)
    return names


PLAN = {
    stage.module: stage
    for stage in (
        Stage("prepare", reads=("source/train.csv", "source/test.csv"), writes=("train", "test")),
        Stage("encode", reads=("train",), writes=("weights",)),
        Stage("embed", reads=("test", "weights"), writes=("embeddings",)),
        Stage("price", reads=("embeddings", "weights"), writes=("out",)),
    )
}


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("train", "test"):
        (tmp_path / "source" / f"{name}.csv").write_text(name)
    return tmp_path


def test_nothing_changed_nothing_runs(workspace, ran):
    run_stages(list(PLAN.values()), workspace)
    assert ran == ["prepare", "encode", "embed", "price"]
    ran.clear()
    run_stages(list(PLAN.values()), workspace, resume=True)
    assert ran == []
    assert len(json.loads((workspace / "pipeline.json").read_text())) == 4


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        # these stages write what they read, so a changed input of `prepare` reaches all
        ("source/train.csv", ["prepare", "encode", "embed", "price"]),
        ("source/test.csv", ["prepare", "encode", "embed", "price"]),
        ("weights", ["encode", "embed", "price"]),
        ("embeddings", ["embed"]),
        ("out", ["price"]),
    ],
)
def test_what_depends_on_a_changed_file_runs_again(workspace, ran, changed, again):
    run_stages(list(PLAN.values()), workspace)
    ran.clear()
    (workspace / changed).write_text("changed")
    run_stages(list(PLAN.values()), workspace, resume=True)
    # a stage that makes the same output again stops the chain
    assert ran == again[: len(ran)] and ran[0] == again[0]
    ran.clear()
    run_stages(list(PLAN.values()), workspace, resume=True)
    assert ran == []


def test_a_missing_output_is_made_again(workspace, ran):
    run_stages(list(PLAN.values()), workspace)
    ran.clear()
    (workspace / "out").unlink()
    run_stages(list(PLAN.values()), workspace, resume=True)
    assert ran == ["price"]


def test_another_setting_is_another_stage(workspace, ran):
    run_stages(list(PLAN.values()), workspace)
    ran.clear()
    plan = [
        *list(PLAN.values())[:3],
        Stage("price", ("--lr", "1"), PLAN["price"].reads, PLAN["price"].writes),
    ]
    run_stages(plan, workspace, resume=True)
    assert ran == ["price"]


def test_a_failing_stage_is_named_and_what_was_done_is_kept(tmp_path, capsys):
    stages = [Stage("contracts.workspace"), Stage("data.prepare", ("--data", str(tmp_path / "absent")))]
    with pytest.raises(InputError, match="stage data.prepare failed .exit code 2.*--resume"):
        run_stages(stages, tmp_path)
    assert [entry["stage"] for entry in json.loads((tmp_path / "pipeline.json").read_text())] == [
        "contracts.workspace"
    ]
    capsys.readouterr()
    with pytest.raises(InputError):
        run_stages(stages, tmp_path, resume=True)
    assert "contracts.workspace: nothing has changed" in capsys.readouterr().out


@pytest.fixture
def tables(tmp_path):
    table = pd.DataFrame({"sample_id": ["1"], "catalog_content": ["Tea"], "image_link": [""], "price": ["2"]})
    for name in ("train.parquet", "test.csv.gz"):
        with table_writer(tmp_path / name) as writer:
            writer.write(table)
    return tmp_path


def test_every_stage_reads_what_an_earlier_one_wrote(tables):
    for preset in ("tiny", "base", "cpu"):
        written = {str(tables / "train.parquet"), str(tables / "test.csv.gz")}
        for stage in pipeline_stages(PipelineSettings(data=tables, preset=preset)):
            assert stage.reads and stage.writes
            assert set(stage.reads) <= written, f"{stage.name} reads {set(stage.reads) - written}"
            written.update(stage.writes)
        assert "test_out.csv" in written


def test_without_a_test_table_the_cpu_preset_ends_with_saved_models(tables):
    (tables / "test.csv.gz").unlink()
    stages = pipeline_stages(PipelineSettings(data=tables, preset="cpu"))
    assert not any("test" in stage.arguments for stage in stages)
    assert stages[-1].writes == ("checkpoints/ensemble/model.json",)
    with pytest.raises(InputError, match="preset tiny needs a table test"):
        pipeline_stages(PipelineSettings(data=tables, preset="tiny"))
    one_file = pipeline_stages(
        PipelineSettings(data=tables / "train.parquet", preset="cpu", columns=("id=sku",))
    )
    assert one_file[0].arguments == ("--data", str(tables / "train.parquet"), "--columns", "id=sku")


def test_settings_reach_the_stage_that_reads_the_table(tables):
    settings = PipelineSettings(data=tables, preset="cpu", features=("brand",), decimal=",", currency="€")
    arguments = pipeline_stages(settings)[0].arguments
    assert arguments == ("--data", str(tables), "--features", "brand", "--decimal", ",", "--currency", "€")


def test_a_download_that_nobody_would_look_at_is_refused(tables):
    with pytest.raises(InputError, match="--download: preset cpu looks at no pictures"):
        pipeline_stages(PipelineSettings(data=tables, preset="cpu", download=True))
