"""The report page: honest numbers, everything that a product can contain shown as text, and one small file."""

import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import ensemble.train
from contracts.files import read_json, write_json
from contracts.predictions import write_predictions
from contracts.smape import smape_terms
from contracts.splits import fitted_on, fitted_out_of_fold, roles
from contracts.workspace import Workspace
from pipeline.report import write_report
from pipeline.scores import score_table, write_scores

EVIL = """<script>alert('1')</script><img src="http://x/y.png" onerror="alert(2)"> & "'"""
VOID = {"meta", "img", "col", "circle", "path", "rect", "polyline", "wbr"}
PAGE_TAGS = {
    "html",
    "head",
    "title",
    "style",
    "body",
    "header",
    "main",
    "nav",
    "section",
    "article",
    "div",
    "span",
}
TEXT_TAGS = {
    "p",
    "h1",
    "h2",
    "h3",
    "small",
    "b",
    "i",
    "a",
    "code",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "details",
    "summary",
}
OTHER_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "svg", "g", "text", "clippath"}
TAGS = VOID | PAGE_TAGS | TEXT_TAGS | OTHER_TAGS
SPACE = "\N{NO-BREAK SPACE}"


class Page(HTMLParser):
    """What a browser makes of the page: tags with attributes, and the text outside of style."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.open = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def of_class(self, name):
        return [tag for tag, attributes in self.tags if name in (attributes.get("class") or "").split()]


def read_page(root):
    page = Page(write_report(root).read_text("utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def workspace(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    return Workspace(tmp_path)


def write_member(workspace, name, noise, *, folds=tuple(range(10)), seed=0, **meta):
    """A model that is off by `noise` in ln price on average, and saw none of the rows that it prices."""
    train = workspace.training_table()
    train = train[train["fold"].isin(folds)]
    error = noise * np.random.default_rng(seed).standard_normal(len(train))
    log_price = np.log1p(train["price"].to_numpy() * np.exp(error))
    meta = {"stage": "test", "model": name, "fitted_on": fitted_out_of_fold(5), **meta}
    write_predictions(
        workspace,
        name,
        "train",
        train["sample_id"].to_numpy(),
        log_price,
        meta=meta,
        fold=train["fold"].to_numpy(),
    )


@pytest.fixture
def with_ensemble(workspace):
    """Three members, one of them worse than any constant price, and their ensemble."""
    for seed, (name, noise) in enumerate({"good": 0.2, "fair": 0.5, "hopeless": 3.0}.items()):
        write_member(workspace, name, noise, seed=seed)
        log_price = np.full(60, np.log1p(10.0))
        ids = workspace.prepared("test")["sample_id"].to_numpy()
        meta = {"stage": "test", "model": name, "fitted_on": fitted_out_of_fold(5)}
        write_predictions(workspace, name, "test", ids, log_price, meta=meta)
    ensemble.train.main(["--workspace", str(workspace.root), "--members", "good", "fair", "hopeless"])
    write_scores(workspace.root)
    return workspace


def test_one_table_has_scores_weights_and_the_useless_member_by_name(with_ensemble):
    page = read_page(with_ensemble.root)
    summary = read_json(with_ensemble.path("run", name="ensemble") / "summary.json")
    scores = pd.read_csv(with_ensemble.path("scores")).set_index("model")
    table = page.text[: page.text.index("SMAPE is the mean of")]
    for member in summary["members"]:
        assert f"{100 * member['weight']:.0f}{SPACE}%" in table
        assert f"{member['smape_without_it']:.2f}" in table
        assert f"{scores.loc[member['model'], 'validation SMAPE']:.2f}" in table
    assert "No better than one price for everything: hopeless." in page.text
    assert len(page.of_class("bad")) == 1
    assert scores["note"].dropna().to_dict() == {"hopeless": "no better than the constant price"}


def test_the_constant_of_a_note_prices_the_rows_of_the_model(workspace):
    """The model prices cheap rows only; one that is worse there than the constant is better than it elsewhere."""
    train = workspace.training_table()
    cheap = train[train["price"] < train["price"].quantile(0.2)]
    price = np.full(len(cheap), train["price"].median())  # near the constant, which is far off for cheap rows
    meta = {"stage": "test", "model": "m", "fitted_on": fitted_out_of_fold(5)}
    ids, fold = cheap["sample_id"].to_numpy(), cheap["fold"].to_numpy()
    write_predictions(workspace, "m", "train", ids, np.log1p(price * 0.8), meta=meta, fold=fold)
    table = score_table(workspace).set_index("model")
    assert table.loc["m", "validation SMAPE"] > table.loc["constant", "validation SMAPE"] + 10
    assert "note" not in table


def test_coverage_is_that_of_the_ensemble(with_ensemble):
    summary = read_json(with_ensemble.path("run", name="ensemble") / "summary.json")
    text = read_page(with_ensemble.root).text
    for level, share in summary["coverage"].items():
        nominal = level.rstrip("%")
        tile = f"{100 * share:.1f}{SPACE}%of the true prices lie in their {nominal}{SPACE}% interval"
        assert tile in text


def test_whatever_a_product_contains_is_text(with_ensemble):
    workspace = with_ensemble
    path = workspace.path("prepared", split="train")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["entity_name"] = table["catalog_content"] = EVIL
    table["unit"] = table["image"] = EVIL
    table["feature_brand <i>"] = EVIL + (table.index % 3).astype(str)
    table.to_csv(path, index=False)
    catalog = read_json(workspace.path("catalog"))
    catalog["features"] = {"brand <i>": "category"}
    catalog["currency"] = "<b>"
    catalog["train"]["bad_prices_skipped"] = {EVIL: EVIL}
    write_json(workspace.path("catalog"), catalog)
    failures = pd.DataFrame({"sample_id": [EVIL], "image": [EVIL], "reason": [EVIL]})
    failures.to_csv(workspace.path("image_failures", name="clip", split="train"), index=False)
    write_json(workspace.path("stages"), [{"stage": f"x {EVIL}", "seconds": 1.0, "peak_mb": 1}])
    page = read_page(workspace.root)
    assert "By brand <i>" in page.text
    assert page.text.count("<script>alert('1')</script>") > 20
    for tag, attributes in page.tags:
        assert tag in TAGS
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")


def test_the_worst_twenty_and_what_the_model_knew(with_ensemble):
    workspace = with_ensemble
    page = read_page(workspace.root)
    assert len(page.of_class("product")) == 20
    train = workspace.training_table().set_index("sample_id")
    predicted = pd.read_csv(
        workspace.path("predictions", name="ensemble", split="train"), dtype={"sample_id": str}
    ).set_index("sample_id")
    price = np.expm1(predicted["log_price"])
    terms = pd.Series(smape_terms(train["price"].to_numpy(), price[train.index].to_numpy()), train.index)
    worst = terms.sort_values(ascending=False).index[:20]
    places = [page.text.index(f"id {sample_id}") for sample_id in worst]
    assert places == sorted(places)
    first = page.text[: places[1]].rpartition("Furthest off")[2]
    row = train.loc[worst[0]]
    for expected in (
        f"${row['price']:.2f}",
        f"${price[worst[0]]:.2f}",
        "good$",
        "hopeless$",
        f"95{SPACE}% interval",
    ):
        assert expected in first


def test_pictures_lie_inside_the_page_and_damage_is_named(with_ensemble):
    workspace = with_ensemble
    for name in ("clip_image", "siglip_image"):
        file = workspace.path("embeddings", name=name, split="train")
        file.parent.mkdir(exist_ok=True)
        file.touch()  # the report asks only whether pictures were embedded
    page = read_page(workspace.root)
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert 10 < len(pictures) <= 20
    assert all(src.startswith("data:image/jpeg;base64,") and len(src) < 20_000 for src in pictures)
    assert "By picture" in page.text
    assert workspace.path("report").stat().st_size < 1_000_000

    catalog = read_json(workspace.path("catalog"))
    catalog["images_folder"] = str(workspace.root / "nowhere")
    write_json(workspace.path("catalog"), catalog)
    page = read_page(workspace.root)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert page.text.count("picture (missing)") > 10

    rows = workspace.training_table()
    failures = rows[["sample_id", "image"]].assign(reason="damaged (as the encoder says)")
    failures.to_csv(workspace.path("image_failures", name="clip_image", split="train"), index=False)
    assert read_page(workspace.root).text.count("picture (damaged (as the encoder says))") == 20


def test_of_one_hold_out_only_its_rows_are_shown(workspace):
    """As with encoders of one hold-out: two folds, and each calibrates the intervals of the other."""
    folds = roles(0).validate
    on = fitted_on(encoder_folds=roles(0).fitted_on)
    write_member(workspace, "a", 0.2, fitted_on=on, folds=folds, seed=1)
    write_member(workspace, "b", 0.3, fitted_on=on, folds=folds, seed=2)
    # it also prices rows that it was fitted on; these are not shown
    write_member(workspace, "ensemble", 0.2, fitted_on=on, seed=3, members=["a", "b"])
    rows = int(workspace.training_table()["fold"].isin(folds).sum())
    page = read_page(workspace.root)
    assert f"SMAPE on {rows} unseen products" in page.text
    assert "of the true prices lie in their 80" in page.text


def test_a_leaked_ensemble_has_no_errors_to_show(workspace):
    write_member(workspace, "ensemble", 0.2, fitted_on=fitted_on(encoder_folds=tuple(range(10))))
    page = read_page(workspace.root)
    assert "Scores" in page.text and "constant" in page.text
    assert "Furthest off" not in page.text and "unseen products" not in page.text


def test_a_picture_that_no_model_would_read_is_not_called_missing(with_ensemble):
    catalog = read_json(with_ensemble.path("catalog"))
    catalog["images_folder"] = str(with_ensemble.root / "nowhere")
    write_json(with_ensemble.path("catalog"), catalog)
    text = read_page(with_ensemble.root).text
    assert "picture: missing" in text and "picture (missing)" not in text


def test_what_no_product_has_is_not_called_missing(with_ensemble):
    path = with_ensemble.path("prepared", split="train")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["amount"] = table["total_amount"] = ""
    table["unit_kind"] = "none"
    table.to_csv(path, index=False)
    page = read_page(with_ensemble.root)
    assert "missing" not in page.text and "By unit kind" not in page.text
    table.loc[0, "unit_kind"] = "weight"
    table.to_csv(path, index=False)
    assert "missingamount" in read_page(with_ensemble.root).text


def test_without_a_test_table(workspace):
    workspace.path("prepared", split="test").unlink()
    catalog = read_json(workspace.path("catalog"))
    del catalog["test"]
    write_json(workspace.path("catalog"), catalog)
    write_member(workspace, "only", 0.3)
    page = read_page(workspace.root)
    assert "SMAPE of only in percent" in page.text


def test_categories_and_gates_and_curves(with_ensemble):
    workspace = with_ensemble
    path = workspace.path("prepared", split="train")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["feature_brand"] = [f"brand{row % 15}" for row in range(len(table))]
    table.loc[0, "feature_brand"] = ""
    table.to_csv(path, index=False)
    catalog = read_json(workspace.path("catalog"))
    write_json(workspace.path("catalog"), catalog | {"features": {"brand": "category"}})
    run = workspace.path("run", name="fusion") / "fold_0"
    run.mkdir(parents=True)
    (run / "gate_by_price.csv").write_text("price_bin,rows,expert_0,expert_1\n$0-5,7,0.25,0.75\n")
    lines = ['{"step": 1, "epoch": 1, "seconds": 3.5, "train/loss": 2.0, "stop/smape": 50.0}']
    lines += ['{"step": 2, "epoch": 2, "seconds": 3.5, "train/loss": 1.0, "stop/smape": 40.0}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = read_page(workspace.root)
    assert "By brand" in page.text and "3 others" in page.text and "not stated" in page.text
    assert "fusion/fold_0" in page.text and "expert 1" in page.text
    assert [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a][-2:] == [
        "SMAPE, %",
        "loss",
    ]
    assert "seconds" not in page.text
