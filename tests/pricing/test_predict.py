import gzip
import json

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.tables import read_any
from contracts.workspace import Workspace
from pricing import PriceModel, predict
from training.sealed import note_change

COLUMNS = ["sample_id", "price", "low_80", "high_80", "low_95", "high_95", "missing"]


@pytest.fixture(scope="module")
def model(word_system):
    return PriceModel.load(word_system, device="cpu")


@pytest.fixture(scope="module")
def raw(sample_workspace):
    """test.csv as its owner wrote it."""
    return read_any(sample_workspace / "catalogue" / "test.csv")


def same(prices, expected):
    np.testing.assert_allclose(prices, expected, rtol=1e-4)


def test_prices_are_those_of_the_workspace(model, raw, word_system):
    priced = model.predict(raw)
    assert list(priced.columns) == COLUMNS
    expected = pd.read_csv(word_system / "test_intervals.csv", dtype={"sample_id": str})
    assert priced["sample_id"].tolist() == expected["sample_id"].tolist()
    same(priced["price"], expected["price"])
    for bound in ("low_80", "high_80", "low_95", "high_95"):
        same(priced[bound], expected[f"{bound}%"])


def test_a_price_depends_on_no_other_row(model, raw):
    together = model.predict(raw)["price"].to_numpy()
    same(model.predict(raw[::-1])["price"].to_numpy()[::-1], together)
    alone = [model.predict(raw.iloc[[row]])["price"].iloc[0] for row in range(4)]
    same(alone, together[:4])
    prepared = Workspace(model.root).prepared("test")
    same(model.predict(prepared)["price"], together)


def test_repeated_ids_are_priced_row_by_row(model, raw):
    twice = pd.concat([raw.head(3), raw.head(1), raw.iloc[3:4].assign(sample_id=raw["sample_id"][0])])
    priced = model.predict(twice)
    assert priced["sample_id"].tolist() == twice["sample_id"].tolist()
    assert priced["price"][3] == pytest.approx(priced["price"][0])
    assert priced["price"][4] != pytest.approx(priced["price"][0])


def test_a_product_without_anything_has_a_price_that_says_so(model):
    table = pd.DataFrame({"sample_id": ["a", "b"], "catalog_content": ["", "Item Name: Blue Tea"]})
    priced = model.predict(table)
    assert priced["missing"].tolist() == ["text, amount", "amount"]
    assert (priced[["price", "low_80", "high_80"]] > 0).all(axis=None)


def test_values_that_are_no_text_and_no_column_of_ids(model):
    table = pd.DataFrame({"catalog_content": ["Item Name: Tea, 12 oz\nValue: 12.0\nUnit: Ounce", None, 7]})
    priced = model.predict(table)
    assert priced["sample_id"].tolist() == ["0", "1", "2"]
    assert priced["missing"].tolist() == ["", "text, amount", "amount"]


def test_training_rows_are_priced_by_the_models_of_all_rows(model):
    rows = Workspace(model.root).training_table().head(5)
    same(model.predict(rows)["price"], model.predict(rows.drop(columns=["fold", "price"]))["price"])


def test_an_unmapped_column_and_an_empty_table_are_one_line(model, raw):
    with pytest.raises(InputError, match="column catalog_content is missing"):
        model.predict(raw.rename(columns={"catalog_content": "body"}))
    with pytest.raises(InputError, match="no rows"):
        model.predict(raw.head(0))


@pytest.mark.slow
def test_a_text_of_ten_million_characters(model):
    text = "Item Name: Tea, 12 oz\n" + "green leaf tea " * 666_666
    long = pd.DataFrame({"sample_id": ["a"], "catalog_content": [text]})
    assert np.isfinite(model.predict(long)["price"]).all()


