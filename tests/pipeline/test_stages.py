"""Which stages make up a preset: what each reads was written before, and no score can be dishonest."""

from pathlib import Path

import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.tables import table_writer
from pipeline.stage_settings import resolved_settings
from pipeline.stages import PICTURES, PipelineSettings, Stage, pipeline_stages

PRESETS = ("tiny", "base", "best", "cpu")
TRAINED = ["clip_finetune.train", "qwen3_finetune.train", "fusion.all_embeddings.train"]


def plan_of(source: Path, preset: str = "tiny", **settings) -> list[Stage]:
    return pipeline_stages(PipelineSettings(data=source, preset=preset, **settings))


@pytest.fixture
def tables(tmp_path):
    table = pd.DataFrame({"sample_id": ["1"], "catalog_content": ["Tea"], "image_link": [""], "price": ["2"]})
    for name in ("train.parquet", "test.csv.gz"):
        with table_writer(tmp_path / name) as writer:
            writer.write(table)
    return tmp_path


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("columns", [(), ("id=sku", "text=title")], ids=["pictures", "no pictures"])
def test_every_stage_reads_what_an_earlier_one_wrote(tables, preset, columns):
    written = {
        str(tables / "train.parquet"),
        str(tables / "test.csv.gz"),
        PICTURES + "train",
        PICTURES + "test",
    }
    for stage in plan_of(tables, preset, columns=columns):
        assert stage.reads and stage.writes
        assert _covered(stage.reads) <= _covered(written), f"{stage.name} reads what nothing writes"
        written.update(stage.writes)
    assert {"test_out.csv", "test_intervals.csv"} <= written


def _covered(patterns):
    """The patterns, less what only a very large catalogue has."""
    return {pattern for pattern in patterns if not pattern.endswith(".shards/*")}


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_test_table_a_preset_ends_with_saved_models(tables, preset):
    (tables / "test.csv.gz").unlink()
    stages = plan_of(tables, preset)
    assert not any("test" in stage.arguments for stage in stages)
    assert stages[-1].module == "ensemble.train"
    assert not any("test" in file for file in stages[-1].writes)


def test_a_catalogue_without_pictures_needs_no_picture_encoder(tables):
    settings = {"columns": ("id=sku", "text=title"), "features": ("brand",)}
    by_module = {stage.module: stage.arguments for stage in plan_of(tables, "base", **settings)}
    assert "clip_finetune.train" not in by_module
    assert by_module["siglip_extract.extract_embeddings"][-2:] == ("--tower", "text")
    use = by_module["fusion.all_embeddings.train"]
    assert use[use.index("--use") + 1 :] == ("siglip_text", "qwen_text", "tabular")


def test_best_trains_encoders_and_fusion_out_of_fold_and_base_fits_fusion_on_all_rows(tables):
    for stage in plan_of(tables, "best"):
        if stage.module in TRAINED:
            assert "--folds 5" in stage.name
    base = {stage.module: stage.name for stage in plan_of(tables, "base")}
    assert base["fusion.all_embeddings.train"].endswith("--refit")


@pytest.mark.parametrize("preset", ["base", "best"])
def test_word_models_see_no_encoder_that_knows_the_rows(tables, preset):
    """An encoder of a single hold-out was fitted on most rows that it embeds; word models would refuse it."""
    plan = plan_of(tables, preset)
    out_of_fold = "--folds" in next(stage.name for stage in plan if stage.module == "qwen3_finetune.train")
    for stage in plan:
        if stage.module == "word_models.train":
            assert ("qwen_text" in stage.arguments) == out_of_fold


def test_one_file_and_its_columns_reach_the_stage_that_reads_it(tables):
    settings = {"columns": ("id=sku",), "features": ("brand",), "decimal": ",", "currency": "€"}
    arguments = plan_of(tables / "train.parquet", "cpu", **settings)[0].arguments
    assert arguments == (
        "--data", str(tables / "train.parquet"), "--columns", "id=sku", "--features", "brand",
        "--decimal", ",", "--currency", "€",
    )  # fmt: skip


def test_a_download_that_nobody_would_look_at_is_refused(tables):
    with pytest.raises(InputError, match="--download: preset cpu looks at no pictures"):
        plan_of(tables, "cpu", download=True)
    with pytest.raises(InputError, match="--download: --columns names no image"):
        plan_of(tables, "tiny", download=True, columns=("id=sku",))
    assert plan_of(tables, "tiny", download=True)[1].module == "data.download_images"


def test_torchrun_starts_the_stages_that_several_processes_can_share(tables):
    plan = plan_of(tables, "base", processes=2)
    for stage in plan:
        by_torchrun = "--nproc-per-node 2" in " ".join(stage.command(tables))
        assert by_torchrun == (stage.module in TRAINED)
    with pytest.raises(InputError, match="--processes 0: must be at least 1"):
        PipelineSettings(processes=0)


def test_set_reaches_every_command_of_the_stage_that_has_the_setting(tables):
    entries = (
        "fusion.loss=huber", "qwen3_finetune.precision=fp32", "fusion.use=qwen_text,siglip_text",
        "qwen3_finetune.train.gradient-checkpointing=true", "clip_finetune.holdout=null",
    )  # fmt: skip
    settings = {
        stage.name.split(" --")[0]: resolved_settings(stage) for stage in plan_of(tables, set=entries)
    }
    assert settings["fusion.all_embeddings.train"]["loss"] == "huber"
    assert settings["fusion.all_embeddings.train"]["use"] == ["qwen_text", "siglip_text"]
    assert settings["qwen3_finetune.train"]["precision"] == "fp32"
    assert settings["qwen3_finetune.train"]["gradient_checkpointing"] is True
    assert settings["qwen3_finetune.extract_embeddings test"]["precision"] == "fp32"
    assert settings["clip_finetune.train"]["holdout"] is None
    off = plan_of(tables, set=("qwen3_finetune.gradient_checkpointing=false",))
    assert any("--no-gradient-checkpointing" in stage.arguments for stage in off)
