"""The one exception for bad input, and how an entry point shows it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

EXIT_SYSTEM = 1
"""Exit code of a command that the operating system stopped: a full disk, no permission, no memory."""
EXIT_INPUT = 2
"""Exit code of a command whose files, ids or settings are wrong."""
EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended (128 + SIGINT)."""
LISTED = 10
"""Most ids that a message lists."""
REMEDIES = {
    errno.ENOSPC: "free some space on this disk and run the command again",
    errno.EDQUOT: "the quota of this user is used up; free some space and run the command again",
    errno.EACCES: "this user may not do that; change the permissions or use another folder",
    errno.EPERM: "this user may not do that; change the permissions or use another folder",
    errno.EROFS: "the folder can only be read; use another one",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}


class InputError(ValueError):
    """Bad file, id or setting. The message is one line that names it and says what to change."""


def listed(ids: Sequence[object], limit: int = LISTED) -> str:
    """The first ids of a list, and how many there are in all where that is more."""
    shown = ", ".join(str(sample_id) for sample_id in ids[:limit])
    return shown if len(ids) <= limit else f"{shown}, … ({len(ids)} in all)"


def run_entry_point(main: Callable[[], object]) -> None:
    """Run `main` and turn what a user can mend into one line on stderr.

    Exit codes: 2 for bad input, 1 for what the operating system refuses, 130 after Ctrl-C. Anything else is a mistake
    of ours: its traceback is shown, and says so.
    """
    try:
        main()
    except InputError as error:
        _leave(str(error), EXIT_INPUT)
    except KeyboardInterrupt:
        _leave("interrupted", EXIT_INTERRUPTED)
    except MemoryError:
        _leave("not enough memory; close other programs, or use a smaller batch or table", EXIT_SYSTEM)
    except OSError as error:
        _leave(_describe(error), EXIT_SYSTEM)
    except Exception as error:
        error.add_note("This is a mistake in the program; please report it with the command that you ran.")
        raise


def _leave(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _describe(error: OSError) -> str:
    """The file, what the operating system says, and what to do."""
    place = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{place}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
