"""Explanations of the sparse MLP: they add up, they are the right gradients, and they find a planted word."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.predictions import read_predictions
from contracts.splits import roles
from contracts.workspace import Workspace
from word_models import explain, train
from word_models.amounts import amount_bins, amounts
from word_models.attribution import Catalogue, Explainer, integrated_gradients
from word_models.effects import FIELD_OF_COLUMNS, by_group, by_word, effects, pieces_to_words
from word_models.explain import ExplainSettings

QUICK = {"seeds": 2, "updates": 30, "lr": 1e-2, "hidden": 32}
FLAGS = [text for name, value in QUICK.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def catalogue(sample_workspace):
    return Catalogue.read(Workspace(sample_workspace))


@pytest.fixture(scope="module")
def explainer(catalogue):
    return Explainer.fit(ExplainSettings(**QUICK), catalogue, 1)


def test_contributions_sum_to_the_price_difference(explainer):
    rows = explainer.rows
    attribution = explainer.attribute(rows)
    difference = attribution.predicted - attribution.baseline
    total = np.asarray(attribution.terms.sum(axis=1))[:, 0] + attribution.structural.sum(axis=1)
    total += attribution.meanings.sum(axis=1)
    assert np.abs(difference).mean() > 0.2
    np.testing.assert_allclose(total, difference, rtol=0.01, atol=0.01 * np.abs(difference).mean())
    features = explainer.catalogue.features["train"][rows]
    expected = np.mean([network.predict(features) for network in explainer.networks], axis=0)
    np.testing.assert_allclose(attribution.predicted, expected, rtol=1e-5)


def test_attributions_are_the_integral_of_the_gradients(explainer):
    """Against autograd through a dense copy of the first layer, term by term, on a path of ten times the steps."""
    features = explainer.catalogue.features["train"][explainer.rows[:4]]
    network, steps = replace(explainer.networks[0], scale=2.0), 640  # prices twice as far apart
    attribution = integrated_gradients(network, features, explainer.baseline)
    terms, structural = torch.from_numpy(features.terms.toarray()), torch.from_numpy(features.dense)
    start, mlp = torch.from_numpy(explainer.baseline), network.network
    of_terms, of_structural = torch.zeros_like(terms), torch.zeros_like(structural)
    for alpha in (torch.arange(steps) + 0.5) / steps:
        x, s = (alpha * terms).requires_grad_(), (start + alpha * (structural - start)).requires_grad_()
        ln_price = mlp.layers(x @ mlp.terms.weight.detach() + mlp.dense(s)).sum() * network.scale
        by_x, by_s = torch.autograd.grad(ln_price, (x, s))
        of_terms += by_x * terms / steps
        of_structural += by_s * (structural - start) / steps
    np.testing.assert_allclose(attribution.terms.toarray(), of_terms, atol=2e-3)
    columns = attribution.structural.shape[1]
    np.testing.assert_allclose(attribution.structural, of_structural[:, :columns], atol=2e-3)
    first_view = of_structural[:, columns:][:, : features.meanings[0].shape[1]]
    np.testing.assert_allclose(attribution.meanings[:, 0], first_view.sum(dim=1), atol=2e-3)
    assert of_terms.abs().max() > 0.05 and of_structural.abs().max() > 0.05


def test_effects_of_a_product_lose_nothing(explainer):
    catalogue, rows = explainer.catalogue, explainer.rows[:20]
    attribution, table = explainer.attribute(rows), explainer.table(rows)
    for row in range(len(rows)):
        frame = effects(catalogue, table.iloc[row], attribution, row)
        total = (
            attribution.terms[row].sum() + attribution.structural[row].sum() + attribution.meanings[row].sum()
        )
        assert frame["contribution"].sum() == pytest.approx(total, abs=1e-9)
        pieces = catalogue.names.group[attribution.terms[row].indices] == "title pieces"
        of_pieces = frame.loc[frame["group"] == "title pieces", "contribution"].sum()
        assert of_pieces == pytest.approx(attribution.terms[row].data[pieces].sum(), abs=1e-9)
    # groups of one row, net
    groups = by_group(catalogue, explainer.attribute(rows[-1:])).set_index("group")["mean_abs_ln_price"]
    net = frame.groupby("group")["contribution"].sum().abs()
    np.testing.assert_allclose(groups[net.index], net, rtol=1e-5, atol=1e-9)


def test_pieces_go_to_the_words_they_are_cut_from(catalogue):
    shares = pieces_to_words(catalogue.builder, "Sea salt, SALT", {"salt": 1.0, " sea": 0.5, "alt ": 0.3})
    totals = pd.DataFrame(shares).groupby(0)[1].sum()
    assert totals.to_dict() == pytest.approx({"salt": 1.3, "sea": 0.5})
    shares = dict(pieces_to_words(catalogue.builder, "all-natural &&&&", {"l-n": 1.0, "&&&&": 0.2}))
    assert shares == pytest.approx({"all": 0.3, "natural": 0.7, "&&&&": 0.2})


def test_every_structural_column_is_named_after_the_field_that_moves_it(catalogue):
    table = catalogue.tables["train"]
    assert set(FIELD_OF_COLUMNS) == set(catalogue.columns)

    def moved(**changed):
        other = table.assign(**changed)
        before = amounts(table) | amount_bins(table)
        after = amounts(other) | amount_bins(other)
        return {FIELD_OF_COLUMNS[name] for name in before if not np.array_equal(before[name], after[name])}

    assert moved(total_amount=table["total_amount"] * 3) == {"total amount"}
    assert moved(quantity_value=table["quantity_value"] + 1) == {"total amount"}
    assert moved(pack_count=table["pack_count"] * 3) == {"pack count"}
    assert moved(item_size=table["item_size"] * 3) == {"item size"}
    assert moved(entity_name=table["entity_name"] + "!") == {"title length"}
    assert moved(catalog_content=table["catalog_content"] + "!") == {"text length"}
    swapped = table["unit_kind"].replace({"weight": "count", "count": "weight"})
    assert "unit kind" in moved(unit_kind=swapped)


def test_term_names_are_those_of_the_columns(catalogue):
    names, terms = catalogue.names, catalogue.features["train"].terms
    assert len(names.text) == len(names.group) == terms.shape[1]
    table = catalogue.tables["train"].iloc[:1].assign(entity_name="salt", catalog_content="")
    row = catalogue.builder(table).terms[0]
    found = set(zip(names.text[row.indices], names.group[row.indices], strict=True))
    assert ("salt", "title words") in found
    assert {group for _, group in found} == {"title words", "title pieces", "words by amount"}


def test_by_word_counts_products_and_means_contributions():
    def product(**contributions):
        items = [(word, group, value) for word, (group, value) in contributions.items()]
        return pd.DataFrame(items, columns=["label", "group", "contribution"])

    products = [product(organic=("title words", 0.2), rare=("text words", 9.0), pair=("word pairs", 1.0))]
    products += [
        pd.concat([product(organic=("text words", 0.1)), product(organic=("title pieces", 0.3))])
    ] * 19
    table = by_word(products)
    assert table["word"].tolist() == ["organic"] and table["rows"].tolist() == [20]
    assert table["ln_price"][0] == pytest.approx((0.2 + 19 * 0.4) / 20)
    assert table["percent"][0] == pytest.approx(100 * np.expm1(table["ln_price"][0]))


@pytest.fixture(scope="module")
def planted(sample_workspace, tmp_path_factory):
    """Every third product is called "Zorbex" and costs five times as much."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(sample_workspace / "data", folder / "data")
    workspace = Workspace(folder)
    table = workspace.prepared("train")
    dear = np.arange(len(table)) % 3 == 0
    table.loc[dear, "entity_name"] = "Zorbex " + table.loc[dear, "entity_name"]
    table.loc[dear, "price"] *= 5
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    return workspace


