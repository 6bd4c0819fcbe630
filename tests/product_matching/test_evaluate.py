import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from product_matching import evaluate as stage
from product_matching.calibration import Calibration, confidence_band
from product_matching.catalogue import check_catalogue, product_text
from product_matching.encoder import encode, load_encoder
from product_matching.evaluate import EmbeddedPairs, confidence, pair_decision, retrieval
from product_matching.pairs import Pairs, read_pairs


def embedded(cosine: dict[str, list[float]], match: dict[str, list[int]]) -> EmbeddedPairs:
    """Pairs whose cosines are given: each left record is (1, 0), each right one lies at its angle."""
    rows, right = [], []
    for split, values in cosine.items():
        for value, label in zip(values, match[split], strict=True):
            rows.append((f"l{len(rows)}", f"r{len(rows)}", bool(label), split))
            right.append((value, np.sqrt(1 - value**2)))
    labelled = pd.DataFrame(rows, columns=["left_id", "right_id", "match", "split"])
    sides = [
        check_catalogue(pd.DataFrame({"id": ids, "title": ids}), "test")
        for ids in (labelled["left_id"], labelled["right_id"])
    ]
    left = np.tile(np.array([1, 0], np.float32), (len(rows), 1))
    return EmbeddedPairs(Pairs(*sides, labelled), left, np.array(right, np.float32))


def test_the_threshold_comes_from_validation_and_is_applied_to_test():
    # on valid 0.7 separates perfectly; the test pairs would prefer 0.3
    content = embedded(
        {"valid": [0.9, 0.8, 0.6, 0.1], "test": [0.95, 0.5, 0.4, 0.75, 0.2]},
        {"valid": [1, 1, 0, 0], "test": [1, 1, 1, 0, 0]},
    )
    decision = pair_decision(content, "test")
    assert decision["threshold"] == pytest.approx(0.7, abs=1e-6)
    # found 0.95 (right) and 0.75 (wrong) of three matches
    assert (decision["precision"], decision["recall"]) == (0.5, pytest.approx(1 / 3))
    assert decision["f1"] == pytest.approx(0.4)


def test_calibrated_probabilities_hold_on_average():
    rng = np.random.default_rng(0)
    cosine = rng.uniform(0, 1, 4000)
    match = rng.random(4000) < 1 / (1 + np.exp(-(20 * cosine - 14)))
    calibration = Calibration.fit(cosine[:2000], match[:2000])
    assert calibration.slope == pytest.approx(20, rel=0.15) and calibration.pairs == 2000
    probability = calibration.probability(cosine[2000:])
    between = (probability > 0.4) & (probability < 0.6)
    assert match[2000:][between].mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("probability", "band"),
    [(0.86, "high"), (0.85, "medium"), (0.76, "medium"), (0.75, "low"), (0.1, "low")],
)
def test_confidence_bands(probability, band):
    assert confidence_band(probability) == band


def test_calibration_error_by_hand():
    content = embedded({"test": [0.9, 0.9, 0.2, 0.2]}, {"test": [1, 0, 0, 0]})
    flat = Calibration(slope=0.0, intercept=0.0, pairs=4)  # says 0.5 to everything; a quarter matches
    assert confidence(content, "test", flat)["calibration_error"] == pytest.approx(0.25)


def test_a_useless_cosine_is_calibrated_to_the_share_of_matches():
    calibration = Calibration.fit(np.array([0.1, 0.2, 0.8, 0.9]), np.array([True, False, False, False]))
    np.testing.assert_allclose(calibration.probability(np.array([0.0, 1.0])), 0.25)


def test_pairs_of_one_label_cannot_calibrate():
    with pytest.raises(InputError, match="pairs that match and pairs that do not"):
        Calibration.fit(np.array([0.1, 0.9]), np.array([True, True]))


def test_retrieval_scores_by_hand(shops, tiny_encoder):
    """Three queries whose matches stand at ranks 1, 2 and 3 of a corpus whose order we choose."""
    pairs = read_pairs(shops / "pairs").only("train")
    matches = pairs.matches("train").head(3)
    left = pairs.left[pairs.left["id"].isin(matches["left_id"])]
    matches = matches.set_index("left_id").loc[left["id"]].reset_index()
    right = pairs.right[pairs.right["id"].isin(matches["right_id"])].set_index("id", drop=False)
    right = right.loc[matches["right_id"]].reset_index(drop=True)
    queries = encode(tiny_encoder, product_text(left))
    # orthonormal directions close to nothing else: query i sees corpus row j with score table[i, j]
    table = np.array(
        [[0.9, 0.2, 0.1], [0.8, 0.5, 0.1], [0.9, 0.8, 0.3]]
    )  # own match in column i: ranks 1, 2, 3
    vectors = np.linalg.lstsq(queries, table, rcond=None)[0].T
    vectors_scaled = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(queries @ vectors_scaled.T), axis=1)
    ranks = np.array([list(order[i]).index(i) + 1 for i in range(3)])
    scores = retrieval(
        tiny_encoder, Pairs(left, right, matches), "train", right=vectors_scaled.astype(np.float32)
    )
    assert scores["recall_at_1"] == pytest.approx((ranks == 1).mean())
    assert scores["mrr"] == pytest.approx((1 / ranks).mean())
    assert scores["ndcg_at_10"] == pytest.approx((1 / np.log2(ranks + 1)).mean())
    assert (scores["queries"], scores["corpus"]) == (3, 3)


def test_the_table_keeps_one_row_per_label(shops, tmp_path, capsys):
    table = tmp_path / "scores.csv"
    common = [
        "--pairs",
        str(shops / "pairs"),
        "--model",
        str(shops / "encoder"),
        "--out",
        str(table),
        "--device",
        "cpu",
    ]
    stage.main([*common, "--label", "base"])
    stage.main([*common, "--label", "base, plain", "--plain-text"])
    stage.main([*common, "--label", "base", "--calibration", str(tmp_path / "calibration.json")])
    rows = pd.read_csv(table)
    assert rows["model"].tolist() == ["base, plain", "base"]
    assert rows[["recall_at_1", "mrr", "f1"]].notna().all(axis=None)
    assert "recall_at_10" in capsys.readouterr().out and (tmp_path / "calibration.json").is_file()


def test_base_minilm_gives_the_published_reference_on_a_part(minilm, walmart_amazon):
    """The whole table takes minutes; the right records of the test pairs give the same queries a smaller corpus."""
    encoder = load_encoder(minilm, device="cpu")
    pairs = read_pairs(walmart_amazon)
    matches = pairs.matches("test").head(40)
    left = pairs.left[pairs.left["id"].isin(matches["left_id"])]
    right = pairs.right[pairs.right["id"].isin(matches["right_id"])]
    scores = retrieval(encoder, Pairs(left, right, matches), "test", plain=True)
    assert scores["recall_at_1"] > 0.9 and scores["recall_at_10"] == 1.0
