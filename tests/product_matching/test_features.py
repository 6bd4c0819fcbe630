import numpy as np
import pandas as pd
import pytest

from product_matching.features import (
    NAMES,
    Profile,
    Vocabulary,
    compare,
    edit_similarity,
    model_codes,
    pair_features,
    profiles,
)
from product_matching.measures import Measure, read_measures

CAMERA = {"title": "Sony Cyber-shot 7.2 megapixel camera DSC-W120/P", "brand": "sony", "price": "199.99"}
SAME = {"title": "cybershot w120 pink 7.2mp", "brand": "", "model": "dscw120p", "price": "$149.00"}
OTHER = {"title": "sony cyber-shot 10 mp camera dsc-w170", "brand": "sony", "model": "dscw170", "price": ""}


def features(one: dict, other: dict) -> dict[str, float]:
    one_profile, other_profile = Profile.of(one), Profile.of(other)
    vocabulary = Vocabulary.of([Profile.of(record) for record in (CAMERA, SAME, OTHER)])
    return dict(zip(NAMES, compare(one_profile, other_profile, vocabulary), strict=True))


@pytest.mark.parametrize(
    ("text", "measures"),
    [
        ("1 tb drive", [("bytes", 1e6)]),
        ("1000gb drive", [("bytes", 1e6)]),
        ("7.2 megapixel", [("pixels", 7.2)]),
        ("13.5 ' portable", [("length", 343.0)]),
        ("2.0 cu . ft. oven", [("volume", 56600.0)]),
        ("dmp-bd35k and kx-tg1033s", []),  # numbers inside model codes
        ("8-port switch", [("ports", 8.0)]),
    ],
)
def test_measures(text, measures):
    assert read_measures(text) == [Measure(*measure) for measure in measures]


def test_model_codes_are_no_measures_and_no_years():
    assert model_codes("sony kdl-40v3000 1080p 320gb 2008 4x 130026147 w120") == [
        "kdl40v3000",
        "130026147",
        "w120",
    ]


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [("abcd", "abcd", 1.0), ("abcd", "abce", 0.75), ("kitten", "sitting", 1 - 3 / 7), ("", "ab", 0.0)],
)
def test_edit_similarity_by_hand(one, other, similarity):
    assert edit_similarity(one, other) == pytest.approx(similarity)


def test_a_model_number_is_found_however_it_is_written():
    found = features(CAMERA, SAME)
    assert found["code_same"] == 2 and found["code_length"] == len("dscw120p")
    assert found["measure_agree"] == 1 and found["measure_differ"] == 0
    assert found["price_ratio"] == pytest.approx(np.log(199.99 / 149), abs=1e-6)
    other = features(CAMERA, OTHER)
    assert other["code_same"] == 0 and 0.5 < other["code_edit"] < 1
    assert other["measure_agree"] == 0 and other["measure_differ"] == 1
    assert np.isnan(other["price_ratio"])  # one price is unknown


def test_swapped_sides_have_the_same_features():
    table = [
        CAMERA,
        SAME,
        OTHER,
        {"title": "x"},
        {"title": "ソニー カメラ DSC-W120"},
        {"title": "", "model": "?"},
    ]
    records = profiles(pd.DataFrame(table).fillna(""))
    vocabulary = Vocabulary.of(records)
    rows = np.array([(i, j) for i in range(len(records)) for j in range(len(records))])
    np.testing.assert_array_equal(
        pair_features(records, records, rows, vocabulary),
        pair_features(records, records, rows[:, ::-1], vocabulary),
    )


def test_other_scripts_and_full_width_forms_are_compared():
    found = features({"title": "ソニー　ＤＳＣ－Ｗ１２０"}, {"title": "ソニー dsc-w120"})
    assert found["code_same"] == 2 and found["title_letters"] > 0.9


def test_empty_and_very_long_records_have_features():
    long = {"title": "sony dsc-w120 " * 8000, "description": "٣ camera\0" * 10000, "price": "9" * 5000}
    for one, other in (({"title": ""}, {"title": ""}), (long, long), (long, {"title": ""})):
        values = np.array(list(features(one, other).values()))
        assert not np.isinf(values).any()


def test_rare_words_weigh_more():
    records = profiles(
        pd.DataFrame({"title": ["red camera", "blue camera", "green camera", "red phone w120x"]})
    )
    vocabulary = Vocabulary.of(records)
    assert vocabulary.rarity("w120x") > vocabulary.rarity("red") > vocabulary.rarity("camera") > 0
    assert vocabulary.rarity("unseen") == vocabulary.rarity("w120x")