def test_a_planted_word_is_found(planted):
    folder = explain.main(["--workspace", str(planted.root), *FLAGS, "--rows", "80", "--holdout", "2"])
    words = pd.read_csv(folder / "words.csv", keep_default_na=False)
    assert words["word"][0] == "zorbex" and words["percent"][0] > 30
    assert (words["rows"] >= 20).all() and words["ln_price"].is_monotonic_decreasing
    groups = pd.read_csv(folder / "groups.csv")
    assert set(groups["group"]) == {
        "title words", "text words", "word pairs", "title pieces", "words by amount", "meanings", "amounts", "lengths",
    }  # fmt: skip
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")

    table, fold = planted.prepared("train").set_index("sample_id"), planted.folds()
    products = sorted(path.stem for path in (folder / "products").glob("*.png"))
    assert len(products) == 3 and fold[products].isin(roles(2).validate).all()
    for sample_id in products:
        product = pd.read_csv(folder / "products" / f"{sample_id}.csv", keep_default_na=False)
        zorbex = product.loc[product["label"] == "zorbex", "contribution"].sum()
        assert (zorbex > 0.3) == table.loc[sample_id, "entity_name"].startswith("Zorbex")


def test_what_is_explained_is_the_out_of_fold_price(planted):
    train.main(["--workspace", str(planted.root), *FLAGS, "--updates", "3"])
    written = read_predictions(planted, "words_mlp", "train")
    explainer = Explainer.fit(ExplainSettings(**QUICK | {"updates": 3}), Catalogue.read(planted), 3)
    predicted = np.log1p(np.exp(explainer.attribute(explainer.rows).predicted))
    np.testing.assert_allclose(predicted, written.log_price[explainer.rows], rtol=1e-5)


