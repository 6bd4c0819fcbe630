"""Scores against hand numbers."""

import numpy as np
import pytest
from scipy.special import softmax

from text_tabular.metrics import (
    Calibration,
    best_threshold,
    expected_calibration_error,
    log_loss,
    score_classes,
    score_numbers,
)


def test_log_loss_and_calibration_error_by_hand():
    logits = np.log([[0.8, 0.2], [0.6, 0.4]])
    assert log_loss(logits, np.array([0, 1])) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    # two bins of one row each: |0.8 − 1| and |0.6 − 0|
    assert expected_calibration_error(np.exp(logits), np.array([0, 1])) == pytest.approx(0.4)


def test_the_temperature_of_overconfident_logits_is_found():
    generator = np.random.default_rng(0)
    true_logits = generator.normal(size=(20_000, 3))
    classes = np.array([generator.choice(3, p=row) for row in softmax(true_logits, axis=1)])
    calibration = Calibration.fit(2.5 * true_logits, classes)
    assert calibration.temperature == pytest.approx(2.5, abs=0.1)
    scores = score_classes(2.5 * true_logits, classes, ("a", "b", "c"), calibration)
    assert scores["ece"] < 0.02 < scores["ece_before_temperature"]


def test_the_threshold_with_the_highest_macro_f1():
    probability = np.array([0.1, 0.2, 0.3, 0.4])
    assert best_threshold(probability, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert (
        best_threshold(np.array([0.2, 0.8]), np.array([0, 1])) == 0.5
    )  # all between are as good: the nearest to a half


def test_two_classes_are_predicted_by_the_threshold():
    calibration = Calibration(threshold=0.25)
    assert calibration.predicted(np.array([[0.7, 0.3], [0.8, 0.2]])).tolist() == [1, 0]


def test_scores_of_classes_by_hand():
    names = ("a", "b", "c")
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.7, 0.1]])
    scores = score_classes(logits, np.array([0, 1, 1, 1]), names, Calibration())
    assert scores["accuracy"] == 0.75
    assert scores["accuracy_of_most_frequent_class"] == 0.75
    # class a: precision 1/2, recall 1; class b: precision 1, recall 2/3; class c does not occur
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["pr_auc"] == pytest.approx(1.0)
    assert scores["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]


def test_scores_of_numbers_by_hand():
    scores = score_numbers(np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert scores["mae"] == pytest.approx(2 / 3)
    assert scores["rmse"] == pytest.approx(np.sqrt(4 / 3))
    assert scores["r2"] == pytest.approx(1 - 4 / 2)
    assert scores["mae_of_best_constant"] == pytest.approx(2 / 3)
