from dataclasses import asdict

import pytest

from clip_finetune.config import PRESETS, ClipSettings, ExtractSettings
from contracts.errors import InputError
from contracts.files import write_json
from training.run_folder import RunFolder


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    ClipSettings(preset=preset, **PRESETS[preset])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch_size": 1}, {"gradient_accumulation_steps": 0}, {"lr": 0.0}, {"head_lr": -1.0},
        {"warmup_ratio": 1.0}, {"layer_decay": 0.0}, {"price_weight": -1.0}, {"workers": -1}, {"holdout": 5},
        {"run": "a/b"}, {"run": ""}, {"unfreeze_blocks": -1}, {"checkpoint_steps": -1}, {"seed": -1},
        {"max_grad_norm": 0.0},
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(wrong):
    flag = "--" + next(iter(wrong)).replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} "):
        ClipSettings(**wrong)


def test_extraction_settings():
    with pytest.raises(InputError, match="--shard-rows 0"):
        ExtractSettings(shard_rows=0)
    with pytest.raises(InputError, match="--batch-size 0"):
        ExtractSettings(batch_size=0)


def test_runs_of_an_older_version_can_be_read(tmp_path):
    """Their settings.json has other names for some settings."""
    new = ClipSettings(
        gradient_accumulation_steps=7, gradient_checkpointing=False, max_grad_norm=0.3, warmup_ratio=0.25
    )
    old_names = {
        "gradient_accumulation_steps": "grad_accum", "gradient_checkpointing": "grad_checkpointing",
        "max_grad_norm": "grad_clip", "warmup_ratio": "warmup",
    }  # fmt: skip
    stored = {old_names.get(name, name): value for name, value in asdict(new).items()}
    write_json(tmp_path / "settings.json", stored | {"workspace": str(new.workspace)})
    assert RunFolder(tmp_path).settings(ClipSettings) == new
