"""Which column of a table is what, and the rows of a table as texts, fields and targets.

Legend: N rows, K classes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from contracts.catalog import FEATURE, parse_price
from contracts.errors import InputError, listed

TRUE, FALSE = {"true", "yes", "t", "y"}, {"false", "no", "f", "n"}
"""How a boolean field may be written; 1 and 0 are numbers anyway."""
FEWEST_PER_CLASS = 2
"""Rows that a class must have: with one, it could be fitted or scored but not both."""
LARGEST_YAML = 100_000
"""Bytes; a file of columns is a few lines."""


@dataclass(frozen=True)
class ColumnRoles:
    """The yaml file: columns of the table by what they are."""

    text: tuple[str, ...]
    """each cell one long text, or a JSON list of messages"""
    target: str
    task: Literal["classification", "regression"] = "classification"
    id: str = ""
    """empty: rows are numbered"""
    group: str = ""
    """rows with one value, such as one product or one dialogue, are never separated by a fold"""
    numeric: tuple[str, ...] = ()
    """numbers and booleans"""
    category: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> ColumnRoles:
        """Read the yaml file. Raises InputError for a key that is not known, or a column with two roles."""
        if not path.is_file():
            raise InputError(f"{path}: no such file; it says which column is which (text_tabular/README.md)")
        if path.stat().st_size > LARGEST_YAML:
            raise InputError(f"{path}: over {LARGEST_YAML} bytes; a file of columns has a few lines")
        try:
            content = yaml.load(path.read_text("utf-8"), Loader=_PlainYaml)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as yaml ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected lines such as `target: department`")
        return cls.of(content, path)

    @classmethod
    def of(cls, content: dict[str, Any], source: Path | str) -> ColumnRoles:
        """From the mapping of the yaml file, or of a finished run's columns.json."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise InputError(
                f"{source}: {', '.join(map(str, unknown))} is no key; choose from {', '.join(known)}"
            )
        if not content.get("target"):
            raise InputError(f"{source}: no target; name the column to predict")
        values = dict(content)
        for name in ("text", "numeric", "category"):
            columns = values.get(name) or ()
            values[name] = (columns,) if isinstance(columns, str) else tuple(map(str, columns))
        roles = cls(**values)
        if roles.task not in ("classification", "regression"):
            raise InputError(f"{source}: task {roles.task!r}: write classification or regression")
        if not roles.text and not roles.fields:
            raise InputError(f"{source}: neither a text column nor a field to predict {roles.target} from")
        read = [*roles.text, *roles.fields, roles.target]
        if repeated := sorted({column for column in read if read.count(column) > 1}):
            raise InputError(f"{source}: column {', '.join(repeated)} has two roles")
        return roles

    @property
    def fields(self) -> tuple[str, ...]:
        return self.numeric + self.category

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _PlainYaml(yaml.SafeLoader):
    """Yaml without aliases: ten nested ones make a file of 600 bytes into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


@dataclass
class Rows:
    """N rows of a table, read by the roles of its columns."""

    ids: np.ndarray
    """(N,) str"""
    messages: list[list[str]]
    """N lists of messages; empty where a row has no text"""
    fields: pd.DataFrame
    """(N, fields): feature_<name>, float64 for numbers (NaN where absent), text for categories ("" where absent)"""
    target: pd.Series | None
    """(N,) as written; None where the table has no such column"""
    groups: pd.Series
    """(N,) str; "" belongs to no group"""

    def __len__(self) -> int:
        return len(self.ids)


def read_rows(table: pd.DataFrame, roles: ColumnRoles, *, source: str, with_target: bool) -> Rows:
    """Split a table of texts (every column str) into what a model reads.

    Raises:
        InputError: a column is missing, the table has no rows, an id occurs twice in training, or a number field is
            no number.
    """
    wanted = [*roles.text, *roles.fields]
    wanted += [roles.id] if roles.id else []
    wanted += [roles.target, *([roles.group] if roles.group else [])] if with_target else []
    if missing := [column for column in wanted if column not in table.columns]:
        raise InputError(
            f"{source}: column {', '.join(missing)} is missing; found {', '.join(table.columns)}"
        )
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    ids = table[roles.id].str.strip() if roles.id else pd.Series(np.arange(len(table)).astype(str))
    if with_target and (repeated := ids.duplicated()).any():
        raise InputError(f"{source}: {roles.id} {listed(ids[repeated].tolist())} occurs twice")
    columns = {}
    for name in roles.numeric:
        columns[FEATURE + name] = _numbers(table[name], name, ids, source)
    for name in roles.category:
        columns[FEATURE + name] = table[name].str.strip()
    return Rows(
        ids=ids.to_numpy(np.str_),
        messages=[messages_of(cells) for cells in zip(*(table[name] for name in roles.text), strict=True)]
        if roles.text
        else [[] for _ in range(len(table))],
        fields=pd.DataFrame(columns, index=table.index),
        target=table[roles.target].str.strip() if roles.target in table else None,
        groups=table[roles.group] if roles.group in table else pd.Series("", index=table.index),
    )


def messages_of(cells: tuple[str, ...]) -> list[str]:
    """The messages of a row: of each text column the entries of its JSON list, or the cell as one message."""
    messages: list[str] = []
    for cell in cells:
        parsed = _json_list(cell)
        messages += [cell] if parsed is None else parsed
    return [message for message in messages if message.strip()]


def _json_list(cell: str) -> list[str] | None:
    if not cell.lstrip().startswith("["):
        return None
    try:
        content = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in content]


def _numbers(written: pd.Series, name: str, ids: pd.Series, source: str) -> np.ndarray:
    """(N,) float64 of a column of numbers or booleans, NaN where nothing is written."""
    words = written.str.strip().str.casefold()
    numbers = np.array([parse_price(word) if word else np.nan for word in words])
    numbers[words.isin(TRUE)] = 1
    numbers[words.isin(FALSE)] = 0
    unread = (words != "") & ~words.isin(["nan", "none", "null"]) & ~np.isfinite(numbers)
    if unread.any():
        first = written[unread].iloc[0][:40]
        raise InputError(
            f"{source}: {name} is no number in row {listed(ids[unread].tolist())} (first {first!r}); "
            "name the column under category instead"
        )
    return np.where(np.isfinite(numbers), numbers, np.nan)


def is_unlabelled(values: pd.Series) -> pd.Series:
    """(N,) bool: targets that say nothing."""
    return values.str.strip().str.casefold().isin(["", "nan"])


@dataclass
class Target:
    """What the outputs of a model mean."""

    task: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0
    """of a number, over the rows to fit"""

    @property
    def outputs(self) -> int:
        """Outputs of the model: one logit per class, one number."""
        return len(self.classes) if self.task == "classification" else 1

    @classmethod
    def fit(cls, roles: ColumnRoles, values: pd.Series, ids: np.ndarray, source: str) -> Target:
        """From the targets of all training rows.

        Raises:
            InputError: a row without a target, one class only, or a class with a single row.
        """
        if (empty := is_unlabelled(values)).any():
            raise InputError(
                f"{source}: {roles.target} is empty in row {listed(ids[empty].tolist())}; --skip-unlabelled leaves "
                "such rows out"
            )
        if roles.task == "regression":
            numbers = _numbers(values, roles.target, pd.Series(ids), source)
            return cls("regression", mean=float(numbers.mean()), deviation=float(numbers.std()) or 1.0)
        counts = values.value_counts()
        if len(counts) < 2:
            raise InputError(
                f"{source}: {roles.target} has one class only, {counts.index[0]!r}: nothing to learn"
            )
        if len(counts) > len(values) // 2:
            raise InputError(
                f"{source}: {roles.target} has {len(counts)} classes in {len(values)} rows; for numbers write "
                "task: regression"
            )
        if (rare := counts[counts < FEWEST_PER_CLASS]).size:
            raise InputError(
                f"{source}: class {listed(rare.index.tolist())} of {roles.target} has one row; join it to another "
                "class or leave the row out"
            )
        return cls("classification", classes=tuple(sorted(counts.index)))

    def encode(self, values: pd.Series, source: str = "table") -> np.ndarray:
        """(N,) int64 number of the class, or float32 standardised number.

        Raises InputError for a class that training did not have.
        """
        if self.task == "regression":
            numbers = _numbers(values, "the target", pd.Series(np.arange(len(values))), source)
            return ((numbers - self.mean) / self.deviation).astype(np.float32)
        numbers = pd.Index(self.classes).get_indexer(values)
        if (unseen := numbers < 0).any():
            classes = sorted(set(values[unseen]))
            raise InputError(f"{source}: class {listed(classes)} was not among the classes of training")
        return numbers.astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Target:
        return cls(**{**content, "classes": tuple(content["classes"])})
