"""A fusion model as a member of the ensemble: out of fold, with several seeds and the table's own features."""

import numpy as np
import pandas as pd
import pytest

from contracts.tables import read_any
from contracts.workspace import Workspace
from pricing import PriceModel


@pytest.fixture(scope="module")
def raw(sample_workspace):
    """The sample catalogue with two further columns, of which the first tells something of the price."""
    tables = {}
    for name in ("train", "test"):
        table = read_any(sample_workspace / "catalogue" / f"{name}.csv")
        random = np.random.default_rng(len(name))
        weight = np.exp(random.normal(size=len(table))).round(3).astype(str)
        weight[::7] = ""
        tables[name] = table.assign(weight_kg=weight, brand=random.choice(["Acme", "Zorn", ""], len(table)))
    return tables


@pytest.fixture(scope="module")
def fusion_system(sample_workspace, raw, tmp_path_factory):
    """Fusion out of fold on both frozen SigLIP towers and the features, a ridge beside it, and their ensemble."""
    from data import prepare
    from ensemble import train as ensemble
    from fusion.all_embeddings import predict_test
    from fusion.all_embeddings import train as fusion
    from siglip_extract import extract_embeddings
    from word_models import train as words

    root = tmp_path_factory.mktemp("fusion_system")
    (root / "catalogue").mkdir()
    for name, table in raw.items():
        table.to_csv(root / "catalogue" / f"{name}.csv", index=False)
    (root / "catalogue" / "images").symlink_to(sample_workspace / "catalogue" / "images")
    workspace = ["--workspace", str(root)]
    prepare.main(["--data", str(root / "catalogue"), "--features", "weight_kg", "brand", *workspace])
    for table in ("train", "test"):
        extract_embeddings.main([table, "--preset", "tiny", "--device", "cpu", *workspace])
    used = ["--use", "siglip_text", "siglip_image", "tabular"]
    out_of_fold = ["--folds", "2", "--seeds", "2", "--device", "cpu"]
    fusion.main(["--preset", "tiny", "--epochs", "8", *used, *out_of_fold, *workspace])
    predict_test.main([*workspace, "--out", str(root / "fusion_out.csv")])
    words.main(["--model", "ridge", *workspace])
    ensemble.main([*workspace, "--members", "fusion_all_embeddings", "words_ridge"])
    return root


def test_the_ensemble_takes_a_fusion_out_of_fold(fusion_system):
    from ensemble.saved import Ensemble

    ensemble = Ensemble.load(fusion_system / "checkpoints" / "ensemble")
    assert [member.stage for member in ensemble.members] == ["fusion.all_embeddings", "word_models.train"]
    assert ensemble.score["rows"] == 400 and "leaked_smape" not in ensemble.score


def test_pricing_gives_the_prices_of_the_workspace(fusion_system, raw):
    model = PriceModel.load(fusion_system, device="cpu")
    priced = model.predict(raw["test"])
    expected = pd.read_csv(fusion_system / "test_out.csv", dtype={"sample_id": str})
    assert priced["sample_id"].tolist() == expected["sample_id"].tolist()
    np.testing.assert_allclose(priced["price"], expected["price"], rtol=1e-5, atol=1e-4)


def test_the_member_alone_gives_its_own_prices(fusion_system, raw):
    model = PriceModel.load(fusion_system, device="cpu")
    from pricing.products import products_of

    names = [member.name for member in model.ensemble.members]
    ln_price = model.price(products_of(raw["test"], model.mapping)).ln_by_member
    expected = pd.read_csv(fusion_system / "fusion_out.csv")["price"]
    of_fusion = np.exp(ln_price[:, names.index("fusion_all_embeddings")])
    np.testing.assert_allclose(of_fusion, expected, rtol=1e-5, atol=6e-5)


def test_a_price_depends_on_the_features_and_on_no_other_row(fusion_system, raw):
    model = PriceModel.load(fusion_system, device="cpu")
    together = model.predict(raw["test"])["price"]
    alone = [model.predict(raw["test"].iloc[[row]])["price"].iloc[0] for row in range(3)]
    np.testing.assert_allclose(alone, together[:3], rtol=1e-5)
    backwards = model.predict(raw["test"][::-1])["price"].to_numpy()[::-1]
    np.testing.assert_allclose(backwards, together, rtol=1e-5)
    heavy = model.predict(raw["test"].assign(weight_kg="99", brand="Acme"))["price"]
    assert (np.abs(np.log(heavy / together)) > 1e-4).mean() > 0.8
    one = model.predict_one("Green tea, 12 oz")  # no feature is known of it
    assert one["price"] > 0


def test_an_export_prices_alike(fusion_system, raw, tmp_path):
    from pricing.export import export

    exported = PriceModel.load(export(fusion_system, tmp_path / "exported"), device="cpu")
    prices = exported.predict(raw["test"].head(5), images=Workspace(fusion_system).images_folder())["price"]
    expected = pd.read_csv(fusion_system / "test_out.csv")["price"].head(5)
    np.testing.assert_allclose(prices, expected, rtol=1e-5, atol=1e-4)
