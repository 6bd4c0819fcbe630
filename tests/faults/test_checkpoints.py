"""Kills at random moments while checkpoints are written: what is resumed is one of them, whole, to the bit."""

import os
import random
import signal
import time
from dataclasses import dataclass

import torch

from training.run_folder import RunFolder


@dataclass
class Settings:
    seed: int = 0


def save_for_ever(folder):
    run = RunFolder(folder)
    step = 0
    while True:
        step += 1
        run.log(step, loss=1.0 / step)
        run.save_checkpoint(step, {"w": torch.full((400_000,), float(step))}, {"step": step})


def test_twenty_kills_while_saving(tmp_path):
    moments = random.Random(0)
    run = RunFolder.start(tmp_path / "run", Settings(), inputs=[])
    run.save_checkpoint(0, {"w": torch.zeros(400_000)}, {"step": 0})
    caught = 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            save_for_ever(run.path)
        time.sleep(moments.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        caught += any(not (folder / "COMPLETE").exists() for folder in run.path.glob("step_*"))
        weights, state = run.newest_checkpoint()
        assert torch.equal(weights["w"], torch.full((400_000,), float(state["step"])))
        assert all(line["step"] <= state["step"] for line in run.metrics())
    assert caught > 3, "no kill came while a checkpoint was written"
