"""Two gloo processes reduce their gradients; started by torchrun as the stages are."""

import subprocess
import sys

import pytest
import torch

from training.processes import process, reduce_gradients

PROGRAM = """
import torch
from training.processes import from_first_process, process, process_group, reduce_gradients

with process_group(torch.device("cpu")):
    rank, processes = process()
    assert processes == 2
    for how, expected in (("sum", 3.0), ("mean", 1.5)):
        used, unused = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
        used.grad = torch.full((3,), rank + 1.0)
        reduce_gradients([used, unused], how)
        assert used.grad.tolist() == [expected] * 3, used.grad
        assert unused.grad is None
    assert from_first_process({"epoch": 7 if rank == 0 else 8}) == {"epoch": 7}
    print(f"process {rank} is content")
"""


@pytest.mark.slow
def test_two_processes_sum_and_average_their_gradients(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "process 0 is content" in done.stdout and "process 1 is content" in done.stdout


def test_one_process_leaves_its_gradients_alone():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    reduce_gradients([weight], "mean")
    assert process() == (0, 1)
    assert weight.grad.tolist() == [1, 1]
