import json
import shutil

import faiss
import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.files import sha256_file
from product_matching import index as stage
from product_matching import vector_index
from product_matching.catalogue import read_catalogue
from product_matching.encoder import encode, load_encoder
from product_matching.index import CatalogueIndex
from product_matching.sample_pairs import write_tiny_encoder
from product_matching.vector_index import KINDS, choose_kind


def clustered(rows: int, width: int = 32, seed: int = 0) -> np.ndarray:
    """Points around 40 centres, the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(40, width))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(40, size=rows)] + 0.4 * rng.normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def catalogue(rows: int, first: int = 0) -> pd.DataFrame:
    numbers = range(first, first + rows)
    return pd.DataFrame({
        "id": [f"p{n}" for n in numbers], "title": [f"product {n}" for n in numbers],
        "category": ["Even" if n % 2 == 0 else "odd" for n in numbers],
    })  # fmt: skip


def build(rows: int = 600, kind: str = "auto", **options) -> CatalogueIndex:
    return CatalogueIndex.build(
        catalogue(rows), clustered(rows), kind=kind, model="m", fingerprint="f", **options
    )


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


def test_the_kind_follows_the_size_and_says_why():
    kinds = [choose_kind(rows, 384) for rows in (1, 20_000, 20_001, 500_000, 500_001, 2_000_001)]
    assert [kind for kind, _ in kinds] == ["flat", "flat", "hnsw", "hnsw", "ivf", "ivfpq"]
    assert kinds[-1][1] == "2,000,001 rows: 3.1 GB of embeddings stay on disk, 0.1 GB of codes in memory"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reaches_its_recall_and_gives_exact_cosines(kind):
    index = build(kind=kind)
    queries = clustered(50, seed=1)
    cosine, rows = index.search(queries, 10)
    truth = exact(queries, index.vectors, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, truth, strict=True)])
    assert recall >= 0.93 and index.meta["recall_at_10"] >= 0.95
    assert index.neighbours.recall(queries) == pytest.approx(recall, abs=0.005)
    np.testing.assert_allclose(cosine, (index.vectors[rows] * queries[:, None]).sum(-1), atol=1e-5)
    assert (np.diff(cosine, axis=1) <= 1e-6).all()


def test_effort_is_raised_until_the_target_is_met():
    low, high = build(kind="ivf", target_recall=0.3), build(kind="ivf", target_recall=1.0)
    assert low.meta["effort"] < high.meta["effort"] and high.meta["recall_at_10"] == 1.0
    queries = clustered(50, seed=1)
    high.neighbours.set_effort(1)
    assert high.neighbours.recall(queries) < 0.99  # the number is measured, not claimed


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_answers_as_before(tmp_path, kind):
    index, queries = build(kind=kind), clustered(5, seed=1)
    index.save(tmp_path)
    loaded = CatalogueIndex.load(tmp_path)
    for before, after in zip(index.search(queries, 7), loaded.search(queries, 7), strict=True):
        np.testing.assert_array_equal(before, after)
    assert loaded.meta == index.meta and loaded.catalogue["id"].tolist() == index.catalogue["id"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_k_larger_than_the_catalogue_returns_what_there_is(kind):
    rows = 300
    cosine, found = build(rows, kind=kind).search(clustered(2, seed=1), 1000)
    assert found.shape == (2, rows) and (np.isfinite(cosine) == (found >= 0)).all()
    if kind == "flat":
        assert sorted(found[0]) == list(range(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_category_is_searched_exactly(kind):
    index, queries = build(kind=kind), clustered(5, seed=1)
    cosine, rows = index.search(queries, 4, category="EVEN")
    even = np.arange(0, 600, 2)
    np.testing.assert_array_equal(rows, even[exact(queries, index.vectors[even], 4)])
    with pytest.raises(InputError, match="category 'shoes' is not in this catalogue"):
        index.search(queries, 4, category="shoes")


def test_a_folder_of_schema_1_is_read(tmp_path):
    """Written by hand, so that the format cannot change unnoticed."""
    vectors = clustered(50)
    flat = faiss.IndexFlatIP(32)
    flat.add(vectors)
    faiss.write_index(flat, str(tmp_path / "a.faiss"))
    np.save(tmp_path / "a.npy", vectors)
    catalogue(50).to_csv(tmp_path / "a.csv", index=False)
    files = {"faiss": "a.faiss", "vectors": "a.npy", "catalogue": "a.csv"}
    meta = {
        "model": "m", "fingerprint": "f", "max_length": 128, "calibration": None, "schema": 1, "kind": "flat",
        "kind_setting": "auto", "reason": "50 rows", "width": 32, "target_recall": 0.95, "trained_rows": 50,
        "effort": 1, "rows": 50, "recall_at_10": 1.0, "recall_queries": 50, "files": files,
        "sha256": {content: sha256_file(tmp_path / name) for content, name in files.items()},
    }  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(meta))
    index = CatalogueIndex.load(tmp_path)
    assert index.search(vectors[7:8], 1)[1].tolist() == [[7]]
    assert index.add(catalogue(1, first=50), clustered(1, seed=3)).meta["rows"] == 51


def test_added_records_are_found_and_the_old_ones_stay(tmp_path):
    index, new = build(kind="hnsw"), clustered(30, seed=5)
    grown = index.add(catalogue(30, first=600), new)
    cosine, rows = grown.search(new, 1)
    assert rows[:, 0].tolist() == list(range(600, 630)) and np.allclose(cosine, 1, atol=1e-5)
    assert grown.meta["rows"] == 630 and grown.meta["trained_rows"] == 600
    grown.save(tmp_path)
    assert CatalogueIndex.load(tmp_path).catalogue["id"].iloc[-1] == "p629"
    with pytest.raises(InputError, match="id p5 is in the index already"):
        index.add(catalogue(1, first=5), new[:1])


def test_an_index_that_outgrew_its_kind_is_built_anew(monkeypatch):
    monkeypatch.setattr(vector_index, "FLAT_ROWS", 610)
    index = build()
    assert index.meta["kind"] == "flat"
    grown = index.add(catalogue(30, first=600), clustered(30, seed=5))
    assert grown.meta["kind"] == "hnsw" and grown.meta["model"] == "m" and len(grown.vectors) == 630


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    build(100).save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(stage, "write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        build(200).save(tmp_path)
    monkeypatch.undo()
    assert len(CatalogueIndex.load(tmp_path).vectors) == 100
    build(200).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(before)


@pytest.mark.parametrize("kind", ["faiss", "vectors", "catalogue"])
def test_a_truncated_or_changed_file_is_refused_by_name(tmp_path, kind):
    build().save(tmp_path)
    path = tmp_path / json.loads((tmp_path / "index.json").read_text())["files"][kind]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{path.name}: sha256 differs"):
        CatalogueIndex.load(tmp_path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(InputError, match=f"{path.name}: sha256 differs"):
        CatalogueIndex.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: no such file"):
        CatalogueIndex.load(tmp_path)


def test_a_folder_without_an_index_says_how_to_build_one(tmp_path):
    with pytest.raises(InputError, match="no index.json there; run python -m product_matching.index build"):
        CatalogueIndex.load(tmp_path)


def test_an_index_of_another_model_or_width_is_refused_by_name(shops, shop_index, tmp_path):
    texts = ["Alderby lcd television", "camera"]
    write_tiny_encoder(tmp_path / "same_width", texts, seed=1)
    write_tiny_encoder(tmp_path / "wide", texts, width=32)
    index = CatalogueIndex.load(shop_index)
    index.require_encoder(load_encoder(str(shops / "encoder"), device="cpu"), "encoder")
    with pytest.raises(InputError, match=r"built with model .*/encoder \(weights .*model other has weights"):
        index.require_encoder(load_encoder(str(tmp_path / "same_width"), device="cpu"), "other")
    with pytest.raises(InputError, match="holds 64-d embeddings of model .*; model wide makes 32-d ones"):
        index.require_encoder(load_encoder(str(tmp_path / "wide"), device="cpu"), "wide")


def test_bad_catalogues_are_refused():
    with pytest.raises(InputError, match="has no rows"):
        CatalogueIndex.build(catalogue(0), clustered(0))
    with pytest.raises(InputError, match="id p0 occurs twice"):
        CatalogueIndex.build(pd.concat([catalogue(2), catalogue(1)]), clustered(3))
    with pytest.raises(InputError, match="2 records and 3 embeddings"):
        CatalogueIndex.build(catalogue(2), clustered(3))
    with pytest.raises(InputError, match="at least 256 rows; here 32 and 100"):
        build(100, kind="ivfpq")


def test_command_line_builds_and_adds(shops, tmp_path, capsys):
    table = read_catalogue(shops / "right.csv")
    for name, part in (("first", table[:100]), ("more", table[100:])):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    shutil.copytree(shops / "encoder", tmp_path / "encoder")
    (tmp_path / "encoder" / "calibration.json").write_text('{"slope": 9.0, "intercept": -8.0, "pairs": 7}')
    common = ["--model", str(tmp_path / "encoder"), "--index", str(tmp_path / "index"), "--device", "cpu"]
    stage.main(["build", "--catalogue", str(tmp_path / "first.csv"), *common])
    assert "flat index (100 rows: exact search" in capsys.readouterr().out
    stage.main(["add", "--catalogue", str(tmp_path / "more.csv"), *common])
    index = CatalogueIndex.load(tmp_path / "index")
    assert index.catalogue["id"].tolist() == table["id"].tolist()
    assert index.meta["calibration"] == {"slope": 9.0, "intercept": -8.0, "pairs": 7}


def test_a_title_of_100_000_characters_is_indexed_and_found(tiny_encoder):
    titles = ["x" * 100_000, "Alderby television", "word " * 20_000]
    vectors = encode(tiny_encoder, titles)
    assert vectors.shape == (3, 64) and np.isfinite(vectors).all()
    table = pd.DataFrame({"id": list("abc"), "title": titles})
    found = CatalogueIndex.build(table, vectors).search(encode(tiny_encoder, titles[:1]), 1)[1]
    assert found[0, 0] == 0


def test_an_unknown_category_is_answered_with_those_that_exist(shop_index):
    index = CatalogueIndex.load(shop_index)
    assert index.categories[0] in index.catalogue["category"].str.lower().tolist()
    sizes = [len(index.rows_of_category[name]) for name in index.categories]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(InputError, match=r"category 'cars' is not in this catalogue; it has .*tv & video"):
        index.require_category("Cars".lower())
