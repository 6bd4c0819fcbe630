import gzip

import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.tables import iterate_table, read_any, table_writer, without_formulas

STRANGE = [
    "a\rb", "a\r\nb", "x\ny", 'q"uo"te,",', "\0nul", "NA", "", "  lead", '"', "\\", "007", "=1+1", "ümläut", "1.10",
]  # fmt: skip
ENDINGS = [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_any_text_survives_the_round_trip(tmp_path, ending):
    table = pd.DataFrame({"sku": [f"00{row}" for row in range(len(STRANGE))], "text": STRANGE, "price": 1.25})
    with table_writer(tmp_path / f"t{ending}") as writer:
        writer.write(table[:5])
        writer.write(table[5:])
    pd.testing.assert_frame_equal(
        read_any(tmp_path / f"t{ending}"), table.astype({"price": str}), check_dtype=False
    )
    chunks = list(iterate_table(tmp_path / f"t{ending}", rows=4))
    assert max(map(len, chunks)) <= 4
    assert [text for chunk in chunks for text in chunk["text"]] == STRANGE


def test_numbers_in_typed_formats_stay_as_they_are_written(tmp_path):
    lines = ['{"id": 12345678901234567890, "price": 1.10, "n": null}', '{"id": "007", "tags": ["a"]}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = read_any(tmp_path / "t.jsonl")
    assert table.to_dict("list") == {
        "id": ["12345678901234567890", "007"], "price": ["1.10", ""], "n": ["", ""], "tags": ["", '["a"]'],
    }  # fmt: skip
    pd.DataFrame({"id": [7, 8], "price": [1.5, None]}).to_parquet(tmp_path / "t.parquet")
    assert read_any(tmp_path / "t.parquet")["id"].tolist() == ["7", "8"]
    assert read_any(tmp_path / "t.parquet")["price"].tolist()[0] == "1.5"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"id;text\n1;a\n", "separated by semicolons, a .csv file's by commas"),
        ("t.csv", b"id\ttext\n1\ta\n", "separated by tabs"),
        ("t.tsv", b"id,text\n1,a\n", "separated by commas, a .tsv file's by tabs"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"id,text\n1,a,b\n2,c,d\n", "not a table"),
        ("t.csv", b"id,text\n1,a\n2,b,c\n", "not a table"),
        ("t.csv", b"id,id\n1,2\n", "column id occurs twice"),
        ("t.csv", b"id,text\n1,\xff\n", "not UTF-8"),
        ("t.csv.gz", b"id,text\n1,a\n", "gzip"),
        ("t.csv.gz", gzip.compress(b"id,text\n" + b"1,a\n" * 9999, mtime=0)[:40], "gzip"),
        ("t.jsonl", b'{"id": 1}\nnonsense\n', "line 2 is not JSON"),
        ("t.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("t.jsonl", b"\n\n", "the file is empty"),
        ("t.parquet", b"PAR1 no", "not a readable parquet file"),
        ("t.xlsx", b"PK", "the format is not known"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_any(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_table_that_is_absent_or_has_no_rows(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_any(tmp_path / "absent.csv")
    (tmp_path / "t.csv").write_text("id,text\n")
    assert read_any(tmp_path / "t.csv").columns.tolist() == ["id", "text"]
    pd.DataFrame({"id": [], "text": []}).to_parquet(tmp_path / "t.parquet")
    assert read_any(tmp_path / "t.parquet").columns.tolist() == ["id", "text"]


def test_nothing_is_left_of_a_table_whose_writing_failed(tmp_path):
    with pytest.raises(RuntimeError), table_writer(tmp_path / "t.parquet") as writer:
        writer.write(pd.DataFrame({"id": ["1"]}))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_cell_of_a_table_for_people_is_a_formula():
    table = pd.DataFrame(
        {"id": ["=1+1", "+1", "-1", "@a", "\tb", "\rc", "plain", "a=b"], "price": [-1.0] * 8}
    )
    shown = without_formulas(table)
    assert shown["id"].tolist() == ["'=1+1", "'+1", "'-1", "'@a", "'\tb", "'\rc", "plain", "a=b"]
    assert shown["price"].tolist() == [-1.0] * 8
    assert table["id"].iloc[0] == "=1+1"
