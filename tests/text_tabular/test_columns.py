"""Reading a table by the roles of its columns; what is refused, and with which words."""

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from text_tabular.columns import ColumnRoles, Target, messages_of, read_rows

ROLES = ColumnRoles(
    text=("title", "review"), target="kind", id="id", numeric=("age", "is_new"), category=("shop",)
)


def table(**changed):
    columns = {
        "id": ["a", "b", "c", "d"],
        "title": ["Nice", "", "Fine", "Bad"],
        "review": ['["hello", "goodbye"]', "", "[not json", "It tore"],
        "age": ["39", "", "1,200", "n/a" if changed.get("bad") else "0"],
        "is_new": ["true", "No", "1", ""],
        "shop": ["x", "y", "", "x"],
        "kind": ["good", "good", "bad", "bad"],
    }
    columns |= {name: value for name, value in changed.items() if name != "bad"}
    return pd.DataFrame(columns)


def test_texts_fields_and_targets():
    rows = read_rows(table(), ROLES, source="t.csv", with_target=True)
    assert rows.messages == [["Nice", "hello", "goodbye"], [], ["Fine", "[not json"], ["Bad", "It tore"]]
    np.testing.assert_array_equal(rows.fields["feature_age"], [39, np.nan, 1200, 0])
    np.testing.assert_array_equal(rows.fields["feature_is_new"], [1, 0, 1, np.nan])
    assert rows.fields["feature_shop"].tolist() == ["x", "y", "", "x"]
    assert rows.target.tolist() == ["good", "good", "bad", "bad"]


def test_entries_of_a_message_list_that_are_no_texts_are_written_out():
    assert messages_of(('["a", {"b": 1}, " "]',)) == ["a", '{"b": 1}']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text: [review]\n", "no target"),
        ("target: kind\n", "neither a text column nor a field"),
        ("text: review\ntarget: review\n", "review has two roles"),
        ("text: review\ntarget: kind\ntask: ranking\n", "task 'ranking'"),
        ("text: review\ntarget: kind\nprice: 3\n", "price is no key"),
        ("- a\n- b\n", "expected lines such as"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "aliases are not read"),
        ("target: [\n", "not readable as yaml"),
        ("x" * 200_000, "over 100000 bytes"),
    ],
)
def test_a_file_of_columns_that_is_wrong(tmp_path, content, message):
    path = tmp_path / "columns.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        ColumnRoles.read(path)
    assert "\n" not in str(caught.value)


def test_a_table_that_does_not_fit_its_roles():
    with pytest.raises(InputError, match="column shop is missing; found id, title"):
        read_rows(table().drop(columns="shop"), ROLES, source="t.csv", with_target=True)
    with pytest.raises(InputError, match="age is no number in row d .*name the column under category"):
        read_rows(table(bad=True), ROLES, source="t.csv", with_target=True)
    with pytest.raises(InputError, match="id a occurs twice"):
        read_rows(table(id=["a", "a", "b", "c"]), ROLES, source="t.csv", with_target=True)
    with pytest.raises(InputError, match="no rows"):
        read_rows(table().head(0), ROLES, source="t.csv", with_target=True)
    without_target = read_rows(table().drop(columns="kind"), ROLES, source="t.csv", with_target=False)
    assert without_target.target is None


def fit(values, roles=ROLES):
    values = pd.Series(values)
    return Target.fit(roles, values, np.arange(len(values)).astype(str), "t.csv")


def test_classes_are_numbered_by_name_and_an_unknown_one_is_named():
    target = fit(["no", "yes", "yes", "no"])
    assert target.classes == ("no", "yes")
    assert target.encode(pd.Series(["yes", "no"])).tolist() == [1, 0]
    with pytest.raises(InputError, match="class maybe was not among the classes of training"):
        target.encode(pd.Series(["maybe", "no"]))
    assert Target.from_json(target.to_json()) == target


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "a", "", "b"], "kind is empty in row 2"),
        (["a", "NaN", "b", "b"], "kind is empty in row 1"),
        (["a", "a", "a", "a"], "one class only, 'a'"),
        (["a", "a", "a", "a", "b"], "class b of kind has one row"),
        (["1.5", "2.5", "3.5", "4.5"], "4 classes in 4 rows; for numbers write task: regression"),
    ],
)
def test_targets_that_nothing_can_be_learnt_from(values, message):
    with pytest.raises(InputError, match=message):
        fit(values)


def test_numbers_are_standardised():
    roles = ColumnRoles(text=("review",), target="kind", task="regression")
    target = fit(["1", "3", "5"], roles)
    assert (target.mean, target.outputs) == (3, 1)
    np.testing.assert_allclose(target.encode(pd.Series(["3", "5"])), [0, 2 / target.deviation])
    with pytest.raises(InputError, match="no number in row 1"):
        fit(["1", "cheap"], roles)
