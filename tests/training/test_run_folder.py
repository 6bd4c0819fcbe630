from dataclasses import dataclass, replace

import pytest
import torch

from contracts.errors import InputError
from contracts.files import atomic_write, read_json
from training.run_folder import RunFolder
from training.settings import parse_settings


@dataclass
class Settings:
    preset: str = "base"
    lr: float = 1e-3
    epochs: int = 3
    hidden: tuple[int, ...] = (4, 2)
    resume: bool = False
    seed: int = 0


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_precedence_flags_over_file_over_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 5\nlr: 0.5\n")
    presets = {"base": {}, "tiny": {"epochs": 9, "hidden": (1,)}}
    argv = ["--preset", "tiny", "--config", str(tmp_path / "c.yaml"), "--lr", "0.25"]
    settings = parse_settings(Settings, argv, description="", presets=presets)
    assert settings == Settings("tiny", 0.25, 5, (1,))
    assert parse_settings(Settings, ["--resume"], description="").resume is True


@pytest.mark.parametrize("argv", [["--preset", "huge"], ["--epochs", "many"], ["--epohcs", "3"]])
def test_wrong_settings_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_settings(Settings, argv, description="", presets={"base": {}, "tiny": {}})
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def start(tmp_path, settings, **options):
    data = tmp_path / "input.csv"
    if not data.exists():
        data.write_text("a")
    return RunFolder.start(tmp_path / "run", settings, inputs=[data], **options)


def test_checkpoint_round_trip_skips_an_incomplete_one(tmp_path):
    run = start(tmp_path, Settings())
    for step in (1, 2, 3):
        run.log(step, loss=1.0 / step)
        run.save_checkpoint(step, {"w": torch.full((2,), float(step))}, {"step": step})
    assert sorted(folder.name for folder in run.path.glob("step_*")) == ["step_00000002", "step_00000003"]
    (run.path / "step_00000003" / "COMPLETE").unlink()  # killed while saving
    resumed = start(tmp_path, Settings(resume=True, epochs=50), resume=True)
    weights, state = resumed.newest_checkpoint()
    assert state["step"] == 2
    assert weights["w"].tolist() == [2, 2]
    assert [line["step"] for line in resumed.metrics()] == [1, 2]


def test_resume_refuses_another_setting_or_input(tmp_path):
    start(tmp_path, Settings())
    with pytest.raises(InputError, match="lr was 0.001"):
        start(tmp_path, Settings(lr=0.5), resume=True)
    (tmp_path / "input.csv").write_text("b")
    with pytest.raises(InputError, match="input.csv has changed"):
        start(tmp_path, Settings(), resume=True)


def test_finished_run(tmp_path):
    run = start(tmp_path, Settings())
    with pytest.raises(InputError, match="python -m stage.train"):
        RunFolder.finished(run.path, "stage")
    run.save_checkpoint(1, {"w": torch.zeros(1)}, {})
    run.finish(smape=50.0)
    assert RunFolder.finished(run.path, "stage").settings(Settings) == Settings()
    assert read_json(run.path / "summary.json") == {"smape": 50.0}
    assert not list(run.path.glob("step_*"))
    manifest = read_json(run.path / "manifest.json")
    assert manifest["seed"] == 0
    assert len(next(iter(manifest["inputs"].values()))) == 64


def test_starting_again_replaces_the_old_run(tmp_path):
    run = start(tmp_path, Settings())
    run.log(1, loss=1.0)
    run.finish()
    again = start(tmp_path, replace(Settings(), lr=1.0))
    assert not again.complete
    assert again.metrics() == []


def test_nan_loss_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="loss is NaN at step 7"):
        start(tmp_path, Settings()).log(7, loss=float("nan"))
