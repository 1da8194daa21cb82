"""The metrics compute what the functions of their names do, over batches and over ranks."""

import pytest
import torch
from torchmetrics import MetricCollection

import uncollapse as un
from every_metric import EPS, EXPECTED, D, K, feed, made, new


def test_every_metric_is_tested_and_has_a_key_of_its_own():
    assert set(EXPECTED) == {name for name in un.__all__ if name.endswith("Metric")}
    keys = {new(name).key for name in EXPECTED}
    assert {"unique@0.1", "unique_among_used@0.1", "effective@0.1", "used", "alive"} < keys
    assert len(keys) == len(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_over_batches_it_is_the_function_on_all_rows(name, dtype):
    w, batches = made()
    w, batches = w.to(dtype), batches.to(dtype)
    metric = new(name)
    for _ in range(2):  # the second time after a reset
        for z in batches:
            with torch.autocast("cpu", torch.bfloat16):
                feed(metric, z, w)
        expected = EXPECTED[name](torch.cat(list(batches), 1), w)
        with torch.autocast("cpu", torch.bfloat16):
            value = metric.compute()
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(expected, rel=1e-6)
        metric.reset()


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "AlivePrototypesMetric"])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_computing_before_anything_was_seen_says_so(name):
    with pytest.raises(ValueError, match="call update before compute"):
        new(name).compute()


def test_the_value_of_one_batch_leaves_the_total_alone():
    w, batches = made()
    for name in ("UsedPrototypesMetric", "EffectivePrototypesMetric"):
        metric = new(name)
        for z in batches:
            assert float(metric(z[0], w)) == pytest.approx(EXPECTED[name](z, w))
        assert float(metric.compute()) == pytest.approx(EXPECTED[name](torch.cat(list(batches), 1), w))


def test_a_collection_shares_what_is_counted_and_confuses_no_epsilon():
    """At first all prototypes are distinct at both ε, so that metrics which kept results would be taken for one."""
    w, batches = made()
    metrics = {"near": un.UniquePrototypesMetric(0.01), "far": un.UniquePrototypesMetric(0.1)}
    use = {"used": un.UsedPrototypesMetric(), "effective": un.EffectivePrototypesMetric(EPS)}
    both = MetricCollection(metrics | use, compute_groups=True)
    both.update(z=batches[0][0], w=torch.eye(D).repeat(5, 1) + 0.5 * torch.randn(K, D))
    both.reset()
    for z in batches:
        both.update(z=z[0], w=w)
    z = torch.cat(list(batches), 1)
    values = {name: float(value) for name, value in both.compute().items()}
    expected = {"near": un.unique_prototypes(w, 0.01), "far": un.unique_prototypes(w, 0.1)}
    expected |= {name: EXPECTED[type(metric).__name__](z, w) for name, metric in use.items()}
    assert values == pytest.approx(expected)
    assert expected["near"] != expected["far"]


def test_alive_forgets_what_is_older_than_its_window_and_is_saved_with_a_model():
    metric = un.AlivePrototypesMetric(3, rows=1, window=2)
    for k in (0, 1, 1):
        metric.update(torch.eye(3)[k : k + 1], torch.eye(3))
    assert float(metric.compute()) == 1
    copy = un.AlivePrototypesMetric(3, rows=1, window=2)
    copy.load_state_dict(metric.state_dict())
    copy.update(torch.full((1, 3), torch.nan), torch.eye(3))
    copy.update(torch.eye(3)[2:], 9 * torch.eye(3))
    assert float(copy.compute()) == 1


def test_information_may_be_fitted_on_other_images():
    w, batches = made()
    metric = un.ViewInformationMetric()
    metric.update(batches[0], w)
    metric.update(batches[1], w, fit=True)
    assert float(metric.compute()) == pytest.approx(un.view_information(batches[0], w, batches[1]).bits)


def test_rows_that_do_not_fit_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="same space"):
        un.UsedPrototypesMetric().update(torch.randn(4, 7), torch.randn(5, 8))
    used = un.UsedPrototypesMetric()
    used.update(torch.randn(4, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match="6 prototypes after 5; call reset"):
        used.update(torch.randn(4, 8), torch.randn(6, 8))
    with pytest.raises(ValueError, match="6 prototypes; this metric was made for 5"):
        un.AlivePrototypesMetric(5, 1).update(torch.randn(4, 8), torch.randn(6, 8))
    with pytest.raises(ValueError, match=r"views, images, D.*\(4, 8\)"):
        un.ViewInformationMetric().update(torch.randn(4, 8), torch.randn(6, 8))
    with pytest.raises(ValueError, match="NaN"):
        un.EffectiveRankMetric().update(torch.full((4, 8), torch.nan))


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXPECTED)
def test_on_a_gpu_it_is_the_same(name):
    w, batches = made()
    metric = new(name).to("cuda")
    for z in batches:
        feed(metric, z.cuda(), w.cuda())
    assert metric.compute().device.type == "cuda"
    assert float(metric.compute()) == pytest.approx(EXPECTED[name](torch.cat(list(batches), 1), w), rel=1e-4)
