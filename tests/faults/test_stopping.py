"""SIGTERM in the middle of a step, and numbers that become NaN late."""

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from tests.faults.conftest import assert_same_weights, in_child, kill_at


def owner_of(trainer):
    module, owner, name = trainer.step
    module = importlib.import_module(module)
    return (getattr(module, owner) if owner else module), name


def at_step(trainer, number, what):
    """Call what() in step `number`; in a process of its own."""
    owner, name = owner_of(trainer)
    step = getattr(owner, name)
    calls = 0

    def counted(*positional, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            what(*positional)
        return step(*positional, **named)

    setattr(owner, name, counted)


def test_sigterm_saves_the_current_step_and_ends_with_143(trainer, new_workspace, tmp_path):
    whole, stopped = new_workspace("whole"), new_workspace("stopped")
    log = tmp_path / "log"
    assert in_child(lambda: trainer.main(whole), output=log) == 0, log.read_text()
    number = 1 if trainer.name == "fusion" else 3

    def terminated():
        at_step(trainer, number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        trainer.main(stopped)

    assert in_child(terminated, output=log) == 143, log.read_text()
    assert "stopped by SIGTERM; a checkpoint was saved, --resume continues from it\n" in log.read_text()
    (newest,) = list(trainer.folder(stopped).glob("step_*"))
    assert int(newest.name.removeprefix("step_")) == number
    assert in_child(lambda: trainer.main(stopped, "--resume"), output=log) == 0, log.read_text()
    assert_same_weights(trainer.weights(stopped), trainer.weights(whole))


def test_nan_in_a_late_epoch_leaves_the_best_epoch(trainer, new_workspace, tmp_path):
    whole, diverged = new_workspace("whole"), new_workspace("diverged")
    log = tmp_path / "log"

    def poison(*positional):
        model = positional[0].module if trainer.name == "fusion" else positional[0].model
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    assert in_child(lambda: trainer.main(whole), output=log) == 0, log.read_text()
    metrics = [
        json.loads(line) for line in (trainer.folder(whole) / "metrics.jsonl").read_text().splitlines()
    ]
    last = 2 if trainer.name == "fusion" else max(line["step"] for line in metrics)

    def nan():
        at_step(trainer, last, poison)
        trainer.main(diverged)

    log.unlink()
    assert in_child(nan, output=log) == 0, log.read_text()
    assert "training ends here, and the weights of epoch 1 are kept" in log.read_text()
    weights = trainer.weights(diverged)
    assert weights and all(
        torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point()
    )
    assert (trainer.folder(diverged) / "COMPLETE").is_file()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM])
def test_a_second_sigterm_ends_at_once(signal_number):
    from training.stopping import stop_on_sigterm

    def twice():
        with stop_on_sigterm(torch.device("cpu")) as stop:
            os.kill(os.getpid(), signal_number)
            assert stop()
            os.kill(os.getpid(), signal_number)
            os._exit(5)

    assert in_child(twice) == -signal_number


STAGE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
time.sleep(60)
"""


def test_the_pipeline_hands_sigterm_on_and_ends_with_143(tmp_path):
    from pipeline import run
    from pipeline.stages import Stage

    class Sleeping(Stage):
        def command(self, workspace, *, resume=False):
            return [sys.executable, "-c", STAGE, str(tmp_path)]

    def terminated():
        run.pipeline_stages = lambda settings: [Sleeping("contracts.workspace")]

        def terminate():
            while not (tmp_path / "started").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=terminate, daemon=True).start()
        run.main(["--data", str(tmp_path), "--workspace", str(tmp_path)])

    log = tmp_path / "log"
    assert in_child(terminated, output=log) == 143, log.read_text()
    assert (tmp_path / "stopped").exists()
    assert (
        log.read_text().splitlines()[-1] == "interrupted; --resume (RESUME=1 with make) continues from here"
    )


def test_sigkill_while_a_word_model_is_saved_leaves_the_model_before(
    small_workspace, new_workspace, tmp_path
):
    """It is fitted again from the start; until then the finished run before it is whole."""
    from training.run_folder import RunFolder
    from word_models.saved import WordModel
    from word_models.train import main

    def train(root):
        main(["--workspace", str(root), "--model", "ridge", "--embeddings"])

    first = new_workspace("first")
    log = tmp_path / "log"
    assert in_child(lambda: train(first), output=log) == 0, log.read_text()
    for number in range(1, 60, 6):
        root = tmp_path / "broken"
        shutil.copytree(first, root)

        def killed(root=root, number=number):
            kill_at(number, root, after=(RunFolder, "_make_way"))
            train(root)

        ended = in_child(killed, output=log)
        assert ended in (0, -signal.SIGKILL), log.read_text()
        previous = root / "checkpoints" / "words_ridge.previous"
        assert (previous / "COMPLETE").is_file()
        assert WordModel.load(previous).kind == "ridge"
        assert in_child(lambda root=root: train(root), output=log) == 0, (number, log.read_text())
        assert WordModel.load(root / "checkpoints" / "words_ridge").kind == "ridge"
        shutil.rmtree(root)
        if ended == 0:
            break
    assert number > 6, "nothing was killed"
