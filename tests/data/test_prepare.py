import json
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from contracts.errors import InputError
from contracts.predictions import write_in_input_order
from contracts.tables import table_writer
from contracts.workspace import Workspace
from data import prepare
from data.prepare import entity_name, image_names

HEADER = "sample_id,catalog_content,image_link"


def catalogue(tmp_path, train_rows=30, change=lambda row: None):
    """A small valid catalogue; `change` may edit a training row (dict) in place."""
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    rows = []
    for number in range(train_rows):
        row = {
            "sample_id": f"{number:03d}",
            "catalog_content": f"Item Name: Tea {number}\nValue: {number + 1}.0\nUnit: Ounce\n",
            "image_link": f"http://pictures.example/{number}.jpg",
            "price": f"{number + 1}.5",
        }
        change(row)
        rows.append(row)
    pd.DataFrame(rows).to_csv(source / "train.csv", index=False)
    pd.DataFrame(rows).drop(columns="price").head(5).to_csv(source / "test.csv", index=False)
    Image.new("RGB", (8, 8)).save(source / "images" / "0.jpg")
    return source


def run(tmp_path, source, *flags):
    prepare.main(["--data", str(source), "--workspace", str(tmp_path / "out"), *flags])
    return Workspace(tmp_path / "out")


def test_prepared_table_holds_what_the_stages_read(tmp_path):
    workspace = run(tmp_path, catalogue(tmp_path))
    train, test = workspace.prepared("train"), workspace.prepared("test")
    assert train["sample_id"].tolist()[:2] == ["000", "001"]
    assert train["entity_name"][0] == "Tea 0"
    assert train["text"][0] == "Tea 0 [SEP] Item Name: Tea 0\nValue: 1.0\nUnit: Ounce\n"
    assert train["image"][0] == "0.jpg"
    assert train[["unit_weight", "unit_volume"]].drop_duplicates().to_numpy().tolist() == [[1, 0]]
    assert train["total_amount"][1] == pytest.approx(2 * 28.3495, rel=1e-4)
    assert train["price"].tolist()[:2] == [1.5, 2.5]
    assert "price" not in test
    assert len(workspace.folds()) == 30
    report = json.loads(workspace.path("catalog").read_text())
    assert report["train"]["pictures_present"] == 1
    assert workspace.images_folder() == (tmp_path / "source" / "images").resolve()


def test_every_line_of_the_input_keeps_its_place(tmp_path):
    source = catalogue(tmp_path)
    test = pd.read_csv(source / "test.csv", dtype=str)
    pd.concat([test, test.iloc[[1, 1, 0]]]).to_csv(source / "test.csv", index=False)
    workspace = run(tmp_path, source)
    assert len(workspace.prepared("test")) == 5
    lines = ["000", "001", "002", "003", "004", "001", "001", "000"]
    assert workspace.input_ids("test").tolist() == lines

    prices = workspace.prepared("test")[["sample_id"]].assign(price=[1.0, 2.0, 3.0, 4.0, 5.0])
    write_in_input_order(workspace, "test", prices, tmp_path / "out.csv")
    written = pd.read_csv(tmp_path / "out.csv", dtype={"sample_id": str})
    assert written["sample_id"].tolist() == lines
    assert written["price"].tolist() == [1, 2, 3, 4, 5, 2, 2, 1]
    assert json.loads(workspace.path("catalog").read_text())["test"]["identical_duplicates_dropped"] == 3

    test.to_csv(source / "test.csv", index=False)
    assert run(tmp_path, source).input_ids("test").tolist() == lines[:5]


