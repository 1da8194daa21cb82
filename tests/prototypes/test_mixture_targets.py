"""Targets of a mixture against its offsets, weights and annealing; its defaults; what an older checkpoint holds."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.config.load import build_config
from uncollapse.config.schema import MixtureConfig, PrototypeConfig
from uncollapse.errors import ConfigError
from uncollapse.prototypes.build import build_prototypes
from uncollapse.prototypes.decoupled import MixturePrototypes
from uncollapse.prototypes.mixture import PAPER, RECOMMENDED, OnlineMixture

K, D = 32, 8


def rows(n, seed):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("temperature", [None, 0.05])
@pytest.mark.parametrize("covariance", ["shared", "isotropic", "diagonal"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_annealed_targets_are_balanced(covariance, temperature, beta):
    """Over the rows that were balanced, each component's mass is its fair share, at whatever β that was found."""
    mixture = OnlineMixture(
        K, D, 256, covariance, temperature=temperature, iterations=200, generator=torch.Generator().manual_seed(0)
    )
    x = rows(256, 1)
    mixture.evidence.fill_(1e6)  # so that the update moves nothing and the offsets fit what is there
    mixture.observe(x, beta=beta)
    masses = mixture.responsibilities(x).sum(0) / (len(x) / K)
    torch.testing.assert_close(masses, torch.ones(K), rtol=0, atol=0.05)
    prototypes = MixturePrototypes(mixture)
    targets = prototypes.posterior(x.view(2, 128, D), 0.04).dense().flatten(0, 1)
    torch.testing.assert_close(targets, mixture.responsibilities(x))
    torch.testing.assert_close(mixture.targets(x).dense(), mixture.responsibilities(x))


def test_beta_of_the_last_update_is_part_of_the_state():
    mixture, other = (OnlineMixture(K, D, 64, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    mixture.observe(rows(64, 0), beta=0.2)
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.responsibilities(rows(5, 1)), mixture.responsibilities(rows(5, 1)))
    assert not torch.allclose(mixture.responsibilities(rows(5, 1), 1.0), mixture.responsibilities(rows(5, 1)))


def test_bayes_rule_with_a_fixed_temperature_has_the_learned_weights():
    mixture = OnlineMixture(K, D, 64, balance="none", temperature=0.1, centred=False)
    mixture.evidence.copy_(torch.linspace(1, 9, K))
    x = rows(10, 0)
    logits = x @ F.normalize(mixture.mean, dim=-1).T / 0.1 + (mixture.evidence / mixture.evidence.sum()).log()
    torch.testing.assert_close(mixture.responsibilities(x), torch.softmax(logits, -1))
    torch.testing.assert_close(mixture.targets(x).dense(), torch.softmax(logits, -1))


def test_plain_defaults_are_the_recommended_mixture():
    """The clustering that keeps its components is what one gets without asking; `decoupled` trains with another one."""
    plain, named = OnlineMixture(K, D, 64), OnlineMixture(K, D, 64, **RECOMMENDED._asdict())
    chosen = build_prototypes(PrototypeConfig("decoupled", count=K), D, 64, 0).mixture
    names = ("covariance", "balance", "temperature", "centred", "renewed", "log_lambda", "variance_floor", "iterations")
    assert {n: getattr(plain, n) for n in names} == {n: getattr(named, n) for n in names}
    assert RECOMMENDED == ("isotropic", 60.0, "sinkhorn", None, True, 0.0)
    assert (chosen.covariance, chosen.balance, chosen.centred, chosen.renewed) == ("shared", "sinkhorn", True, 1.0)


def test_the_paper_s_letter_is_a_named_alternative():
    literal = OnlineMixture(K, D, 64, **PAPER._asdict())
    chosen = build_prototypes(PrototypeConfig("decoupled-paper", count=K), D, 64, 0)
    names = ("covariance", "balance", "temperature", "centred", "log_lambda")
    assert {n: getattr(literal, n) for n in names} == {n: getattr(chosen.mixture, n) for n in names}
    assert (literal.covariance, literal.balance, literal.centred) == ("diagonal", "none", False)
    changed = PrototypeConfig("decoupled-paper", count=K, mixture=MixtureConfig(balance="sinkhorn", centred=True))
    mixture = build_prototypes(changed, D, 64, 0).mixture
    assert (mixture.covariance, mixture.balance, mixture.centred) == ("diagonal", "sinkhorn", True)


def test_a_checkpoint_with_a_queue_still_loads():
    """Versions that could balance over earlier rows as well wrote them down."""
    mixture, other = OnlineMixture(K, D, 64), OnlineMixture(K, D, 64)
    mixture.observe(rows(64, 0))
    old = {f"mixture.{name}": value for name, value in mixture.state_dict().items() if name != "beta"}
    old |= {"mixture.queue": torch.randn(7, D), "mixture.queued": torch.tensor(7)}
    MixturePrototypes(other).load_state_dict(old)
    assert torch.equal(other.responsibilities(rows(5, 1)), mixture.responsibilities(rows(5, 1)))


@pytest.mark.parametrize("key", ["queue", "top", "renew_steps"])
def test_a_configuration_with_an_option_of_before(key):
    """Every run's own copy of its configuration had the key; only one that used it cannot go on as it was."""
    old = {"prototypes": {"kind": "decoupled", "mixture": {key: None, "covariance": "shared"}}}
    assert build_config(old).prototypes.mixture.covariance == "shared"
    assert old["prototypes"]["mixture"][key] is None  # the caller's own stays as it was
    used = {"prototypes": {"kind": "decoupled", "mixture": {key: 4096}}}
    with pytest.raises(ConfigError, match=rf"prototypes\.mixture\.{key}: .*removed"):
        build_config(used)
    assert build_config(used, retired=True).prototypes.kind == "decoupled"  # to look at what it made


def test_removed_options_that_were_not_used_are_passed_over():
    old = {"prototypes": {"mixture": {"whiten": "none", "renew": "oldest", "renew_until": 1.0, "assignment": None}}}
    assert build_config(old) == build_config({})
    with pytest.raises(ConfigError, match="whiten: this option was removed"):
        build_config({"prototypes": {"mixture": {"whiten": "centred"}}})
