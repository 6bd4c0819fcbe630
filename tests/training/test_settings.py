import time
from dataclasses import dataclass
from typing import Literal

import pytest

from training.settings import parse_settings

PRESETS = {"base": {}, "tiny": {"epochs": 9, "hidden": (1,)}}


@dataclass
class Settings:
    preset: Literal["base", "tiny"] = "base"
    lr: float = 1e-3
    epochs: int = 3
    hidden: tuple[int, ...] = (4, 2)
    resume: bool = False


def parse(*argv):
    return parse_settings(Settings, list(argv), description="", presets=PRESETS)


def test_precedence_flags_over_file_over_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 5\nlr: 0.5\n")
    settings = parse("--preset", "tiny", "--config", str(tmp_path / "c.yaml"), "--lr", "0.25")
    assert settings == Settings("tiny", 0.25, 5, (1,))
    assert parse("--resume").resume is True


def test_a_preset_named_in_the_file_is_applied_whole(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: tiny\nlr: 0.5\n")
    assert parse("--config", str(tmp_path / "c.yaml")) == Settings("tiny", 0.5, 9, (1,))
    assert parse("--config", str(tmp_path / "c.yaml"), "--epochs", "2") == Settings("tiny", 0.5, 2, (1,))


def test_a_flag_overrides_the_preset_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: tiny\n")
    assert parse("--config", str(tmp_path / "c.yaml"), "--preset", "base") == Settings()


@pytest.mark.parametrize("argv", [["--preset", "huge"], ["--epochs", "many"], ["--epohcs", "3"]])
def test_wrong_settings_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_wrong_preset_in_the_file_exits_with_2(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("preset: huge\n")
    with pytest.raises(SystemExit) as caught:
        parse("--config", str(tmp_path / "c.yaml"))
    assert caught.value.code == 2
    assert "huge" in capsys.readouterr().err


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{earlier}'] * 9)}]\n"
    for earlier, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "aliases"),
        ("epochs: 5\n" + "#" * 200_000, "too many for settings"),
        ("epochs: [5", "not readable as yaml"),
        (b"\xff\xfe\x00", "not readable as yaml"),
        ("[" * 5000, "deep nesting"),
    ],
)
@pytest.mark.parametrize("form", [["--config"], ["--config="]])
def test_a_file_of_settings_that_is_none_is_one_line(tmp_path, capsys, content, message, form):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [*form, str(path)] if len(form[0]) == 8 else [form[0] + str(path)]
    started = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and message in line
    assert time.monotonic() - started < 5
