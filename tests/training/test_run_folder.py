import os
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from contracts.errors import InputError
from contracts.files import read_json, write_json
from training.run_folder import RunFolder
from training.weights import read_weights, save_weights, weights_hash


@dataclass
class Settings:
    preset: str = "base"
    lr: float = 1e-3
    epochs: int = 3
    hidden: tuple[int, ...] = (4, 2)
    resume: bool = False
    seed: int = 0


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


def finished_run(tmp_path, value=1.0):
    run = start(tmp_path, Settings())
    run.log(1, loss=1.0)
    run.save_checkpoint(1, {"w": torch.zeros(1)}, {})
    save_weights(run.path / "model.safetensors", {"w": torch.full((2,), value)})
    run.finish()
    return run


def test_training_again_keeps_the_finished_model_beside_the_new_one(tmp_path):
    finished_run(tmp_path, value=1.0)
    again = start(tmp_path, replace(Settings(), lr=1.0))
    assert not again.complete
    assert again.metrics() == []
    with pytest.raises(
        InputError, match=r"no finished run; .* or use the finished run before it, run\.previous"
    ):
        RunFolder.finished(again.path, "stage")
    kept = RunFolder.finished(tmp_path / "run.previous", "stage")
    assert read_weights(kept.path / "model.safetensors")["w"].tolist() == [1, 1]
    # an unfinished run is not worth the place of a finished one
    start(tmp_path, Settings())
    assert read_weights(kept.path / "model.safetensors")["w"].tolist() == [1, 1]
    finished_run(tmp_path, value=2.0)
    start(tmp_path, Settings())
    assert read_weights(kept.path / "model.safetensors")["w"].tolist() == [2, 2]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"\x00\x00"])
def test_a_half_written_line_of_metrics_is_left_out(tmp_path, torn):
    run = start(tmp_path, Settings())
    run.log(1, loss=1.0)
    run.save_checkpoint(1, {"w": torch.zeros(1)}, {})
    run.log(2, loss=0.5)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [line["step"] for line in run.metrics()] == [1, 2]
    resumed = start(tmp_path, Settings(resume=True), resume=True)
    assert resumed.newest_checkpoint() is not None
    resumed.log(2, loss=0.25)
    assert resumed.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.25}]


def test_a_damaged_line_amid_the_metrics_is_named(tmp_path):
    run = start(tmp_path, Settings())
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not JSON"):
        run.metrics()


def test_what_was_logged_before_the_first_checkpoint_is_not_logged_twice(tmp_path):
    run = start(tmp_path, Settings())
    run.log(1, loss=1.0)
    resumed = start(tmp_path, Settings(resume=True), resume=True)
    assert resumed.newest_checkpoint() is None
    assert resumed.metrics() == []


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "old_and_truncated"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name, fault):
    run = start(tmp_path, Settings())
    for step in (1, 2):
        run.save_checkpoint(step, {"w": torch.full((2,), float(step))}, {"step": step})
    damage_file(run.path / "step_00000002" / name, fault)
    weights, state = run.newest_checkpoint()
    assert (state["step"], weights["w"].tolist()) == (1, [1, 1])
    (line,) = capsys.readouterr().out.splitlines()
    assert "step_00000002" in line and line.endswith("; the checkpoint before it is taken")


def damage_file(path, fault):
    content = bytearray(path.read_bytes())
    if fault == "remove":
        path.unlink()
        return
    if fault == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[-3:]
    path.write_bytes(content)
    if fault == "old_and_truncated":  # older versions wrote an empty marker
        (path.parent / "COMPLETE").write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "settings.json", "summary.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_damaged_file_of_a_finished_run_is_named(tmp_path, name, fault):
    run = finished_run(tmp_path)
    damage_file(run.path / name, fault)
    with pytest.raises(InputError, match=rf"^[^\n]*run/{name}: "):
        RunFolder.finished(run.path, "stage")


def test_a_run_of_an_older_version_is_read_with_one_line(tmp_path, capsys):
    run = finished_run(tmp_path)
    (run.path / "COMPLETE").write_bytes(b"")
    capsys.readouterr()
    assert RunFolder.finished(run.path, "stage").complete
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{run.path}: made by an older version, which stored no hashes; it is read unchecked"
    damage_file(run.path / "model.safetensors", "truncate")
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors"):
        read_weights(run.path / "model.safetensors")


def test_checkpoints_that_a_kill_left_behind_are_removed(tmp_path):
    run = finished_run(tmp_path)
    (run.path / "step_00000001").mkdir()
    assert run.already_complete(True)
    assert not list(run.path.glob("step_*"))


