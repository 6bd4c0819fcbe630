"""A small saved system that reads texts and pictures, and the real service over it."""

import shutil

import pytest

from contracts.workspace import Workspace
from ensemble.saved import Ensemble, Member


@pytest.fixture(scope="session")
def price_system(sample_workspace, tmp_path_factory):
    """The fusion of both frozen SigLIP towers, hardly trained, as the only member; read only."""
    from fusion.all_embeddings import predict_test
    from fusion.all_embeddings import train as fusion
    from siglip_extract import extract_embeddings

    root = tmp_path_factory.mktemp("price_system")
    shutil.copytree(sample_workspace / "data", root / "data")
    workspace = ["--workspace", str(root), "--device", "cpu"]
    for table in ("train", "test"):
        extract_embeddings.main([table, "--preset", "tiny", *workspace])
    fusion.main(["--preset", "tiny", "--epochs", "2", "--use", "siglip_text", "siglip_image", *workspace])
    predict_test.main(workspace)
    # the ensemble of a single hold-out cannot be fitted, so its only weight is written down
    name = "fusion_all_embeddings"
    score = {"smape": 70.0, "standard_error": 2.0, "rows": 400, "coverage": {"80%": 0.8, "95%": 0.95}}
    only = Ensemble((Member(name, "fusion.all_embeddings", name),), (1.0,), {0.8: 1.0, 0.95: 2.0}, score)
    only.save(Workspace(root).path("run", name="ensemble"))
    return root


@pytest.fixture(scope="session")
def shop_index(tmp_path_factory):
    """An index over the generated catalogue of a shop, with an encoder of random weights; read only."""
    from product_matching import index, sample_pairs

    folder = tmp_path_factory.mktemp("shop")
    sample_pairs.main(["--out", str(folder), "--products", "50"])
    catalogue = ["--catalogue", str(folder / "right.csv"), "--model", str(folder / "encoder")]
    index.main(["build", *catalogue, "--index", str(folder / "index")])
    return folder / "index"
