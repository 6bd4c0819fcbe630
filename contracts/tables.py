"""Tables in the formats that people keep them in, read and written whole or piece by piece.

The format follows from the ending: .csv, .tsv, .jsonl (each also .gz) and .parquet. Every value is read as text, as it
is written, so that the id 007 and a product named "NA" stay what they are; an absent value is "".
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from contracts.errors import InputError
from contracts.files import atomic_write

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
CHUNK_ROWS = 65_536
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""With these, a spreadsheet takes a cell for a formula."""


def table_format(path: Path | str) -> str:
    """The ending that says how a table is stored, without .gz. Raises InputError for one that is not known."""
    path = Path(path)
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending.lower() not in FORMATS or (path.suffix == ".gz" and ending == ".parquet"):
        known = ", ".join(FORMATS)
        raise InputError(
            f"{path}: the format is not known; a table ends in {known} (a text one perhaps in .gz)"
        )
    return ending.lower()


def read_any(path: Path | str) -> pd.DataFrame:
    """The whole table, every column text. Raises InputError naming the file for anything that is no table."""
    chunks = list(iterate_table(path))
    return pd.concat(chunks, ignore_index=True) if len(chunks) > 1 else chunks[0]


def iterate_table(path: Path | str, rows: int = CHUNK_ROWS) -> Iterator[pd.DataFrame]:
    """The table in pieces of at most `rows` rows; at least one piece, which may be empty but has the columns."""
    path = Path(path)
    readers = {
        ".csv": _iterate_text,
        ".tsv": _iterate_text,
        ".jsonl": _iterate_jsonl,
        ".parquet": _iterate_parquet,
    }
    reader = readers[table_format(path)]
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    yield from reader(path, rows)


def _check_columns(path: Path, columns: list[str]) -> None:
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise InputError(f"{path}: column {', '.join(repeated)} occurs twice")
    if len(columns) != 1 or table_format(path) not in DELIMITERS:
        return
    expected = DELIMITERS[table_format(path)]
    for delimiter, name in OTHER_DELIMITERS.items():
        if delimiter != expected and delimiter in columns[0]:
            ending = table_format(path)
            raise InputError(
                f"{path}: its columns are separated by {name}, a {ending} file's by {OTHER_DELIMITERS[expected]}; "
                "save it with the right separator or give it the right ending"
            )


def _iterate_text(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    options = {
        "sep": DELIMITERS[table_format(path)],
        "dtype": str,
        "keep_default_na": False,
        "encoding": "utf-8",
    }
    try:
        # pandas renames a column that occurs twice, so the header is looked at by itself
        header = pd.read_csv(path, header=None, nrows=1, **options)
        _check_columns(path, header.iloc[0].tolist())
        with warnings.catch_warnings():
            # pandas only warns when lines have more fields than the header, and drops the surplus
            warnings.simplefilter("error", pd.errors.ParserWarning)
            reader = pd.read_csv(path, index_col=False, chunksize=rows, **options)
            with reader:
                for chunk in reader:
                    yield chunk.fillna("").reset_index(drop=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InputError(f"{path}: not a table ({' '.join(str(error).split())})") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from None


def _iterate_jsonl(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    columns: list[str] = []
    try:
        with _open_text(path) as file:
            numbered = enumerate(file, 1)
            while lines := list(itertools.islice(numbered, rows)):
                records = [_record(path, number, line) for number, line in lines if line.strip()]
                for record in records:
                    columns += [column for column in record if column not in columns]
                yield pd.DataFrame(records, columns=columns, dtype=str).fillna("")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from None
    if not columns:
        raise InputError(f"{path}: the file is empty")


def _record(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        # numbers as they are written: 1.10 stays 1.10, and a long id keeps every digit
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: line {number} is not a JSON object")
    return {key: _as_text(value) for key, value in record.items()}


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, (bool, list, dict)):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _iterate_parquet(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        empty = pd.DataFrame(columns=file.schema_arrow.names, dtype=str)
        some = False
        for batch in file.iter_batches(batch_size=rows):
            some = True
            yield pd.DataFrame({name: _parquet_text(batch.column(name)) for name in batch.schema.names})
        if not some:
            yield empty
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({' '.join(str(error).split())[:160]})"
        ) from None


def _parquet_text(column: Any) -> list[str]:
    return [_as_text(value) for value in column.to_pylist()]


@contextmanager
def table_writer(path: Path | str) -> Iterator[TableWriter]:
    """A writer of the format that the ending names; the file appears, complete, when the block ends without error."""
    path = Path(path)
    ending = table_format(path)
    zipped = path.suffix == ".gz"
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(path, "wb" if zipped or ending == ".parquet" else "w"))
        if zipped:
            file = stack.enter_context(gzip.open(file, "wt", encoding="utf-8", newline=""))
        writer = TableWriter(file, ending)
        stack.callback(writer.close)
        yield writer


class TableWriter:
    """Writes pieces of one table, all with the same columns."""

    def __init__(self, file: IO[Any], ending: str):
        self.file = file
        self.ending = ending
        self._parquet: Any = None
        self._first = True

    def write(self, chunk: pd.DataFrame) -> None:
        if self.ending == ".parquet":
            self._write_parquet(chunk)
        elif self.ending == ".jsonl":
            chunk.to_json(self.file, orient="records", lines=True, force_ascii=False)
        else:
            # text is quoted: a bare carriage return or a NUL would end a line that is not
            chunk.to_csv(
                self.file, sep=DELIMITERS[self.ending], index=False, header=self._first, lineterminator="\n",
                quoting=csv.QUOTE_NONNUMERIC,
            )  # fmt: skip
        self._first = False

    def _write_parquet(self, chunk: pd.DataFrame) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        table = arrow.Table.from_pandas(chunk, preserve_index=False)
        if self._parquet is None:
            self._parquet = parquet.ParquetWriter(self.file, table.schema)
        self._parquet.write_table(table.cast(self._parquet.schema))

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """A copy for people: texts that a spreadsheet would run as a formula get an apostrophe in front.

    Spreadsheets do not show it. A table that programs read again must not be changed so.
    """
    table = table.copy()
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            is_formula = table[name].astype(str).str.startswith(FORMULA)
            table[name] = table[name].mask(is_formula, "'" + table[name].astype(str))
    return table


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
