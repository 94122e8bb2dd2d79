"""What a classifier is judged by, on answers that can be counted by hand."""

import numpy as np
import pytest

from jobs.evaluation.metrics import LEAST, measure

# Three of class 0, one of class 1, none of class 2; one of class 0 is taken for class 1.
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.4, 0.6, 0.0], [0.2, 0.8, 0.0]], np.float32)
LABELS = np.array([0, 0, 0, 1], np.int32)


def test_each_metric_is_what_its_name_says() -> None:
    found = measure(PROBABILITIES, LABELS)
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    # Class 0: precision 1, recall 2/3; class 1: precision 1/2, recall 1.
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["auroc"] == 1.0
    assert found["log_loss"] == pytest.approx(-np.log([0.7, 0.6, 0.4, 0.8]).mean(), rel=1e-6)
    # Bins of a fifteenth: 0.6 twice (one of two right), 0.7, 0.8.
    assert found["ece"] == pytest.approx(0.5 * abs(0.5 - 0.6) + 0.25 * 0.3 + 0.25 * 0.2, rel=1e-5)


def test_chance_and_certainty_are_finite() -> None:
    one_class = measure(np.array([[1.0, 0.0]], np.float32), np.array([1], np.int32))
    assert (one_class["accuracy"], one_class["auroc"], one_class["macro_f1"]) == (0.0, 0.5, 0.0)
    assert one_class["log_loss"] == pytest.approx(-np.log(LEAST))


def test_auroc_is_the_one_of_scikit_learn_also_where_answers_tie() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 200).astype(np.int32)
    probabilities = np.round(generator.dirichlet(np.ones(5), 200), 1).astype(np.float32)
    own = [roc_auc_score(labels == label, probabilities[:, label]) for label in range(4)]
    assert measure(probabilities, labels)["auroc"] == pytest.approx(np.mean(own), abs=1e-12)
