import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from product_matching.catalogue import check_catalogue, model_number, product_text, read_catalogue
from product_matching.pairs import Pairs, join_by_upc, main, normalise_upc, pair_files, read_pairs
from product_matching.triplets import mine_triplets, training_pairs


def catalogue(*records: dict[str, str]) -> pd.DataFrame:
    return check_catalogue(pd.DataFrame(list(records), dtype=str).fillna(""), "test catalogue")


def record(title: str, brand: str = "", model: str = "", price: str = "") -> str:
    return f"COL title VAL {title} COL brand VAL {brand} COL modelno VAL {model} COL price VAL {price} "


def write_pair_files(folder, train, valid=(), test=()) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("valid", valid), ("test", test)):
        lines = ["\t".join((record(left), record(right), str(label))) for left, right, label in rows]
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_text_has_title_brand_and_squeezed_model_number():
    table = catalogue(
        {"id": "1", "title": "Coby 10.2' tv", "brand": "coby", "model": "TF-TV 1022"},
        {"id": "2", "title": "flat tv", "brand": "Coby", "model": "tftv1022"},
        {"id": "3", "title": "coby tf-tv1022 7in lcd"},
        {"id": "4", "title": "leather case"},
    )
    assert product_text(table) == [
        "Coby 10.2' tv tftv1022",
        "Coby flat tv tftv1022",
        "coby tf-tv1022 7in lcd tftv1022",
        "leather case",
    ]
    assert product_text(table, plain=True)[0] == "Coby 10.2' tv coby TF-TV 1022"


def test_model_number_needs_letters_and_digits():
    assert model_number("canon 1234567 powershot sd-1100is 8.0mp") == "sd1100is"
    assert model_number("case for 2010 ab1") == ""


def test_pair_files_give_stable_ids_whatever_the_order(tmp_path):
    rows = [("sony a100", "sony alpha", 1), ("sony a100", "nikon d40", 0), ("hp ink", "hp 56 ink", 1)]
    write_pair_files(tmp_path / "a", rows, valid=rows[:1])
    write_pair_files(tmp_path / "b", rows[::-1], valid=rows[:1])
    first, second = read_pairs(tmp_path / "a"), read_pairs(tmp_path / "b")
    assert len(first.left) == 2 and len(first.right) == 3
    assert dict(zip(first.left["id"], first.left["title"], strict=True)) == dict(
        zip(second.left["id"], second.left["title"], strict=True)
    )
    assert len(pair_files(tmp_path / "a")) == 3


def test_listings_that_differ_only_in_price_are_one_record(tmp_path):
    write_pair_files(tmp_path, [("a", "b", 1)])
    both = "".join(f"{record('a')}\t{record('b', price=price)}\t1\n" for price in ("1.0", "2.0"))
    (tmp_path / "train.txt").write_text(both, encoding="utf-8")
    pairs = read_pairs(tmp_path)
    assert len(pairs.right) == 1 and len(pairs.labelled) == 1


def test_line_separators_inside_a_title_do_not_split_a_line(tmp_path):
    write_pair_files(tmp_path, [("a\u2028b", "c\x0bd", 1)])
    assert read_pairs(tmp_path).left["title"].tolist() == ["a\u2028b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"COL title VAL a\tCOL title VAL b\n", "line 1 is not left TAB right TAB 0 or 1"),
        (b"COL title VAL a\tCOL title VAL b\t2\n", "line 1 is not left TAB right"),
        (b"just a title\tCOL title VAL b\t1\n", "line 1: a record is written COL"),
        (b"COL title VAL caf\xe9\tCOL title VAL b\t1\n", "not UTF-8 text"),
    ],
)
def test_bad_pair_files_are_refused_by_name(tmp_path, content, message):
    write_pair_files(tmp_path, [("a", "b", 1)])
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_pairs(tmp_path)
    assert "train.txt" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,title\n", "the catalogue has no rows"),
        (b"", "the file is empty"),
        (b"id,name\n1,a\n", "column title is missing; found id, name"),
        (b"id,title\n7,a\n007,b\n7,c\n", "id 7 occurs twice"),
        (b"id,title\n1,a\n2, \n", "data row 2 has an empty title"),
        (b"id,title\n1,caf\xe9\n", "not UTF-8 text"),
    ],
)
def test_bad_catalogues_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "shop.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_catalogue(path)
    assert "shop.csv" in str(error.value)


def test_ids_and_titles_stay_text(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("id,title,brand\n007,NA,\n7,null,NaN\n", encoding="utf-8")
    table = read_catalogue(path)
    assert table["id"].tolist() == ["007", "7"] and table["title"].tolist() == ["NA", "null"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("036000291452", "00036000291452"),
        ("0 36000-29145 2", "00036000291452"),
        ("0036000291452", "00036000291452"),
        ("036000291453", ""),
        ("000000000000", ""),
        ("3.6e10", ""),
        ("", ""),
    ],
)
def test_upc_normal_form_and_check_digit(written, expected):
    assert normalise_upc(written) == expected


def test_join_by_upc_labels_matches_and_similar_other_products(shops):
    left, right = read_catalogue(shops / "left.csv"), read_catalogue(shops / "right.csv")
    pairs = join_by_upc(left, right, non_matches=3)
    upc = {**left.set_index("id")["upc"], **right.set_index("id")["upc"]}
    same = pairs.labelled["left_id"].map(upc) == pairs.labelled["right_id"].map(upc)
    assert (same == pairs.labelled["match"]).all()
    assert pairs.labelled["match"].sum() == 120 and len(pairs.labelled) == 120 * 4
    assert pairs.labelled.groupby("left_id")["split"].nunique().max() == 1
    grown = join_by_upc(left, right.sample(frac=1, random_state=1).reset_index(drop=True), non_matches=3)
    assert dict(pairs.labelled[["left_id", "split"]].to_numpy()) == dict(
        grown.labelled[["left_id", "split"]].to_numpy()
    )


