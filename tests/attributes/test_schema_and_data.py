"""Schema, listings and labels: what is read, and the one line for everything that is wrong."""

import pytest

from attributes.config import ListingSettings
from attributes.data import Listing, read_labels, read_listings, require_apart
from attributes.schema import Schema
from contracts.errors import InputError

SCHEMA = """verticals:
  buttons:
    tone: {question: "Which tone is it?", values: [ruby, jade, amber, onyx, pearl]}
    form: {values: {mono: [single, one], duo: [], trio: [], quad: []}}
    maker: {type: free}
    holes: {type: number}
"""


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return Schema.read(str(path))


@pytest.fixture
def table(write_csv, schema):
    path = write_csv("listings.csv", [{"sample_id": "a", "text": "A", "pictures": "1.png; 2.png"}])
    return read_listings(ListingSettings(listings=str(path)), schema)


@pytest.mark.parametrize("name", ["grocery_store", "silver_labels"])
def test_the_starters_are_read(name):
    assert Schema.read(name).columns()


def test_answers_are_counted_in_one_form(schema):
    form = schema.attribute("buttons", "form")
    holes = schema.attribute("buttons", "holes")
    maker = schema.attribute("buttons", "maker")
    assert form.canonical(' "One". ') == "mono"
    assert form.canonical("UNKNOWN") == "unknown"
    assert form.canonical("five") is None
    assert holes.canonical("4.0 holes") == "4"
    assert holes.canonical("many") is None
    assert maker.canonical("  Miller &  Co ") == "miller & co"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("verticals: [", "not readable as yaml"),
        ("other: 1", "needs `verticals:`"),
        ("verticals: {v: {a: {values: [yes, no]}}}", "write it in quotes"),
        ("verticals: {v: {a: {values: [unknown]}}}", "always allowed"),
        ("verticals: {v: {a: {values: {x: [z], y: [z]}}}}", "stands for two values"),
        ("verticals: {v: {a: {type: date}}}", "choose free or number"),
        ("verticals: {v: {a: {type: free, values: [x]}}}", "either values, or type"),
        ("verticals: {v: {a: {type: free, unit: g}}}", "no setting unit"),
    ],
)
def test_a_bad_schema_is_refused(tmp_path, text, said):
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        Schema.read(str(path))


def test_pictures_are_listed_and_limited(write_csv, schema):
    names = ";".join(f"{number}.png" for number in range(7))
    path = write_csv("listings.csv", [{"sample_id": "a", "pictures": names}])
    (listing,) = read_listings(ListingSettings(listings=str(path)), schema).listings
    assert listing.pictures == ("0.png", "1.png", "2.png", "3.png", "4.png")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ({"sample_id": "b", "attribute": "tone", "value": "ruby"}, "no listing .* sample_id b"),
        ({"sample_id": "a", "attribute": "size", "value": "ruby"}, "no attribute size"),
        ({"sample_id": "a", "attribute": "tone", "value": "pink"}, "'pink' of tone is not in the schema"),
        ({"sample_id": "a", "attribute": "tone"}, "no column value"),
    ],
)
def test_a_bad_label_is_refused(write_csv, table, schema, label, said):
    with pytest.raises(InputError, match=said):
        read_labels(write_csv("labels.csv", [label]), table, schema)


def test_no_labels_at_all_are_refused(tmp_path, table, schema):
    path = tmp_path / "labels.csv"
    path.write_text("sample_id,attribute,value\n")
    with pytest.raises(InputError, match="no labels"):
        read_labels(path, table, schema)


@pytest.mark.parametrize(
    "other",
    [
        Listing("a", "v", "other", ("other.png",)),
        Listing("b", "v", "Some  TEXT", ("other.png",)),
        Listing("b", "v", "other", ("x.png", "1.png")),
    ],
)
def test_one_product_on_two_sides_is_refused(other):
    first = Listing("a", "v", "some text", ("1.png",))
    with pytest.raises(InputError, match=r"\(test\) and listing a \(labelled\) have the same"):
        require_apart({"labelled": [first], "test": [other]})
    require_apart({"labelled": [first, other]})
