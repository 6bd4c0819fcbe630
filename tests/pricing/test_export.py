import shutil

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.tables import read_any
from contracts.workspace import Workspace
from pricing import PriceModel, export


@pytest.fixture(scope="module")
def exported(word_system, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "system"
    export.main(["--model", str(word_system), "--to", str(target)])
    return target


@pytest.fixture(scope="module")
def raw(sample_workspace):
    return read_any(sample_workspace / "catalogue" / "test.csv")


def test_an_export_prices_like_its_workspace_from_anywhere(exported, word_system, raw, tmp_path, monkeypatch):
    moved = shutil.copytree(exported, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    model = PriceModel.from_pretrained(moved, device="cpu")
    here = PriceModel.load(word_system, device="cpu")
    np.testing.assert_allclose(model.predict(raw)["price"], here.predict(raw)["price"], rtol=1e-5)
    nearest = model.explain(raw.iloc[[0]]).known_products
    assert nearest.equals(here.explain(raw.iloc[[0]]).known_products)


def test_the_card_says_what_a_stranger_must_know(exported):
    card = (exported / "README.md").read_text()
    score = read_json(exported / "checkpoints" / "ensemble" / "model.json")["score"]
    assert f"**{score['smape']:.2f} ± {score['standard_error']:.2f} SMAPE**" in card
    assert f"{score['coverage']['80%']:.1%} at nominal 80%" in card
    assert "priced by models that were fitted without it" in card
    for part in (
        "license: other",
        "400 products",
        "words_mlp",
        "frozen_text",
        "## Limits",
        "`catalog_content`",
    ):
        assert part in card


def test_a_leaked_score_is_called_leaked(copy_of, word_system, tmp_path):
    root = copy_of(word_system)
    path = root / "checkpoints" / "ensemble" / "model.json"
    content = read_json(path)
    content["score"]["leaked_smape"] = content["score"].pop("smape")
    write_json(path, content)
    assert "This number is leaked" in (export.export(root, tmp_path / "out") / "README.md").read_text()


def test_known_products_can_stay_at_home(word_system, tmp_path, raw):
    target = tmp_path / "system"
    export.main(["--model", str(word_system), "--to", str(target), "--no-known-products"])
    assert not list((target / "data").glob("*.csv"))
    assert not list((target / "data").rglob("*.pkl"))
    assert "not included in this folder" in (target / "README.md").read_text()
    explained = PriceModel.load(target, device="cpu").explain(raw.iloc[[0]])
    assert len(explained.known_products) == 0


def test_another_version_is_refused(exported, tmp_path):
    other = shutil.copytree(exported, tmp_path / "other")
    write_json(other / "pricing.json", {"format": 99})
    with pytest.raises(InputError, match="pricing.json: format 99, this version reads 1"):
        PriceModel.load(other)


def test_a_folder_that_exists_is_refused_and_a_failure_leaves_nothing(word_system, copy_of, tmp_path):
    target = tmp_path / "system"
    target.mkdir()
    with pytest.raises(InputError, match="system: exists already"):
        export.export(word_system, target)
    export.export(word_system, target, overwrite=True)
    assert (target / "pricing.json").is_file()

    root = copy_of(word_system)
    shutil.rmtree(root / "checkpoints" / "frozen")
    with pytest.raises(InputError, match="encoder of the embedding frozen_text is missing"):
        export.export(root, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_that_is_no_export_is_never_replaced(word_system, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="home: is no earlier export, so it is not replaced"):
        export.export(word_system, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_local_pretrained_model_is_brought_along(exported, word_system, pretrained, raw):
    """The encoder's folder is gone when the export is opened, as it is on another machine."""
    expected = PriceModel.load(word_system, device="cpu").predict(raw)["price"]
    hidden = pretrained.rename(pretrained.with_name("hidden"))
    try:
        with pytest.raises(InputError, match="no such local folder"):
            PriceModel.load(word_system)
        priced = PriceModel.load(exported, device="cpu").predict(raw)["price"]
    finally:
        hidden.rename(pretrained)
    np.testing.assert_allclose(priced, expected, rtol=1e-5)


def test_pictures_and_both_towers_survive_the_export(picture_system, raw, tmp_path):
    model = PriceModel.load(export.export(picture_system, tmp_path / "system"), device="cpu")
    here = PriceModel.load(picture_system, device="cpu")
    priced = model.predict(raw, images=here.images)
    assert priced.equals(here.predict(raw))
    assert model.predict(raw)["missing"].str.contains("picture").all()


def test_a_name_that_is_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        PriceModel.load(tmp_path / "absent")


def test_the_adapter_of_an_export_opens_as_a_sentence_transformer(
    copy_of, word_system, pretrained, raw, tmp_path, monkeypatch
):
    """Its base is a local folder, which the export brings along; here it lies elsewhere, as on another machine."""
    from sentence_transformers import SentenceTransformer

    from qwen3_finetune import train
    from qwen3_finetune.encoder import Encoder

    root = copy_of(word_system)
    flags = ["--model", str(pretrained), "--epochs", "1", "--max-length", "32", "--lr", "1e-2"]
    train.main([*flags, "--run", "lora", "--device", "cpu", "--workspace", str(root)])
    path = root / "checkpoints" / "ensemble" / "model.json"
    member = {"name": "lora", "stage": "qwen3_finetune", "run": "lora"}
    write_json(path, {**read_json(path), "members": [member], "weights": [1.0]})
    moved = export.export(root, tmp_path / "system").rename(tmp_path / "moved")

    monkeypatch.chdir(moved)
    hidden = pretrained.rename(pretrained.with_name("hidden"))
    try:
        opened = SentenceTransformer("checkpoints/lora/adapter", device="cpu").encode(["Green tea", "Rice"])
        priced = PriceModel.load(moved, device="cpu").predict(raw)["price"]
    finally:
        hidden.rename(pretrained)
    table = Workspace(root).prepared("test").head(2).assign(text=["Green tea", "Rice"])
    expected = Encoder.open(root / "checkpoints" / "lora", device="cpu").encode(table).embeddings
    np.testing.assert_allclose(opened, expected[:, :-3], atol=1e-5)
    np.testing.assert_allclose(priced, PriceModel.load(root, device="cpu").predict(raw)["price"], rtol=1e-5)
