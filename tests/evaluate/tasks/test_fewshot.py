"""Few-shot and long-tail protocols on features whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.fewshot import fewshot
from uncollapse.evaluate.tasks.knn import knn
from uncollapse.evaluate.tasks.linear import linear
from uncollapse.evaluate.tasks.longtail import longtail


def digits(counts=None):
    """Real digits; ``counts``: training images of each class."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    train = np.arange(1200)
    if counts is not None:
        train = np.concatenate([np.flatnonzero(y[:1200] == c)[:many] for c, many in enumerate(counts)])

    def part(rows):
        cls = torch.from_numpy(x[rows]).float()[:, None]
        return Features(
            cls, None, None, torch.from_numpy(y[rows]), torch.arange(len(rows)), [str(c) for c in range(10)]
        )

    return part(train), part(np.arange(1200, len(x)))


def test_more_shots_are_better_and_draws_spread():
    result = fewshot(*digits(), draws=4)
    accuracy = [result.metrics[f"top1_{s}shot"] for s in (1, 2, 5, 10)]
    assert accuracy == sorted(accuracy)
    assert 0.3 < accuracy[0] < accuracy[-1] < 0.99
    assert result.metrics["std_1shot"] > 0
    assert result.ci95[0] < accuracy[0] < result.ci95[1]
    assert all(len(v) == 4 for v in result.details["values"].values())
    assert fewshot(*digits(), draws=4).metrics == result.metrics


def test_classes_with_too_few_images_give_what_they_have():
    result = fewshot(*digits([3, *[50] * 9]), shots=(1, 5), draws=2)
    assert result.details["classes_with_fewer_images"] == {"5shot": 1}


def test_fewshot_rejects_what_it_cannot_do():
    with pytest.raises(ValueError, match="at least 2 draws"):
        fewshot(*digits(), draws=1)
    train, test = digits()
    with pytest.raises(ValueError, match="one class"):
        fewshot(train.take(train.labels == 3), test)


def test_long_tail_splits_by_training_count_with_both_limits_medium():
    train, test = digits([110, 105, 101, 100, 60, 40, 20, 19, 8, 3])
    result = longtail(train, test)
    assert result.details["classes"] == {"many": 3, "medium": 4, "few": 3, "head": 4, "body": 3, "tail": 3}
    m = result.metrics
    shares = {s: c / len(test) for s, c in result.details["test_images"].items()}
    by_class = result.details["by_class"]
    for name in ("linear", "knn"):
        for groups in (("many", "medium", "few"), ("head", "body", "tail")):
            assert m[f"{name}_overall"] == pytest.approx(sum(shares[s] * m[f"{name}_{s}"] for s in groups))
        right = np.array(by_class[name]) * by_class["test_images"]
        assert m[f"{name}_tail"] == pytest.approx(right[7:].sum() / sum(by_class["test_images"][7:]))
    assert m["linear_head"] > m["linear_tail"]
    assert m["macro"] == m["linear_macro"]
    assert result.ci95[0] < m["macro"] < result.ci95[1]
    assert m["linear_many"] > m["linear_few"]
    assert m["linear_overall"] == pytest.approx(linear(train, test).metrics["top1"])
    assert m["knn_overall"] == pytest.approx(knn(train, test).metrics["top1"])


def test_empty_splits_are_named_and_have_no_number():
    result = longtail(*digits([30] * 10))
    assert result.details["without_test_images"] == ["many", "few"]
    assert "linear_few" not in result.metrics
    assert longtail(*digits([30] * 10), cuts=(25, 5)).details["classes"]["many"] == 10


def test_the_interval_of_the_macro_accuracy_knows_that_class_sizes_vary():
    """A perfect classifier is perfect in every resample, whatever the sizes of the test classes."""

    def blobs(counts, seed):
        y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        noise = torch.randn(len(y), len(counts), generator=torch.Generator().manual_seed(seed))
        x = 5 * torch.eye(len(counts))[y] + 0.1 * noise
        return Features(x[:, None], None, None, y, torch.arange(len(y)), [])

    result = longtail(blobs([150, 40, 10], 0), blobs([50, 10, 5], 1))
    assert result.metrics["macro"] == 1
    assert result.ci95 == (1, 1)
    assert {"linear_many", "linear_few", "knn_macro", "knn_overall"} <= set(result.ci95_of)


def test_the_few_shot_classifier_is_the_minimum_of_its_objective():
    """Ten images of each class, so that the draw is all of them; minimised by other means beside it."""
    train, test = digits([10] * 10)
    x = train.last.double() - train.last.double().mean(1, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True)
    weight = torch.zeros(10, 64, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=20000,
        tolerance_grad=1e-10,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T, train.labels)
        loss = loss + 0.00025 / len(x) * weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(objective)
    z = test.last.double() - test.last.double().mean(1, keepdim=True)
    expected = float(((z @ weight.detach().T).argmax(1) == test.labels).double().mean())
    found = fewshot(train, test, shots=(10,), draws=2)
    assert "unconverged" not in found.details
    assert found.details["values"]["10shot"] == pytest.approx([expected, expected], abs=0.0021)  # one of 597 images