def test_catalogues_without_a_common_upc_are_refused():
    shop = catalogue({"id": "1", "title": "a", "upc": "036000291452"})
    with pytest.raises(InputError, match="share no valid UPC"):
        join_by_upc(shop, shop.assign(upc="0"))


def test_written_tables_read_back_as_they_were(shops, tmp_path):
    main(["--pairs", str(shops / "pairs"), "--out", str(tmp_path)])
    first, second = read_pairs(shops / "pairs"), read_pairs(tmp_path)
    pd.testing.assert_frame_equal(first.labelled, second.labelled)
    pd.testing.assert_frame_equal(first.right, second.right)


def test_pairs_that_name_an_unknown_record_are_refused(shops, tmp_path):
    main(["--pairs", str(shops / "pairs"), "--out", str(tmp_path)])
    with open(tmp_path / "pairs.csv", "a", encoding="utf-8") as file:
        file.write("L99999,R00001,1,train\n")
    with pytest.raises(InputError, match="left_id L99999 is in no catalogue"):
        read_pairs(tmp_path)


def small_pairs() -> Pairs:
    left = catalogue(
        *({"id": f"l{n}", "title": f"left {n}", "brand": "acme", "category": "tv"} for n in range(4))
    )
    right = catalogue(
        {"id": "r0", "title": "right 0", "brand": "acme"},
        {"id": "r1", "title": "right 1", "brand": "acme"},
        {"id": "r2", "title": "right 2", "brand": "other"},
        {"id": "r3", "title": "right 3", "brand": "other", "category": "TV"},
        {"id": "r0 again", "title": "RIGHT 0", "brand": "acme"},
        {"id": "r5", "title": "right 5", "brand": "acme"},
    )
    rows = [
        ("l0", "r0", True, "train"), ("l0", "r2", False, "train"), ("l0", "r3", False, "train"),
        ("l1", "r0 again", False, "train"), ("l1", "r1", True, "train"), ("l2", "r1", False, "train"),
        ("l3", "r5", True, "test"), ("l3", "r2", False, "test"), ("l0", "r5", False, "train"),
    ]  # fmt: skip
    return Pairs(left, right, pd.DataFrame(rows, columns=["left_id", "right_id", "match", "split"]))


def test_no_record_of_a_test_match_is_trained_on():
    pairs = small_pairs()
    train = training_pairs(pairs)
    assert "l3" not in set(train["left_id"]) and "r5" not in set(train["right_id"])
    assert "r2" in set(train["right_id"])  # it is only a test pair's non-match
    strict = training_pairs(pairs, "pairs")
    assert "r2" not in set(strict["right_id"])
    with pytest.raises(InputError, match="held-out"):
        training_pairs(pairs, "rows")


def test_a_test_product_under_another_id_is_hidden_too():
    pairs = small_pairs()
    copy = pairs.right[pairs.right["id"] == "r5"].assign(id="copy")
    pairs.right = pd.concat([pairs.right, copy], ignore_index=True)
    pairs.labelled.loc[len(pairs.labelled)] = ["l1", "copy", False, "train"]
    assert "copy" not in set(training_pairs(pairs)["right_id"])


def test_hard_negatives_are_similar_non_matches_of_the_same_brand_or_category():
    pairs = small_pairs()
    # closeness to every anchor: r2 > r0 > r0 again > r1 > r3 > r5
    height = {"right 2": 0.9, "right 0": 0.8, "RIGHT 0": 0.8, "right 1": 0.5, "right 3": 0.4, "right 5": 0.95}

    def encode(texts):
        cosine = np.array([next((height[t] for t in height if t in text), 1.0) for text in texts], np.float32)
        return np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)

    triplets = mine_triplets(pairs, training_pairs(pairs), encode, negatives=3)
    chosen = triplets.groupby("anchor_id")["negative_id"].agg(list).to_dict()
    # l0 matches r0, so its copy is no negative; r1 shares the brand, r3 the category, r2 neither though it is nearest
    assert chosen["l0"] == ["r1", "r3", "r2"]
    assert sorted(chosen["l1"][:2]) == ["r0", "r0 again"] and chosen["l1"][2] == "r3"
    assert "r5" not in set(triplets["negative_id"])
    assert (triplets.loc[triplets["anchor_id"] == "l0", "positive_id"] == "r0").all()


def test_a_record_with_the_words_of_the_anchor_is_no_negative():
    pairs = small_pairs()
    pairs.right.loc[pairs.right["id"] == "r1", "title"] = "acme LEFT 0"
    pairs.left.loc[pairs.left["id"] == "l0", "title"] = "acme left 0"
    triplets = mine_triplets(
        pairs, training_pairs(pairs), lambda texts: np.ones((len(texts), 2), np.float32), negatives=9
    )
    of_l0 = set(triplets.loc[triplets["anchor_id"] == "l0", "negative_id"])
    assert of_l0 == {"r2", "r3"}


def test_real_splits_keep_no_test_product_in_training(walmart_amazon):
    pairs = read_pairs(walmart_amazon)
    assert (len(pairs.right), pairs.matches("test")["left_id"].nunique()) == (5229, 191)
    train, test = training_pairs(pairs), pairs.matches("test")
    assert len(pairs.matches("train")) - train["match"].sum() > 19  # the plain split shares products
    assert not set(train["left_id"]) & set(test["left_id"])
    assert not set(train["right_id"]) & set(test["right_id"])