@pytest.mark.parametrize("ending", ["csv", "tsv.gz", "jsonl", "parquet"])
def test_the_command_reads_and_writes_any_format(word_system, raw, tmp_path, ending, model):
    source = tmp_path / f"new.{ending}"
    if ending == "parquet":
        raw.to_parquet(source)
    elif ending == "jsonl":
        raw.to_json(source, orient="records", lines=True)
    else:
        raw.to_csv(source, index=False, sep="\t" if ending.startswith("tsv") else ",")
    target = tmp_path / f"prices.{ending}"
    arguments = ["--model", str(word_system), "--input", str(source), "--output", str(target)]
    predict.main([*arguments, "--device", "cpu", "--rows-at-once", "25"])
    written = read_any(target)
    assert list(written.columns) == COLUMNS
    assert written["sample_id"].tolist() == raw["sample_id"].tolist()
    same(written["price"].astype(float), model.predict(raw)["price"])


def test_an_output_that_exists_stays_as_it_is(word_system, raw, tmp_path):
    raw.head(5).to_csv(tmp_path / "new.csv", index=False)
    target = tmp_path / "prices.csv"
    target.write_text("mine")
    arguments = ["--model", str(word_system), "--input", str(tmp_path / "new.csv"), "--output", str(target)]
    with pytest.raises(InputError, match="prices.csv: exists already; --overwrite"):
        predict.main(arguments)
    assert target.read_text() == "mine"
    predict.main([*arguments, "--overwrite", "--device", "cpu"])
    assert len(read_any(target)) == 5


def test_the_input_is_never_the_output(word_system, raw, tmp_path):
    raw.to_csv(tmp_path / "new.csv", index=False)
    before = (tmp_path / "new.csv").read_bytes()
    files = ["--input", str(tmp_path / "new.csv"), "--output", str(tmp_path / "new.csv")]
    with pytest.raises(InputError, match="new.csv: is the input itself"):
        predict.main(["--model", str(word_system), *files, "--overwrite"])
    assert (tmp_path / "new.csv").read_bytes() == before


