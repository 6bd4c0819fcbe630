import json
import shutil

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from product_matching import decide as decide_stage
from product_matching import evaluate as evaluate_stage
from product_matching import search as search_stage
from product_matching import train_decision as stage
from product_matching.catalogue import read_catalogue
from product_matching.cross_encoder import match_logits
from product_matching.decision import Combination, DecisionModel, best_threshold, f1_scores, rows_of
from product_matching.evaluate import evaluate_decision, ranking_scores
from product_matching.explain import explain, in_words
from product_matching.pairs import read_pairs, write_pairs


def train(shops, workspace, run, *flags):
    return stage.main(
        [
            "--pairs", str(shops / "pairs"), "--encoder", str(shops / "encoder"), "--model", str(shops / "encoder"),
            "--workspace", str(workspace), "--run", run, "--device", "cpu", "--rounds", "40", *flags,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(shops, tmp_path_factory):
    """Folder of a decision with a tiny cross-encoder of random weights, trained for an epoch."""
    workspace = tmp_path_factory.mktemp("decision")
    return train(shops, workspace, "with_cross", "--epochs", "1", "--lr", "1e-3", "--pair-tokens", "64")


@pytest.fixture(scope="module")
def decision(trained):
    return DecisionModel.load(trained, device="cpu")


def test_the_decision_finds_matches_of_products_it_has_not_seen(trained, shops):
    pairs = read_pairs(shops / "pairs")
    decision = DecisionModel.load(trained, device="cpu")
    scores = stage.score_split(decision, pairs, "test")
    matches = pairs.matches("test")
    # to call every pair a match has precision 0.1, and an F1 of 0.18
    assert scores["f1"] > 0.6 and len(matches) > 5


def test_swapped_sides_get_the_same_decision(decision, shops):
    left = decision.records(read_catalogue(shops / "left.csv").head(30))
    right = decision.records(read_catalogue(shops / "right.csv").head(30))
    rows = np.array([(i, j) for i in range(30) for j in range(0, 30, 3)])
    every = np.ones(len(rows), bool)
    one = decision.decide(left, right, rows, read=every)
    other = decision.decide(right, left, rows[:, ::-1], read=every)
    np.testing.assert_allclose(one.probability, other.probability, atol=1e-5)
    assert not np.isnan(one.evidence.cross).any()


def test_one_order_alone_would_depend_on_the_sides(decision):
    """Without the mean over both orders the decision would not be symmetric: this is what the mean is for."""
    model = decision.cross_encoder
    one = model.predict([("title: aurora 32 inch", "title: toner 1500 pages")])
    other = model.predict([("title: toner 1500 pages", "title: aurora 32 inch")])
    assert abs(one[0] - other[0]) > 1e-7
    assert match_logits(model, [], []).shape == (0,)


def test_the_cross_encoder_reads_open_pairs_only(decision, shops):
    pairs = read_pairs(shops / "pairs").only("test")
    left, right = decision.records(pairs.left), decision.records(pairs.right)
    evidence = decision.evidence(left, right, rows_of(pairs.left["id"], pairs.right["id"], pairs.labelled))
    quick = decision.quick.probability(np.stack([evidence.trees, evidence.cosine], axis=1))
    np.testing.assert_array_equal(~np.isnan(evidence.cross), (quick > 0.01) & (quick < 0.99))
    # a pair that is not read keeps the probability of trees and cosine
    closed = np.isnan(evidence.cross)
    np.testing.assert_array_equal(decision.probability(evidence)[closed], quick[closed])


def test_the_same_seed_gives_the_same_decision(shops, tmp_path):
    one = json.loads((train(shops, tmp_path, "one", "--no-cross-encoder") / "decision.json").read_text())
    two = json.loads((train(shops, tmp_path, "two", "--no-cross-encoder") / "decision.json").read_text())
    one.pop("run"), two.pop("run")
    assert one == two and one["thorough"] is None


def test_a_finished_run_is_kept_with_resume(shops, tmp_path, capsys):
    folder = train(shops, tmp_path, "kept", "--no-cross-encoder")
    before = (folder / "decision.json").stat().st_mtime_ns
    assert train(shops, tmp_path, "kept", "--no-cross-encoder", "--resume") == folder
    assert (folder / "decision.json").stat().st_mtime_ns == before and "complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="rounds"):
        train(shops, tmp_path, "kept", "--no-cross-encoder", "--resume", "--rounds", "41")


def test_adapters_train_the_cross_encoder_too(shops, tmp_path):
    folder = train(shops, tmp_path, "lora", "--epochs", "1", "--lora-rank", "2", "--lr", "1e-3")
    assert DecisionModel.load(folder, device="cpu").cross_encoder is not None
    names = [file.name for file in (folder / "cross_encoder").iterdir()]
    assert not any("adapter" in name for name in names)  # merged: it loads like any other model


def test_few_validation_pairs_or_one_label_are_refused(shops, tmp_path):
    pairs = read_pairs(shops / "pairs")
    labelled = pairs.labelled
    few = labelled[(labelled["split"] != "valid")]
    three = labelled[labelled["split"] == "valid"].head(3)
    for name, content, message in (
        ("three", pd.concat([few, three]), "the threshold needs at least 10 of each"),
        ("one_label", labelled[labelled["match"]], "and 0 non-matches"),
    ):
        pairs.labelled = content
        write_pairs(tmp_path / name, pairs)
        with pytest.raises(InputError, match=message):
            stage.main(["--pairs", str(tmp_path / name), "--workspace", str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("COL title VAL a\tCOL title VAL b\t2", "line 1 is not left TAB right TAB 0 or 1"),
        ("COL title VAL \tCOL title VAL  COL brand VAL \t1", "line 1: all fields of a record are empty"),
    ],
)
def test_a_label_of_two_and_empty_records_are_refused_by_line(tmp_path, line, message):
    (tmp_path / "train.txt").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path)


def test_a_record_of_other_fields_keeps_their_text(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(
            "COL Song_Name VAL blue sky COL Artist VAL trio COL Manufacturer VAL acme\tCOL title VAL sky\t1\n",
            encoding="utf-8",
        )
    record = read_pairs(tmp_path).left.iloc[0]
    assert (record["title"], record["brand"], record["description"]) == ("blue sky", "acme", "blue sky trio")


def test_records_of_any_length_and_script_are_decided(decision):
    odd = ["x" * 100_000, "word " * 20_000, "ソニー カメラ DSC-W120", "كاميرا سوني ١٢٠", "🎉", "\u0000\u2028"]
    records = decision.records(pd.DataFrame({"id": odd, "title": odd}))
    rows = np.array([(i, j) for i in range(len(odd)) for j in range(len(odd))])
    probability = decision.decide(records, records, rows).probability
    assert ((probability >= 0) & (probability <= 1)).all()


def test_both_sides_without_text_are_decided_without_an_error(decision):
    records = decision.records(pd.DataFrame({"id": ["1", "2"], "title": ["", ""]}))
    verdicts = decision.decide(records, records, np.array([[0, 1]]))
    assert not verdicts.match[0]  # nothing speaks for a match


def test_an_explanation_names_what_decided(decision):
    left = {
        "title": "Alderby Aurora 32 inch LCD Television ABC-1234 Black",
        "brand": "Alderby",
        "price": "100",
    }
    right = {"title": 'ALDERBY 32" Flat Panel TV AUR BLK ABC1234', "brand": "", "price": "104"}
    effects = explain(decision, left, right)
    assert {effect.part for effect in effects} >= {"title", "brand", "price", '"32"', '"abc-1234"'}
    assert [abs(effect.change) for effect in effects] == sorted(
        (abs(e.change) for e in effects), reverse=True
    )
    assert effects[0].part in in_words(effects)
    swapped = {effect.part: effect.change for effect in explain(decision, right, left)}
    for effect in effects:
        if effect.part in swapped:
            assert effect.change == pytest.approx(swapped[effect.part], abs=1e-4)


def test_a_damaged_decision_is_refused(trained, tmp_path):
    copy = tmp_path / "decision"
    shutil.copytree(trained, copy)
    with open(copy / "trees.txt", "a") as file:
        file.write("x")
    with pytest.raises(InputError, match="trees.txt: sha256 differs"):
        DecisionModel.load(copy, device="cpu")
    with pytest.raises(InputError, match="no decision.json there"):
        DecisionModel.load(tmp_path / "nowhere")


def test_an_index_and_a_decision_of_different_encoders_are_refused_by_name(
    trained, shops, shop_index, tmp_path
):
    from product_matching.catalogue import product_text
    from product_matching.encoder import encode, fingerprint, load_encoder
    from product_matching.index import CatalogueIndex
    from product_matching.sample_pairs import write_tiny_encoder

    catalogue = read_catalogue(shops / "right.csv")
    write_tiny_encoder(tmp_path / "other", product_text(catalogue), seed=9)
    other = load_encoder(str(tmp_path / "other"), device="cpu")
    CatalogueIndex.build(
        catalogue,
        encode(other, product_text(catalogue)),
        model=str(tmp_path / "other"),
        fingerprint=fingerprint(other),
        max_length=128,
        calibration=None,
    ).save(tmp_path / "index")
    with pytest.raises(
        InputError, match=r"run with_cross.*was trained with encoder .*encoder .*and this encoder"
    ):
        search_stage.Matcher.load(tmp_path / "index", device="cpu", decision=str(trained))
    search_stage.Matcher.load(shop_index, device="cpu", decision=str(trained))  # of one encoder


def test_search_orders_by_the_decision(trained, shop_index, shops, capsys):
    title = read_pairs(shops / "pairs").left["title"].iloc[0]
    flags = ["--index", str(shop_index), "--device", "cpu", "--k", "5"]
    plain = search_stage.main([title, *flags])
    matches = search_stage.main([title, *flags, "--decision", str(trained)])
    assert len(matches) == len(plain) == 5
    probabilities = [match.probability for match in matches]
    assert probabilities == sorted(probabilities, reverse=True)
    assert [match.cosine for match in matches] != sorted((match.cosine for match in matches), reverse=True)
    capsys.readouterr()


def test_evaluate_scores_the_decision(trained, shops, tmp_path):
    evaluate_stage.main(
        [
            "--pairs", str(shops / "pairs"), "--decision", str(trained), "--label", "decision", "--device", "cpu",
            "--out", str(tmp_path / "scores.csv"), "--candidates", "160",
        ]
    )  # fmt: skip
    row = pd.read_csv(tmp_path / "scores.csv").iloc[0]
    assert row["recall_at_1"] > 0.7 and row["candidate_recall"] == 1
    assert row["f1"] > 0.6 and 0 <= row["calibration_error"] < 0.2


def test_two_catalogues_are_matched_one_to_one_with_reasons_and_a_log(trained, shops, tmp_path, capsys):
    table = decide_stage.main(
        [
            "--model", str(trained), "--left", str(shops / "left.csv"), "--right", str(shops / "right.csv"),
            "--one-to-one", "--candidates", "5", "--explain", "2", "--out", str(tmp_path / "decisions.csv"),
            "--log", str(tmp_path / "log"), "--device", "cpu",
        ]
    )  # fmt: skip
    matches = table[table["match"] == 1]
    assert len(table) == 5 * 160 and len(matches) > 20
    assert matches["left_id"].is_unique and matches["right_id"].is_unique
    assert (table["why"] != "").sum() == 2 and set(table["confidence"]) <= {"high", "medium", "low"}
    written = pd.read_csv(tmp_path / "decisions.csv")
    assert list(written.columns) == [
        "left_id",
        "right_id",
        "cosine",
        "probability",
        "match",
        "confidence",
        "why",
    ]
    assert len(list((tmp_path / "log").glob("decisions-*.parquet"))) == 1


def test_labelled_pairs_are_scored_in_three_ways(trained, shops, tmp_path, capsys):
    decide_stage.main(
        [
            "--model",
            str(trained),
            "--pairs",
            str(shops / "pairs"),
            "--out",
            str(tmp_path / "d.csv"),
            "--device",
            "cpu",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:3]] == [
        "each pair",
        "best of each left",
        "one to one",
    ]


def test_duplicates_within_one_catalogue_are_grouped(trained, shops, tmp_path, capsys):
    left = pd.read_csv(shops / "left.csv", dtype=str, keep_default_na=False).head(40)
    again = left.head(10).assign(id=[f"copy{number}" for number in range(10)])
    pd.concat([left, again]).to_csv(tmp_path / "shop.csv", index=False)
    decide_stage.main(
        [
            "--model", str(trained), "--left", str(tmp_path / "shop.csv"), "--out", str(tmp_path / "d.csv"),
            "--max-group", "2", "--device", "cpu",
        ]
    )  # fmt: skip
    groups = pd.read_csv(tmp_path / "d.groups.csv").set_index("id")["group"]
    assert groups.value_counts().max() <= 2
    same = sum(groups[f"copy{number}"] == groups[left["id"].iloc[number]] for number in range(10))
    assert same >= 9
    assert "50 records are" in capsys.readouterr().out


def test_settings_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(InputError, match="give either --pairs"):
        decide_stage.main(["--pairs", "a", "--left", "b"])
    with pytest.raises(InputError, match="give --right, too"):
        decide_stage.main(["--left", "b", "--one-to-one"])


def test_few_candidates_bound_the_recall(trained, shops):
    pairs = read_pairs(shops / "pairs")
    decision = DecisionModel.load(trained, device="cpu")
    few = evaluate_decision(decision, pairs, "test", candidates=3)
    assert few["recall_at_10"] == few["candidate_recall"] < 1


def test_ranking_scores_by_hand():
    relevant = np.array([[True, False, False], [False, False, True], [False, False, False]])
    scores = ranking_scores(relevant, np.array([1, 1, 1]))
    assert scores["recall_at_1"] == pytest.approx(1 / 3) and scores["recall_at_10"] == pytest.approx(2 / 3)
    assert scores["mrr"] == pytest.approx((1 + 1 / 3) / 3)
    assert scores["ndcg_at_10"] == pytest.approx((1 + 0.5) / 3)


def test_the_threshold_lies_between_different_probabilities():
    probability = np.array([0.9, 0.6, 0.6, 0.2])
    threshold = best_threshold(probability, np.array([True, True, False, False]))
    assert threshold == pytest.approx(0.4)  # 0.9 alone has F1 2/3, the first three 0.8
    assert f1_scores(probability >= threshold, np.array([True, True, False, False]))["f1"] == pytest.approx(
        0.8
    )


def test_a_combination_is_calibrated():
    rng = np.random.default_rng(0)
    evidence = rng.normal(size=(20_000, 2)) * [10, 0.1]
    match = rng.random(20_000) < 1 / (1 + np.exp(-(0.2 * evidence[:, 0] + 10 * evidence[:, 1] - 1)))
    fitted = Combination.fit(evidence, match)
    assert fitted.weights == pytest.approx([0.2, 10], rel=0.1) and fitted.intercept == pytest.approx(
        -1, rel=0.1
    )
