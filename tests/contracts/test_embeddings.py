import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from contracts import embeddings
from contracts.embeddings import (
    Embeddings,
    align,
    read_embeddings,
    write_embeddings,
)  # fmt: skip
from contracts.errors import InputError
from contracts.files import sha256_file
from contracts.splits import fitted_on

META = {
    "checkpoint": "sha",
    "name": "clip_image", "split": "train", "model": "m", "fitted_on": fitted_on(encoder_folds=(3,)),
    "split_hash": "h", "command": "c",
}  # fmt: skip


def example(rows=20, width=8, dtype=np.float32):
    generator = np.random.default_rng(0)
    ids = np.array([f"{row:03d}" for row in range(rows)])
    valid = generator.random(rows) > 0.2
    return Embeddings(ids, generator.normal(size=(rows, width)).astype(dtype), valid, dict(META))


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        read_embeddings(path)
    assert "\n" not in str(caught.value)
    for word in (path.name, *words):
        assert word in str(caught.value)


def rewrite(path, content):
    """Another pickle under the same name with a matching hash, as somebody who means harm would make it."""
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    sidecar = path.with_name(path.name + ".json")
    sidecar.write_text(json.dumps({"sha256": sha256_file(path)}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip(tmp_path, dtype):
    path, content = tmp_path / "e.pkl", example(dtype=dtype)
    write_embeddings(path, content)
    loaded = read_embeddings(path)
    np.testing.assert_array_equal(loaded.sample_ids, content.sample_ids)
    np.testing.assert_array_equal(loaded.embeddings, content.embeddings)
    np.testing.assert_array_equal(loaded.valid, content.valid)
    assert loaded.embeddings.dtype == dtype
    assert loaded.meta == {"schema": 1, **META}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.pkl", "e.pkl.json"]


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "e.pkl"
    write_embeddings(path, example())
    good = path.read_bytes()
    for position in np.linspace(0, len(good) - 1, 50).astype(int):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        refused(path, "sha256")
        path.write_bytes(good[:position])
        refused(path, "sha256")


class Canary:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_cannot_run_code_even_with_a_matching_hash(tmp_path):
    path, canary = tmp_path / "e.pkl", tmp_path / "canary"
    rewrite(path, {"sample_ids": Canary(str(canary))})
    refused(path, "mkdir")
    assert not canary.exists()


def test_nothing_is_unpickled_before_the_hash_fits(tmp_path, monkeypatch):
    path = tmp_path / "e.pkl"
    write_embeddings(path, example())
    path.write_bytes(path.read_bytes() + b"x")

    def never(*arguments):
        raise AssertionError("unpickled")

    monkeypatch.setattr(embeddings, "_load", never)
    refused(path, "sha256")


def test_nine_bytes_do_not_take_much_memory(tmp_path):
    """LONG_BINPUT names a place in the unpickler's memo; one that is a list would get room for all places before."""
    path = tmp_path / "e.pkl"
    rewrite(path, b"Nr" + (2**22).to_bytes(4, "little") + b"0N.")
    tracemalloc.start()
    refused(path, f"place {2**22}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_arrays_larger_than_their_file_are_refused(tmp_path):
    """np.ndarray can be asked for any size without a byte of content; here for a gigabyte of ids."""

    class Large:
        def __reduce__(self):
            return np.ndarray, ((2**24,), "<U16")

    path, small = tmp_path / "e.pkl", example()
    rewrite(path, {"sample_ids": Large(), "embeddings": small.embeddings, "valid": small.valid, "meta": META})
    refused(path, "larger than the file")


@pytest.mark.parametrize("content", [b"garbage", b"", pickle.dumps([1]), pickle.dumps({"sample_ids": 1})])
def test_other_content_with_a_matching_hash(tmp_path, content):
    path = tmp_path / "e.pkl"
    rewrite(path, content)
    refused(path, "not an embedding file")


def test_missing_sidecar_and_missing_file(tmp_path):
    path = tmp_path / "e.pkl"
    refused(path, "no such embedding file")
    write_embeddings(path, example())
    (tmp_path / "e.pkl.json").unlink()
    refused(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda e: setattr(e, "valid", e.valid[:-1]), "do not fit"),
        (lambda e: setattr(e, "embeddings", e.embeddings[0]), r"\[N, D\]"),
        (lambda e: setattr(e, "embeddings", e.embeddings.astype(np.float64)), "float64"),
        (lambda e: e.embeddings.__setitem__((np.flatnonzero(e.valid)[0], 0), np.nan), "NaN"),
        (lambda e: setattr(e, "embeddings", e.embeddings[:, :0]), "width 0"),
        (lambda e: e.sample_ids.__setitem__(1, "000"), "twice"),
        (lambda e: e.meta.pop("fitted_on"), "fitted_on"),
    ],
)
def test_contract_is_checked_when_writing(tmp_path, change, word):
    content = example()
    change(content)
    with pytest.raises(InputError, match=word):
        write_embeddings(tmp_path / "e.pkl", content)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_an_invalid_row_is_no_information(tmp_path):
    content = example()
    content.embeddings[~content.valid] = np.nan
    write_embeddings(tmp_path / "e.pkl", content)
    aligned = align(read_embeddings(tmp_path / "e.pkl"), content.sample_ids)
    assert np.isfinite(aligned.embeddings).all()
    assert (aligned.embeddings[~content.valid] == 0).all()


def test_align_joins_by_id_and_reports_coverage():
    content = example()
    ids = np.array(["019", "new", "003"])
    aligned = align(content, ids)
    assert aligned.found == 2
    assert aligned.valid.tolist() == [bool(content.valid[19]), False, bool(content.valid[3])]
    np.testing.assert_array_equal(aligned.embeddings[0], content.embeddings[19] * content.valid[19])
    with pytest.raises(InputError, match="other rows"):
        align(content, np.array(["x", "y"]))