def test_a_submission_has_a_price_for_every_line(tmp_path):
    workspace = run(tmp_path, catalogue(tmp_path))
    prices = workspace.prepared("test")[["sample_id"]].assign(price=[1.0, float("inf"), 0.0, 4.0, 5.0])
    for given in (prices, prices.iloc[:1]):
        with pytest.raises(InputError, match="no price above 0 for sample_id 001, 002"):
            write_in_input_order(workspace, "test", given, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_link_that_is_none_costs_its_row_the_picture_and_nothing_else(tmp_path):
    def change(row):
        if row["sample_id"] == "003":
            row["image_link"] = "http://[bad"

    workspace = run(tmp_path, catalogue(tmp_path, change=change))
    assert len(workspace.prepared("train")) == 30


def test_product_named_na_survives(tmp_path):
    def change(row):
        if row["sample_id"] == "007":
            row["catalog_content"] = "NA"

    train = run(tmp_path, catalogue(tmp_path, change=change)).prepared("train").set_index("sample_id")
    assert train.loc["007", "entity_name"] == "NA"
    assert pd.isna(train.loc["007", "amount"])
    assert train.loc["007", "unit_kind"] == "none"


def test_nothing_is_written_when_test_csv_is_bad(tmp_path):
    source = catalogue(tmp_path)
    (source / "test.csv").write_text(HEADER + "\n")
    with pytest.raises(InputError, match="test.csv: the table has no rows"):
        run(tmp_path, source)
    assert not (tmp_path / "out").exists()


def test_bad_price_is_refused_then_skipped(tmp_path, capsys):
    def change(row):
        if row["sample_id"] == "003":
            row["price"] = "abc"

    source = catalogue(tmp_path, change=change)
    with pytest.raises(InputError, match="003 .'abc'."):
        run(tmp_path, source)
    workspace = run(tmp_path, source, "--skip-bad-prices")
    assert "003" not in set(workspace.prepared("train")["sample_id"])
    assert "1 skipped for their price: 003 ('abc')" in capsys.readouterr().out


def test_folds_are_the_same_each_time(tmp_path):
    source = catalogue(tmp_path)
    first = run(tmp_path, source).path("folds").read_bytes()
    assert run(tmp_path, source).path("folds").read_bytes() == first
    assert run(tmp_path, source, "--seed", "1").path("folds").read_bytes() != first


def test_as_a_command_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--data",
        str(tmp_path / "absent"),
        "--workspace",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path / 'absent' / 'train.csv'}: no such file, nor a table train in another format\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Item Name: Tea, 2 oz\nValue: 1", "Tea, 2 oz"),
        ("\n\nJust words\nmore", "Just words"),
        ("Item Name:\nBullet Point 1: x", ""),
        ("", ""),
        ("x" * 10**6, "x" * 500),
    ],
)
def test_entity_name(text, name):
    assert entity_name(text) == name


def test_image_names_are_safe_and_distinct():
    links = pd.Series(
        [
            "http://a/1.jpg",
            "http://a/1.jpg",
            "http://b/1.jpg",
            "",
            "http://a/2%20x.png",
            "http://a/..",
            "http://a/",
        ]
    )
    names = image_names(links)
    assert names[0] == names[1] != names[2]  # two pictures of one name do not become one
    assert names[3] == ""
    assert names[4] == "2 x.png"
    assert names[5] not in ("", "..") and names[6] != ""
    assert all("/" not in name for name in names)


def test_strange_texts_survive(tmp_path):
    strange = ["a\rb", "c\r\nd", "e\x00f", 'g "h", i', "=1+1", "\\", "NA"]
    source = catalogue(tmp_path)
    with table_writer(source / "train.csv") as writer:
        rows = pd.read_csv(source / "train.csv", dtype=str, keep_default_na=False, nrows=0)
        rows["sample_id"] = [f"{number:03d}" for number in range(30)]
        rows["catalog_content"] = [*strange, *(f"Tea {number}" for number in range(30 - len(strange)))]
        rows["price"] = "2.5"
        writer.write(rows.fillna(""))
    workspace = run(tmp_path, source)
    assert workspace.prepared("train")["catalog_content"].tolist()[: len(strange)] == strange
    assert len(workspace.training_table()) == 30


ELECTRONICS = ["id=sku", "text=title,description", "price=sell_price"]


def electronics(rows, first=0):
    return pd.DataFrame(
        {
            "sku": [f"{row:03d}" for row in range(first, first + rows)],
            "title": [f"Camera {row % 7} 500 g" for row in range(rows)],
            "description": [f"{row} megapixels" if row % 3 else "" for row in range(rows)],
            "brand": [["Sony", "Bosch"][row % 2] for row in range(rows)],
            "weight_kg": [f"{row / 10:.1f}" if row % 5 else "" for row in range(rows)],
            "sell_price": [f"${row + 1},000.50" for row in range(rows)],
        }
    )


