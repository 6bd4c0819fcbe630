"""A small saved system that reads texts and pictures, and the real service over it."""

import pytest


@pytest.fixture(scope="session")
def shop_index(tmp_path_factory):
    """An index over the generated catalogue of a shop, with an encoder of random weights; read only."""
    from product_matching import index, sample_pairs

    folder = tmp_path_factory.mktemp("shop")
    sample_pairs.main(["--out", str(folder), "--products", "50"])
    catalogue = ["--catalogue", str(folder / "right.csv"), "--model", str(folder / "encoder")]
    index.main(["build", *catalogue, "--index", str(folder / "index")])
    return folder / "index"
