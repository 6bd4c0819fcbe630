import json
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from contracts.errors import InputError
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
    assert done.stderr == f"error: {tmp_path / 'absent' / 'train.csv'}: no such file\n"
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
