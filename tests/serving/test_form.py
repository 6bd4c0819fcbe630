"""How the fields of a request become the text and facts that a model was trained on."""

import pytest
from fastapi import HTTPException

from contracts.catalog import ColumnMapping
from serving.form import Described, ProductForm
from serving.limits import validated

REFERENCE = ColumnMapping()
SHOP = ColumnMapping(
    id="sku", text=("name", "details"), features={"brand": "category", "weight (kg)": "number"}, decimal=","
)
PLAIN = ColumnMapping(text=("what",))
BRANDS = {"brand": ["Sonar", "Nimbus"]}


def described(mapping, **fields) -> Described:
    form = ProductForm(mapping, BRANDS, reads_pictures=True, picture_urls=False)
    return form.described(validated(form.schema, fields))


def refusal(mapping, **fields) -> str:
    with pytest.raises(HTTPException) as error:
        described(mapping, **fields)
    assert error.value.status_code == 422
    return error.value.detail


def test_parts_make_a_text_as_the_reference_task_has_it():
    product = described(
        REFERENCE,
        title="Green tea",
        bullets="organic\n\n20 bags",
        description="From Uji.",
        value=12,
        unit="Fl Oz",
    )
    assert product.text == (
        "Item Name: Green tea\nBullet Point 1: organic\nBullet Point 2: 20 bags\n"
        "Product Description: From Uji.\nValue: 12\nUnit: Fl Oz"
    )


def test_mapped_columns_are_joined_as_in_training():
    """`contracts.catalog` joins the columns of a table in the same way."""
    import pandas as pd

    from contracts.catalog import map_catalog

    row = {"sku": "1", "name": "Radio", "details": "small", "brand": "Sonar", "weight (kg)": "1,5"}
    table, _, _ = map_catalog(
        pd.DataFrame([row]), "table", ColumnMapping(id="sku", text=SHOP.text, image=None), with_price=False
    )
    assert described(SHOP, name="Radio", details="small").text == table["catalog_content"][0]


def test_title_stands_for_the_first_text_column():
    assert described(SHOP, title="Radio", details="small").text == "Item Name: Radio\ndetails: small"
    assert "leave one of them out" in refusal(SHOP, title="Radio", name="Radio")


def test_a_single_column_is_read_as_it_is():
    assert described(PLAIN, what="Radio").text == "Radio"
    assert described(PLAIN, title="Radio", value="2", unit="kg").text == "Radio\nValue: 2\nUnit: kg"


def test_a_whole_text_stays_what_it_is_and_has_no_parts_beside_it():
    assert described(SHOP, text="Any Text").text == "Any Text"
    assert "leave out details, or text" in refusal(SHOP, text="Any", details="x")


def test_facts_are_written_with_the_decimal_sign_of_the_model():
    product = described(SHOP, title="Radio", **{"weight (kg)": 1.5, "brand": "Sonar"})
    assert product.facts == {"weight (kg)": "1,5", "brand": "Sonar"}
    assert product.warnings == ()


def test_facts_that_say_nothing_to_the_model_are_named():
    product = described(SHOP, title="Radio", **{"weight (kg)": "heavy", "brand": "Other"})
    assert product.warnings == (
        "The model has not seen this brand before, so the price does without it.",
        "weight (kg) is not a number, so the price does without it.",
    )


@pytest.mark.parametrize("fields", [{}, {"title": " "}, {"title": ""}, {"brand": "Sonar"}, {"text": None}])
def test_nothing_said_is_refused_with_what_to_do(fields):
    assert refusal(SHOP, **fields) == "title: describe the product; a text, a title or a picture is needed"


def test_a_picture_alone_is_something_to_a_model_that_looks_at_pictures(tmp_path):
    form = ProductForm(SHOP, {}, reads_pictures=True, picture_urls=False)
    assert form.described(validated(form.schema, {}), picture=tmp_path / "a.jpg").text == ""
    form = ProductForm(SHOP, {}, reads_pictures=False, picture_urls=False)
    with pytest.raises(HTTPException):
        form.described(validated(form.schema, {}), picture=tmp_path / "a.jpg")
    product = form.described(validated(form.schema, {"title": "Radio"}), picture=tmp_path / "a.jpg")
    assert product.warnings == ("This model does not look at pictures.",)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, [], {}])
def test_a_value_is_text_or_a_finite_number(value):
    assert refusal(SHOP, title=value).startswith("title: ")


def test_an_unknown_field_is_named():
    assert refusal(SHOP, title="Radio", colour="red") == "colour: Extra inputs are not permitted"


def test_the_page_asks_for_the_columns_of_the_model():
    def asked(mapping, **options):
        form = ProductForm(mapping, BRANDS, **{"reads_pictures": False, "picture_urls": False, **options})
        return [(column.name, column.kind, column.values) for column in form.columns()]

    assert asked(SHOP) == [
        ("name", "text", None),
        ("details", "text", None),
        ("brand", "category", ["Sonar", "Nimbus"]),
        ("weight (kg)", "number", None),
    ]
    names = [name for name, _, _ in asked(REFERENCE, reads_pictures=True)]
    assert names == ["title", "bullets", "description", "value", "unit", "picture"]


def test_a_column_comes_before_a_field_of_the_same_name():
    mapping = ColumnMapping(text=("title", "text"), features={"unit": "category"})
    product = described(mapping, title="Radio", text="small", unit="each")
    assert product.text == "Item Name: Radio\ntext: small"
    assert product.facts == {"unit": "each"}
