"""Writing a file: whole or not at all, readable by whom the user says, and never in the place of something else."""

import os
import signal
import subprocess
import sys

import pytest

from contracts.errors import InputError
from contracts.files import atomic_write

WRITE_AND_DIE = """
import os, signal, sys
from contracts.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as file:
            file.write("text")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_another_running_process_keeps_its_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write("first")
        with atomic_write(path) as second:
            second.write("second")
    assert path.read_text() == "first"


def test_a_link_and_a_device_are_not_replaced(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("kept")
    link.symlink_to(target)
    for path, kind in ((link, "symbolic link"), (tmp_path, "a folder"), ("/dev/null", "a device")):
        with pytest.raises(InputError, match=kind), atomic_write(path) as file:
            file.write("lost")
    assert link.is_symlink()
    assert target.read_text() == "kept"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """The operating system reports a full disk without a name; here it does so when the file is synced."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path) as file:
        file.write("text")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