def test_an_error_in_a_later_piece_leaves_nothing_behind(word_system, tmp_path):
    lines = [json.dumps({"sample_id": str(row), "catalog_content": "Item Name: Tea"}) for row in range(30)]
    with gzip.open(tmp_path / "new.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, "no json"]))
    source, target = str(tmp_path / "new.jsonl.gz"), str(tmp_path / "prices.csv")
    with pytest.raises(InputError, match="new.jsonl.gz: line 31 is not JSON"):
        predict.main(
            ["--model", str(word_system), "--input", source, "--output", target, "--rows-at-once", "10"]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl.gz"]


def test_a_file_without_ids_is_refused(word_system, raw, tmp_path):
    raw.drop(columns="sample_id").to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(InputError, match=r"new.csv: column sample_id \(the id\) is missing"):
        predict.main(
            ["--model", str(word_system), "--input", str(tmp_path / "new.csv")]
            + ["--output", str(tmp_path / "prices.csv")]
        )


def test_one_product_in_plain_words(word_system, capsys):
    predict.main(["--model", str(word_system), "--text", "Green Tea", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.startswith("price: $")
    assert "In 8 of 10 cases the true price lies between $" in printed
    assert "warning: no amount was understood" in printed
    assert "picture" not in printed  # this system reads none


def test_settings_that_contradict_each_other():
    with pytest.raises(InputError, match="choose one"):
        predict.main(["--text", "Tea", "--input", "new.csv"])
    with pytest.raises(InputError, match="give --input and --output"):
        predict.main(["--input", "new.csv"])


def test_pictures_are_read_and_their_absence_is_named(picture_system, raw, sample_workspace, capsys):
    model = PriceModel.load(picture_system, device="cpu")
    priced = model.predict(raw)
    expected = pd.read_csv(picture_system / "test_out.csv")["price"]
    same(priced["price"], expected)

    elsewhere = model.predict(raw, images=sample_workspace / "nowhere")
    assert elsewhere["missing"].str.contains("picture").all()
    seen = ~priced["missing"].str.contains("picture")
    assert seen.sum() > 50
    assert (elsewhere["price"][seen] != priced["price"][seen]).mean() > 0.9

    picture = next((sample_workspace / "catalogue" / "images").iterdir())
    arguments = ["--model", str(picture_system), "--text", "Tea", "--device", "cpu"]
    predict.main(arguments)
    assert "warning: no usable picture" in capsys.readouterr().out
    predict.main([*arguments, "--image", str(picture)])
    assert "picture" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no.jpg: no such file"):
        predict.main([*arguments, "--image", "no.jpg"])


def test_what_is_missing_is_named(copy_of, word_system):
    with pytest.raises(InputError, match="no fitted ensemble; run python -m ensemble.train"):
        PriceModel.load(word_system / "data")
    root = copy_of(word_system)
    (root / "checkpoints" / "frozen" / "COMPLETE").unlink()
    with pytest.raises(InputError, match="frozen: the encoder of the embedding frozen_text is missing"):
        PriceModel.load(root)
    (root / "checkpoints" / "words_mlp" / "COMPLETE").unlink()
    with pytest.raises(InputError, match="member words_mlp is missing"):
        PriceModel.load(root)


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("ensemble/model.json", {"schema": 99}, "model.json: schema 99, this version reads 1"),
        (
            "words_ridge_frozen_text/word_model.json",
            {"schema": 99},
            "word_model.json: schema 99, this version",
        ),
        ("frozen/settings.json", {"flash": True}, "frozen: made by another version of this program"),
    ],
)
def test_a_part_of_another_version_is_one_line(copy_of, word_system, file, changed, message):
    root = copy_of(word_system)
    path = root / "checkpoints" / file
    write_json(path, {**read_json(path), **changed})
    note_change(path)
    with pytest.raises(InputError, match=message) as caught:
        PriceModel.load(root, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_member_of_an_unknown_stage_is_named(copy_of, word_system):
    root = copy_of(word_system)
    path = root / "checkpoints" / "ensemble" / "model.json"
    content = read_json(path)
    content["members"][0]["stage"] = "elsewhere"
    write_json(path, content)
    with pytest.raises(InputError, match="stage elsewhere has no saved model that prices new products"):
        PriceModel.load(root)


def test_an_encoder_that_was_trained_again_is_refused(copy_of, word_system):
    root = copy_of(word_system)
    path = root / "checkpoints" / "frozen" / "head.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    note_change(path)
    with pytest.raises(InputError, match="embedding frozen_text was trained again"):
        PriceModel.load(root)


def test_columns_of_ones_own(copy_of, word_system, raw, model):
    """A catalogue whose text lies in two columns, with an id and a further number of its own names."""
    root = copy_of(word_system)
    path = root / "data" / "catalog.json"
    mapping = {"columns": {"id": "sku", "text": ["title", "brand"], "price": "eur", "image": None}}
    write_json(path, {**read_json(path), **mapping, "currency": "€"})
    table = pd.DataFrame({"sku": ["007"], "title": ["Green Tea, 12 oz"], "brand": ["Acme"]})
    own = PriceModel.load(root, device="cpu")
    priced = own.predict(table)
    assert priced["sample_id"].tolist() == ["007"]
    same_text = pd.DataFrame({"catalog_content": ["Item Name: Green Tea, 12 oz\nbrand: Acme"]})
    same(priced["price"], model.predict(same_text)["price"])
    with pytest.raises(InputError, match="column brand is missing"):
        own.predict(table.drop(columns="brand"))


def test_the_head_of_a_text_encoder_as_a_member(copy_of, word_system, raw):
    from qwen3_finetune import predict as predict_texts

    root = copy_of(word_system)
    predict_texts.main(["test", "--run", "frozen", "--workspace", str(root), "--device", "cpu"])
    expected = read_any(root / "predictions" / "frozen_test.csv")["log_price"].astype(float)
    path = root / "checkpoints" / "ensemble" / "model.json"
    member = {"name": "frozen", "stage": "qwen3_finetune", "run": "frozen"}
    write_json(path, {**read_json(path), "members": [member], "weights": [1.0]})
    same(PriceModel.load(root, device="cpu").predict(raw)["price"], np.expm1(expected))
