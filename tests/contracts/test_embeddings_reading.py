"""The fast reader of embedding files against the plain way of doing the same."""

import numpy as np
import pytest

from contracts import embeddings
from contracts.embeddings import Embeddings, align, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.splits import fitted_on

META = {
    "name": "clip_image", "split": "train", "model": "m", "checkpoint": "sha", "split_hash": "h", "command": "c",
    "fitted_on": fitted_on(encoder_folds=()),
}  # fmt: skip


def example(rows=3000, width=8, dtype=np.float32):
    generator = np.random.default_rng(0)
    ids = np.array([f"{row:05d}" for row in range(rows)])
    valid = generator.random(rows) > 0.2
    return Embeddings(ids, generator.normal(size=(rows, width)).astype(dtype), valid, dict(META))


def plain_align(content, sample_ids):
    position = {sample_id: row for row, sample_id in enumerate(content.sample_ids.tolist())}
    embeddings = np.zeros((len(sample_ids), content.width), np.float32)
    valid = np.zeros(len(sample_ids), bool)
    for row, sample_id in enumerate(sample_ids):
        if sample_id in position and content.valid[position[sample_id]]:
            embeddings[row], valid[row] = content.embeddings[position[sample_id]], True
    return embeddings, valid


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("order", ["the file's", "shuffled", "some"])
def test_align_equals_the_plain_join(dtype, order):
    content = example(dtype=dtype)
    content.embeddings[~content.valid] = np.nan  # what is not valid holds no information
    ids = content.sample_ids.astype(object)  # as a table gives them
    if order != "the file's":
        ids = np.random.default_rng(1).permutation(ids)
    if order == "some":
        ids = np.append(ids[:100], ["unknown"])
    embeddings_, valid = plain_align(content, ids)
    aligned = align(content, ids)
    np.testing.assert_array_equal(aligned.embeddings, embeddings_)
    np.testing.assert_array_equal(aligned.valid, valid)
    assert aligned.embeddings.dtype == np.float32 and aligned.found == len(ids) - (order == "some")


def test_rows_in_order_are_not_copied(tmp_path):
    write_embeddings(tmp_path / "e.pkl", example())
    content = read_embeddings(tmp_path / "e.pkl")
    assert np.shares_memory(align(content, content.sample_ids).embeddings, content.embeddings)


def test_a_read_only_matrix_is_left_alone():
    content = example()
    content.embeddings.flags.writeable = False
    before = content.embeddings.copy()
    aligned = align(content, content.sample_ids)
    assert not aligned.embeddings[~content.valid].any()
    np.testing.assert_array_equal(content.embeddings, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_row_is_checked_for_broken_numbers(value):
    matrix = np.full((2500, 3), 3e38, np.float32)  # finite, but a sum of the row is not
    matrix[[0, 1023, 1024, 2499], [0, 1, 2, 0]] = value
    np.testing.assert_array_equal(embeddings._finite_rows(matrix), np.isfinite(matrix).all(axis=1))


def test_the_hash_overrides_whatever_the_parser_says(tmp_path, monkeypatch):
    """Parsing runs beside hashing; neither its result nor its error may leave a file whose hash is wrong."""
    path = tmp_path / "e.pkl"
    write_embeddings(path, example(rows=20))
    path.with_name("e.pkl.json").write_text('{"sha256": "another"}')
    for parser in (lambda path: "parsed", lambda path: [][1], lambda path: bytearray(2**62)):
        monkeypatch.setattr(embeddings, "_load", parser)
        with pytest.raises(InputError, match="sha256 differs"):
            read_embeddings(path)
