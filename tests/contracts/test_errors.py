"""What a user sees of an error, and the exit code."""

import errno
import subprocess
import sys

import pytest

from contracts.errors import InputError, listed, run_entry_point


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (InputError("a.csv: no column price"), 2, "error: a.csv: no column price\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.csv"),
            1,
            "error: out/a.csv: No space left on device; free some space on this disk and run the command again\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
            1,
            "error: a: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, exit_code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_entry_point(main)
    assert caught.value.code == exit_code
    assert capsys.readouterr().err == message


def test_a_mistake_of_ours_shows_its_traceback_and_says_so():
    program = "from contracts.errors import run_entry_point\nrun_entry_point(lambda: [][0])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "IndexError" in ended.stderr
    assert "mistake in the program" in ended.stderr


def test_many_ids_are_counted_and_ten_are_listed():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list(range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … (12 in all)"