def test_named_products_of_train_and_test(planted):
    table, test = planted.prepared("train"), planted.prepared("test")
    test.loc[4, ["entity_name", "catalog_content"]] = ""
    test.loc[5, "sample_id"] = "a/b $1"
    test.loc[5, "entity_name"] = "$5 & $6 of _things_"
    test.to_csv(planted.path("prepared", split="test"), index=False)
    ids = [table["sample_id"][7], test["sample_id"][4], "a/b $1"]
    flags = ["--workspace", str(planted.root), *FLAGS, "--rows", "0", "--run", "named", "--quick"]
    folder = explain.main([*flags, "--ids", *ids]) / "products"
    assert {path.name for path in folder.glob("*.png")} == {
        f"{ids[0]}.png",
        f"{ids[1]}.png",
        "a%2Fb%20%241.png",
    }
    assert set(pd.read_csv(folder / f"{ids[1]}.csv")["group"]) == {"amounts", "lengths", "meanings"}


def test_further_facts_are_effects_and_a_catalogue_without_test_table_is_explained(planted, tmp_path):
    shutil.copytree(planted.root / "data", tmp_path / "data")
    workspace = Workspace(tmp_path)
    workspace.path("prepared", split="test").unlink()
    table = workspace.prepared("train")
    rows = np.arange(len(table))
    table["feature_grade"] = np.array(["basic", "pro"])[rows % 2]
    table["feature_watts"] = np.where(rows % 2, 100, 10)
    table["price"] = np.where(rows % 2, 40.0, 4.0)
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    catalog = read_json(workspace.path("catalog"))
    kinds = {"grade": "category", "watts": "number"}
    write_json(workspace.path("catalog"), catalog | {"features": kinds})

    folder = explain.main(
        ["--workspace", str(tmp_path), *FLAGS, "--rows", "20", "--ids", table["sample_id"][1]]
    )
    effect = pd.read_csv(folder / "products" / f"{table['sample_id'][1]}.csv").set_index("label")[
        "contribution"
    ]
    assert effect["watts: 100"] > 0.1 and effect["grade=pro"] > 0.02
    groups = pd.read_csv(folder / "groups.csv").set_index("group")["mean_abs_ln_price"]
    assert groups["numbers"] > groups["amounts"] and groups["categories"] > 0


def test_senseless_requests_are_refused(planted, monkeypatch):
    monkeypatch.setattr(Explainer, "fit", lambda *_: pytest.fail("fitted before the ids were checked"))
    with pytest.raises(InputError, match="--ids nope: neither in"):
        explain.main(["--workspace", str(planted.root), "--ids", "nope"])
    with pytest.raises(InputError, match="--holdout 5"):
        explain.main(["--workspace", str(planted.root), "--holdout", "5"])
    with pytest.raises(InputError, match="--rows -1"):
        explain.main(["--workspace", str(planted.root), "--rows", "-1"])
