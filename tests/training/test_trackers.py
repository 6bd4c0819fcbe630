"""Trackers through Accelerate: what they receive, and what happens without their package."""

from dataclasses import dataclass

import pytest
from accelerate import tracking

from contracts.errors import InputError
from training.run_folder import RunFolder


@dataclass
class Settings:
    lr: float = 0.5
    hidden: tuple[int, ...] = (4, 2)
    report_to: str = "wandb"


class FakeTracker(tracking.GeneralTracker):
    """Stands for wandb under its name; keeps what it is given."""

    name = "wandb"
    requires_logging_directory = False
    opened = []

    def __init__(self, run_name, **options):
        super().__init__()
        self.project = run_name
        self.options = options
        self.events = []

    @property
    def tracker(self):
        return self

    def start(self):
        FakeTracker.opened.append(self)

    def store_init_configuration(self, values):
        self.events.append(("settings", values))

    def log(self, values, step=None, **_):
        self.events.append((step, values))

    def finish(self):
        self.events.append("finish")


@pytest.fixture
def wandb(monkeypatch):
    """The fake tracker, registered with Accelerate as if wandb were installed."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    monkeypatch.setattr(FakeTracker, "opened", [])
    return FakeTracker


def start(folder, report_to):
    return RunFolder.start(folder, Settings(report_to=report_to), inputs=[], report_to=report_to)


def test_a_tracker_receives_settings_and_metrics_of_the_run(tmp_path, wandb):
    run = start(tmp_path / "run", "wandb")
    run.log(3, loss=1.5)
    run.log(4, loss=1.25, epoch=1)
    run.finish()
    (tracker,) = wandb.opened
    assert (tracker.project, tracker.options) == ("product-price", {"name": "run"})
    assert tracker.events == [
        ("settings", {"lr": 0.5, "hidden": "[4, 2]", "report_to": "wandb"}),
        (3, {"loss": 1.5}),
        (4, {"loss": 1.25, "epoch": 1}),
        "finish",
    ]
    assert run.metrics() == [{"step": 3, "loss": 1.5}, {"step": 4, "loss": 1.25, "epoch": 1}]


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(tmp_path / "run", "tensorboard")
    run.log(3, loss=1.5)
    run.finish()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.5)]


@pytest.mark.parametrize("report_to", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_and_the_old_run_stays(tmp_path, monkeypatch, report_to):
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    old = RunFolder.start(tmp_path / "run", Settings(), inputs=[])
    old.log(1, loss=1.0)
    old.finish()
    with pytest.raises(InputError, match=f"^--report-to {report_to}: .* pip install {report_to}$"):
        start(tmp_path / "run", report_to)
    assert old.complete
    assert old.metrics() == [{"step": 1, "loss": 1.0}]


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, wandb, monkeypatch):
    def refuse(self):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(wandb, "start", refuse)
    with pytest.raises(InputError, match=r"^--report-to wandb: it does not start \(no API key configured\)$"):
        start(tmp_path / "run", "wandb")


def test_the_stages_report_through_it(sample_workspace, tmp_path, wandb):
    """An out-of-fold run reports each of its models, and nothing for the folder around them."""
    import shutil

    from qwen3_finetune import train

    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    quick = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--batch-size",
        "128",
        "--max-length",
        "16",
    ]
    train.main([*quick, "--folds", "2", "--run", "oof", "--workspace", str(tmp_path), "--report-to", "wandb"])
    assert [tracker.options["name"] for tracker in wandb.opened] == ["oof/fold_0", "oof/fold_1", "oof/all"]
    for tracker in wandb.opened:
        settings, epoch, end = tracker.events
        assert settings[1]["model"] == "tiny"
        assert {"train/loss", "stop/smape"} <= epoch[1].keys()
        assert end == "finish"


def test_a_stage_refuses_a_missing_package_before_it_reads_anything(tmp_path, monkeypatch):
    from clip_finetune import train

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(InputError, match="--report-to mlflow: the package is not installed"):
        train.main(["--preset", "tiny", "--workspace", str(tmp_path / "absent"), "--report-to", "mlflow"])
