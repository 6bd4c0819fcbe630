import pytest

from contracts.catalog import read_catalog
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