@pytest.mark.parametrize(
    ("value", "written"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "-inf")]
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_logged(tmp_path, value, written):
    run = start(tmp_path, Settings())
    run.log(6, loss=1.0)
    with pytest.raises(InputError, match=f"loss is {written} at step 7"):
        run.log(7, loss=value)
    assert run.metrics() == [{"step": 6, "loss": 1.0}]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_of_a_finished_run_has_the_permissions_that_the_umask_gives(
    tmp_path, umask, mode, request
):
    earlier = os.umask(umask)
    request.addfinalizer(lambda: os.umask(earlier))
    run = start(tmp_path, Settings())
    (run.path / "adapter").mkdir()
    save_file(
        {"w": torch.zeros(1)}, run.path / "adapter" / "adapter_model.safetensors"
    )  # mode 0600, as peft leaves it
    save_weights(run.path / "head.safetensors", {"w": torch.zeros(3, 2).T})
    run.finish()
    assert {file.stat().st_mode & 0o777 for file in run.path.rglob("*") if file.is_file()} == {mode}


def test_the_hash_of_the_weights_changes_with_the_weights_alone(tmp_path):
    save_weights(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    before = weights_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no weights")
    assert weights_hash(tmp_path) == before
    save_weights(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert weights_hash(tmp_path) != before


def test_settings_of_an_older_version_are_read_under_their_new_names(tmp_path):
    @dataclass
    class Old:
        clip_norm: float = 2.0
        forgotten: int = 1
        seed: int = 3

    @dataclass
    class New:
        RENAMED: ClassVar[dict[str, str | None]] = {"clip_norm": "max_grad_norm", "forgotten": None}
        max_grad_norm: float = 1.0
        seed: int = 0

    run = start(tmp_path, Old())
    assert run.settings(New) == New(max_grad_norm=2.0, seed=3)
    start(tmp_path, New(max_grad_norm=2.0, seed=3), resume=True)
    with pytest.raises(InputError, match="max_grad_norm was 2.0"):
        start(tmp_path, New(max_grad_norm=5.0, seed=3), resume=True)


def test_settings_of_a_newer_version_are_one_line(tmp_path):
    run = start(tmp_path, Settings())
    stored = read_json(run.path / "settings.json")
    write_json(run.path / "settings.json", {**stored, "flash": True})
    with pytest.raises(InputError, match=r"run: made by another version .*\(flash is not known here\)"):
        run.settings(Settings)


def test_a_complete_run_has_nothing_to_resume(tmp_path, capsys):
    run = start(tmp_path, Settings())
    inputs = [tmp_path / "input.csv"]
    assert not run.already_complete(True, Settings(), inputs)
    run.finish()
    assert not run.already_complete(False, Settings(), inputs)
    assert run.already_complete(True, Settings(resume=True), inputs)
    assert "this run is complete" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"lr": 0.5}, {"epochs": 4}, {"hidden": (4, 3)}, {"seed": 1}])
def test_a_complete_run_of_other_settings_is_never_passed_off_as_this_one(tmp_path, changed):
    """More epochs, too: an interrupted run may be continued with them, a finished one is what it is."""
    run = start(tmp_path, Settings())
    run.finish()
    name = next(iter(changed))
    with pytest.raises(
        InputError, match=f"^--resume: {name} was .* when run started and is .*; leave --resume out"
    ):
        run.already_complete(True, replace(Settings(), **changed), [tmp_path / "input.csv"])
    assert run.complete


def test_a_complete_run_of_other_inputs_is_never_passed_off_as_this_one(tmp_path):
    run = start(tmp_path, Settings())
    run.finish()
    (tmp_path / "input.csv").write_text("b")
    with pytest.raises(InputError, match="^--resume: .*input.csv has changed since run started"):
        run.already_complete(True, Settings(), [tmp_path / "input.csv"])


def test_a_workspace_may_move_between_start_and_resume(tmp_path):
    run = start(tmp_path, Settings())
    run.finish()
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    (tmp_path / "input.csv").rename(tmp_path / "moved.csv")
    assert RunFolder(moved).already_complete(True, Settings(), [tmp_path / "moved.csv"])


def test_one_model_of_an_out_of_fold_run_is_named_with_its_run(tmp_path):
    run = start(tmp_path, Settings())
    assert not run.is_out_of_fold
    part = RunFolder.start(run.path / "all", Settings(), inputs=[])
    assert (run.name, part.name) == ("run", "run/all")
    assert not run.is_out_of_fold  # a model of all rows may lie beside a single one
    RunFolder.start(run.path / "fold_0", Settings(), inputs=[])
    assert run.is_out_of_fold
    assert not part.is_out_of_fold


def test_the_name_of_the_run_before_is_not_trained_into(tmp_path):
    """What lies there would be removed by the next training of the run itself."""
    with pytest.raises(InputError, match=r"ends in \.previous"):
        RunFolder.start(tmp_path / "run.previous", Settings(), inputs=[])
    assert not (tmp_path / "run.previous").exists()
