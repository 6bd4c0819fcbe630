import numpy as np
import pandas as pd
import pytest

from contracts.catalog import ColumnMapping, map_catalog, parse_price, read_catalog
from contracts.errors import InputError

HEADER = "sample_id,catalog_content,image_link,price\n"


def write(tmp_path, body, header=HEADER):
    path = tmp_path / "train.csv"
    path.write_bytes((header + body).encode() if isinstance(body, str) else header.encode() + body)
    return path


def refused(path, *words, **options):
    with pytest.raises(InputError) as caught:
        read_catalog(path, with_price=True, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("train.csv", *words):
        assert word in message


def test_ids_and_texts_stay_as_written(tmp_path):
    path = write(tmp_path, '007,NA,,1.5\n7,"None, null",http://x/a.jpg,2\n')
    table, report = read_catalog(path, with_price=True)
    assert table["sample_id"].tolist() == ["007", "7"]
    assert table["catalog_content"].tolist() == ["NA", "None, null"]
    assert table["price"].tolist() == [1.5, 2.0]
    assert (report.rows, report.without_image_link) == (2, 1)


@pytest.mark.parametrize("price", ["abc", "inf", "-inf", "nan", "", "0", "-3.5"])
def test_bad_price_is_listed_or_skipped(tmp_path, price):
    path = write(tmp_path, f"a1,x,,5\nb2,y,,{price}\n")
    refused(path, "b2", repr(price), "--skip-bad-prices")
    table, report = read_catalog(path, with_price=True, skip_bad_prices=True)
    assert table["sample_id"].tolist() == ["a1"]
    assert report.bad_prices_skipped == {"b2": price}


def test_no_usable_price_at_all(tmp_path):
    refused(write(tmp_path, "a,x,,0\n"), "no row has a usable price", skip_bad_prices=True)


def test_identical_duplicates_are_dropped_with_a_count(tmp_path):
    table, report = read_catalog(write(tmp_path, "a,x,,5\na,x,,5\nb,y,,6\n"), with_price=True)
    assert (len(table), report.identical_duplicates_dropped) == (2, 1)


def test_conflicting_duplicates_are_refused(tmp_path):
    refused(write(tmp_path, "a,x,,5\na,x,,6\n"), "different contents", "a")


def test_table_problems(tmp_path):
    refused(write(tmp_path, ""), "no rows")
    refused(write(tmp_path, "a,x,5\n", "sample_id,catalog_content,price\n"), "image_link")
    refused(write(tmp_path, "", ""), "empty")
    refused(write(tmp_path, b"a,\xff\xfe,,5\n"), "UTF-8")
    refused(write(tmp_path, " ,x,,5\n"), "empty sample_id", "row 1")
    refused(tmp_path / "absent" / "train.csv", "no such file")


def test_test_table_needs_no_price(tmp_path):
    path = write(tmp_path, "a,x,\n", "sample_id,catalog_content,image_link\n")
    table, _ = read_catalog(path, with_price=False)
    assert "price" not in table


@pytest.mark.parametrize(
    ("written", "decimal", "price"),
    [
        ("$4.89", ".", 4.89), ("1,312.00", ".", 1312.0), ("4,89 €", ",", 4.89), ("1.312,50 €", ",", 1312.5),
        ("USD 12", ".", 12.0), ("1 312,00", ",", 1312.0), ("1'312.50", ".", 1312.5), ("1e3", ".", 1000.0),
        (".99", ".", 0.99), ("12.", ".", 12.0), ("-3.5", ".", -3.5), ("1\u00a0312,00\u00a0€", ",", 1312.0),
    ],
)  # fmt: skip
def test_prices_as_people_write_them(written, decimal, price):
    assert parse_price(written, decimal) == pytest.approx(price)


@pytest.mark.parametrize(
    ("written", "decimal"),
    [
        ("4,89", "."),
        ("4.89", ","),
        ("1.2.3", "."),
        ("12-15", "."),
        ("free", "."),
        ("", "."),
        ("$", "."),
        ("1,31,200.00", "."),
    ],
)
def test_what_is_no_price_is_not_guessed_at(written, decimal):
    assert np.isnan(parse_price(written, decimal))


ELECTRONICS = pd.DataFrame(
    {
        "sku": ["007", "8"],
        "title": ["Camera", "Radio"],
        "description": ["12 megapixels", ""],
        "brand": ["Sony", "Bosch"],
        "weight_kg": ["0.4", "1,200.5"],
        "sell_price": ["$199.00", "49"],
    }
)


def test_columns_of_any_name_are_mapped_and_texts_joined_with_their_names():
    mapping = ColumnMapping.parse(
        ["id=sku", "text=title,description", "price=sell_price"], features=["weight_kg", "brand"]
    )
    table, mapping, report = map_catalog(ELECTRONICS, "shop.parquet", mapping, with_price=True)
    assert table["sample_id"].tolist() == ["007", "8"]
    assert table["catalog_content"].tolist() == [
        "Item Name: Camera\ndescription: 12 megapixels",
        "Item Name: Radio",
    ]
    assert table["image_link"].tolist() == ["", ""]
    assert table["price"].tolist() == [199.0, 49.0]
    assert mapping.features == {"weight_kg": "number", "brand": "category"}
    assert table["feature_weight_kg"].tolist() == [0.4, 1200.5]
    assert table["feature_brand"].tolist() == ["Sony", "Bosch"]
    assert report.rows == 2
    assert ColumnMapping.from_json(mapping.to_json()) == mapping


def test_a_further_table_keeps_the_kinds_of_the_training_table():
    mapping = ColumnMapping(
        id="sku", text=("title",), image=None, features={"weight_kg": "number", "brand": "category"}
    )
    new = ELECTRONICS.assign(weight_kg=["heavy", ""], brand=["1", "2"])
    table, same, report = map_catalog(new, "new.csv", mapping, with_price=False)
    assert same.features == mapping.features
    assert table["feature_weight_kg"].isna().all() and report.unread_features == {"weight_kg": 1}
    assert table["feature_brand"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["id=sku", "id=ean"], "two columns claim to be the id: sku, ean"),
        (["id=sku", "text=sku"], "column sku has two roles"),
        (["weight=kg"], "write id=, text=, price= or image="),
        (["id"], "write id="),
        (["text=,"], "write id="),
    ],
)
def test_a_mapping_that_cannot_be(columns, message):
    with pytest.raises(InputError, match=message):
        ColumnMapping.parse(columns)


def test_an_unmapped_column_is_named_with_those_that_exist():
    mapping = ColumnMapping.parse(["id=sku", "text=name"])
    with pytest.raises(InputError, match="shop.csv: column name is missing; found sku, title.*--columns"):
        map_catalog(ELECTRONICS, "shop.csv", mapping, with_price=False)


def test_a_decimal_comma_is_asked_for_by_name(tmp_path):
    refused(write(tmp_path, 'a1,x,,"4,89"\n'), "a1 ('4,89')", "--decimal ,")
    table, _ = read_catalog(tmp_path / "train.csv", with_price=True, mapping=ColumnMapping(decimal=","))
    assert table["price"].tolist() == [4.89]