@pytest.mark.parametrize("name", ["shop.parquet", "shop.tsv.gz", "shop.jsonl"])
def test_one_table_with_columns_of_its_own(tmp_path, name):
    with table_writer(tmp_path / name) as writer:
        writer.write(electronics(30))
    flags = ["--columns", *ELECTRONICS, "--features", "weight_kg", "brand", "--currency", "€"]
    workspace = run(tmp_path, tmp_path / name, *flags)
    train = workspace.training_table()
    assert train["price"].tolist()[:2] == [1000.5, 2000.5]
    assert train["entity_name"][1] == "Camera 1 500 g"
    assert train["catalog_content"][1] == "Item Name: Camera 1 500 g\ndescription: 1 megapixels"
    assert train["total_amount"].tolist()[:2] == [500, 500] and set(train["unit_kind"]) == {"weight"}
    assert train["feature_weight_kg"].isna().sum() == 6 and train["feature_weight_kg"][1] == 0.1
    assert train["feature_brand"].tolist()[:2] == ["Sony", "Bosch"]
    assert not workspace.path("prepared", split="test").exists()
    catalog = json.loads(workspace.path("catalog").read_text())
    assert catalog["currency"] == "€" and catalog["features"] == {"weight_kg": "number", "brand": "category"}


def test_a_further_table_is_read_by_the_same_columns(tmp_path):
    with table_writer(tmp_path / "shop.csv") as writer:
        writer.write(electronics(30))
    workspace = run(tmp_path, tmp_path / "shop.csv", "--columns", *ELECTRONICS, "--features", "weight_kg")
    with table_writer(tmp_path / "new.parquet") as writer:
        writer.write(electronics(4, first=900).drop(columns="sell_price"))
    prepare.main(
        ["--input", str(tmp_path / "new.parquet"), "--table", "new", "--workspace", str(workspace.root)]
    )
    new = workspace.prepared("new")
    assert new["sample_id"].tolist() == ["900", "901", "902", "903"]
    assert new["feature_weight_kg"].tolist()[1:] == [0.1, 0.2, 0.3]
    assert json.loads(workspace.path("catalog").read_text())["new"]["rows"] == 4
    assert len(workspace.training_table()) == 30


def test_pictures_of_a_further_table_take_no_name_that_is_taken(tmp_path):
    workspace = run(tmp_path, catalogue(tmp_path))
    new = pd.DataFrame({"sample_id": ["a", "b"], "catalog_content": ["x", "y"]})
    new["image_link"] = ["http://pictures.example/0.jpg", "http://elsewhere.example/0.jpg"]
    new.to_csv(tmp_path / "new.csv", index=False)
    prepare.main(["--input", str(tmp_path / "new.csv"), "--table", "new", "--workspace", str(workspace.root)])
    same, other = workspace.prepared("new")["image"]
    assert same == "0.jpg"
    assert other != "0.jpg" and other.endswith("_0.jpg")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "x.csv"], "--input and --table go together"),
        (["--table", "new"], "--input and --table go together"),
        (["--input", "x.csv", "--table", "train"], "give the priced table as --data FILE"),
        (["--input", "x.csv", "--table", "new", "--columns", "id=a"], "leave --columns out"),
        (["--input", "x.csv", "--table", "../new"], "catalog.json: no such file|use letters"),
        (["--decimal", ";"], "choose . or ,"),
        (["--input", "x.csv", "--table", "folds"], "uses this word itself"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        prepare.main([*flags, "--workspace", str(tmp_path)])


def test_a_table_in_two_formats_is_not_guessed_at(tmp_path):
    source = catalogue(tmp_path)
    pd.read_csv(source / "train.csv").to_parquet(source / "train.parquet")
    with pytest.raises(InputError, match="train is there twice: train.csv, train.parquet"):
        run(tmp_path, source)


def test_a_test_table_of_an_earlier_catalogue_is_not_priced_by_the_next(tmp_path):
    workspace = run(tmp_path, catalogue(tmp_path))
    before = workspace.path("prepared", split="train").read_bytes()
    with table_writer(tmp_path / "shop.csv") as writer:
        writer.write(electronics(30))
    with pytest.raises(InputError, match="prepared_test.csv: an earlier catalogue's"):
        run(tmp_path, tmp_path / "shop.csv", "--columns", *ELECTRONICS)
    assert workspace.path("prepared", split="train").read_bytes() == before
