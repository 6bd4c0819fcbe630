"""Whether a catalogue fits into memory, asked before anything is fitted.

All that grows with the catalogue grows with its rows; only the kernel's exact form holds matrices of all pairs. The
constants were measured on generated and real rows (25,000 to 75,000 of them) and rounded up.
"""

from __future__ import annotations

from pathlib import Path

from contracts.errors import InputError
from word_models.neighbourhoods import SIZES
from word_models.similarity import SAMPLE_ROWS

START = 400_000_000
"""Bytes of the program and its libraries."""
PER_ROW = 12_000
"""Bytes per row: views of meaning, amounts, and their copies for the rows outside a hold-out."""
PER_CHARACTER = 45
"""Bytes per character of the texts: counting terms takes most of them."""
PER_EMBEDDING_COLUMN = 12
"""Bytes per row and column of the embedding files: three copies in float32."""
PER_LEARNED_PAIR = 250
"""Bytes per pair of rows in the samples that a similarity is learned from: all comparisons, and their gradients."""
PER_EXACT_PAIR = 12
"""Bytes per pair of rows in the exact form: three matrices in float32."""
ON_KERNEL = ("kernel", "boosted", "mlp_on_kernel")
"""Models that begin with a kernel."""


def require_memory(model: str, *, rows: int, characters: int, embedding_columns: int) -> None:
    """Raises InputError if fitting needs more memory than is free. Where the system does not say, nothing is checked.

    Args:
        model: see `WordModelSettings.model`.
        rows: of all tables together.
        characters: of all their texts together.
        embedding_columns: of all embedding files together.
    """
    needed = needed_bytes(model, rows=rows, characters=characters, embedding_columns=embedding_columns)
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{rows} rows: --model {model} needs about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are "
            "free; end other programs, use a larger machine, or fit on fewer rows"
        )


def needed_bytes(model: str, *, rows: int, characters: int, embedding_columns: int) -> int:
    """About how much memory fitting takes at most; see `require_memory`."""
    needed = START + rows * (PER_ROW + PER_EMBEDDING_COLUMN * embedding_columns) + PER_CHARACTER * characters
    if model in ON_KERNEL:
        learning = PER_LEARNED_PAIR * min(rows // 2, SAMPLE_ROWS) ** 2
        exact = PER_EXACT_PAIR * rows**2 if rows <= SIZES.exact else 0
        needed += max(learning, exact)  # one after the other
    return needed


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that a new program can use without swapping; None where the system does not say (not Linux)."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024  # "15923204 kB", by which Linux means KiB
    return None
