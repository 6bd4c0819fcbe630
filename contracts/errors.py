"""The one exception for bad input, and how an entry point shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad file, id or setting. The message is one line that names it and says what to change."""


def run_entry_point(main: Callable[[], object]) -> None:
    """Run `main`; an InputError becomes one line on stderr and exit code 2, anything else a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
