"""A catalogue that does not fit into memory is refused before anything is fitted."""

import pytest

from contracts.errors import InputError
from word_models import memory, train
from word_models.features import FeatureBuilder
from word_models.neighbourhoods import SIZES

TEXTS = {"characters": 300 * 75_000, "embedding_columns": 384}


def test_too_little_memory_is_said_before_the_features_are_built(workspace, monkeypatch):
    def never(*arguments, **named):
        raise AssertionError("the features are built")

    monkeypatch.setattr(FeatureBuilder, "fit", never)
    monkeypatch.setattr(memory, "free_bytes", lambda: 400_000_000)
    flags = ["--workspace", str(workspace.root), "--model", "boosted"]
    with pytest.raises(InputError, match=r"460 rows: --model boosted needs about 0.4 GB .* 0.4 GB are free"):
        train.main(flags)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000_000)
    with pytest.raises(AssertionError, match="the features are built"):
        train.main(flags)


def test_what_is_needed_grows_with_rows_and_not_with_their_square():
    needed = [memory.needed_bytes("boosted", rows=rows, **TEXTS) for rows in (25_000, 50_000, 75_000)]
    assert needed[2] - needed[1] == needed[1] - needed[0] > 0
    assert 3.5e9 < needed[2] < 16e9  # the wanted bound; measured is 3.2 GB
    # the exact form holds three matrices of all pairs
    largest = memory.needed_bytes("kernel", rows=SIZES.exact, **TEXTS)
    assert largest - memory.needed_bytes("ridge", rows=SIZES.exact, **TEXTS) >= 3 * 4 * SIZES.exact**2


def test_free_memory_is_read_where_the_system_says_it(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert memory.free_bytes(meminfo) is None
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:   16000000 kB\n")
    assert memory.free_bytes(meminfo) == 16_384_000_000
