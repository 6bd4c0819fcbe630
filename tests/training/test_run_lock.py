import os
import signal
import socket
import subprocess
import sys

import pytest

from contracts.errors import InputError
from training.run_lock import lock_run, release_run

HOLDER = """
import os, sys, time
from pathlib import Path
from training.run_lock import lock_run
lock_run(Path(sys.argv[1]))
if os.fork() == 0:  # a worker of a data loader may outlive its parent
    time.sleep(30)
print("locked", flush=True)
time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains into the folder `run`, and a child of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_second_is_refused_and_told_who_is_first(tmp_path, holder):
    with pytest.raises(InputError) as refused:
        lock_run(tmp_path / "run")
    message = str(refused.value)
    assert f"process {holder.pid} on {socket.gethostname()}, started 20" in message
    assert message.startswith(f"{tmp_path}/run: ") and "\n" not in message
    lock_run(tmp_path / "other")  # another run does not mind
    release_run(tmp_path / "other")


def test_a_killed_process_leaves_no_lock_behind(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock_run(tmp_path / "run")
    release_run(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_one_process_may_start_again(tmp_path):
    lock_run(tmp_path / "run")
    lock_run(tmp_path / "run")
    release_run(tmp_path / "run")
    release_run(tmp_path / "run")
