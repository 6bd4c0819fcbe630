import pytest

from clip_finetune.config import PRESETS, ClipSettings, ExtractSettings
from contracts.errors import InputError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    ClipSettings(preset=preset, **PRESETS[preset])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch_size": 1}, {"grad_accum": 0}, {"lr": 0.0}, {"head_lr": -1.0}, {"warmup": 1.0},
        {"layer_decay": 0.0}, {"price_weight": -1.0}, {"workers": -1}, {"holdout": 5}, {"run": "a/b"}, {"run": ""},
        {"unfreeze_blocks": -1}, {"checkpoint_steps": -1}, {"seed": -1}, {"grad_clip": 0.0},
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
