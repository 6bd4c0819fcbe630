"""Random bytes for every reader of files and texts of strangers: an InputError, a result, and nothing else.

`FUZZ_EXAMPLES=20000 pytest tests/faults/test_fuzz.py` looks for longer (make fuzz).
"""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from contracts.catalog import read_table
from contracts.embeddings import Embeddings, read_embeddings, write_embeddings
from contracts.errors import InputError
from contracts.files import sha256_file, sidecar_of, write_json
from contracts.splits import fitted_on
from contracts.tables import read_any
from data.quantity import parse_quantity
from training.pictures import UnreadablePicture, open_picture

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=5000,
    suppress_health_check=list(HealthCheck),
    database=None,
)

PIECES = [
    "12",
    "1.5",
    "1,5",
    "oz",
    "fl oz",
    "Pack of",
    "(",
    ")",
    "x",
    "×",
    "of",
    "-",
    "½",
    "1/0",
    "0",
    "9" * 40,
    "\x00",
    "\r",
]


@fuzzed
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join)))
@example("Value: nan\nUnit: Ounce")
@example("Value: 1e999\nUnit: Count")
@example("Pack of " * 2000)
def test_the_quantity_grammar(text):
    quantity = parse_quantity(text)
    numbers = [value for value in vars(quantity).values() if isinstance(value, float)]
    assert all(np.isfinite(value) and value > 0 for value in numbers if not np.isnan(value))


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "e.pkl"
    meta = {
        "name": "e", "split": "train", "model": "m", "checkpoint": "c", "command": "x", "split_hash": "s",
        "fitted_on": fitted_on(encoder_folds=()),
    }  # fmt: skip
    write_embeddings(
        path, Embeddings(np.array(["a", "b"]), np.ones((2, 3), np.float32), np.ones(2, bool), meta)
    )
    return path, path.read_bytes()


def damaged(content, edits):
    """Overwrite, insert or remove bytes at places of a valid file, so that deep parts of the reader are reached."""
    changed = bytearray(content)
    for kind, place, byte in edits:
        place = int(place * len(changed))
        if kind == "set" and changed:
            changed[min(place, len(changed) - 1)] = byte
        elif kind == "insert":
            changed.insert(place, byte)
        elif kind == "cut":
            del changed[place:]
    return bytes(changed)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    ),
    min_size=1,
    max_size=6,
)


@fuzzed
@given(EDITS)
def test_the_pickle_reader_behind_a_hash_that_fits(embedding, edits):
    path, content = embedding
    path.write_bytes(damaged(content, edits))
    write_json(sidecar_of(path), {"sha256": sha256_file(path)})
    try:
        read_embeddings(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(os.system), pickle.dumps(print), b"cos\nsystem\n(S'true'\ntR.", b"r\xff\xff\xff\x7f."],
)
def test_pickles_that_want_to_run_something(embedding, content):
    path, _ = embedding
    path.write_bytes(content)
    write_json(sidecar_of(path), {"sha256": sha256_file(path)})
    with pytest.raises(InputError):
        read_embeddings(path)


def picture(kind):
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


PICTURES = [picture(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")]


@fuzzed
@given(st.sampled_from(PICTURES), EDITS)
def test_the_picture_reader(tmp_path_factory, content, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jpg"
    path.write_bytes(damaged(content, edits))
    try:
        assert min(open_picture(path, min_side=16).size) > 0
    except UnreadablePicture as error:
        assert "\n" not in str(error)


CSV = b'sample_id,catalog_content,price\r\n1,"tea, ""green""",3.5\r\n2,"two\nlines",4\r\n'


@fuzzed
@given(st.one_of(st.binary(max_size=200), EDITS.map(lambda edits: damaged(CSV, edits))))
@example(CSV)
@example(b"\xef\xbb\xbf" + CSV)
def test_the_csv_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(content)
    for read in (read_table, read_any):
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error)
