"""Prototypes are found on a model by the names that others give their layer, or where the user says."""

import pytest
import torch
from torch import nn

from uncollapse import MixtureLayer, OnlineMixture, prototypes_of

K, D = 12, 4


def head(**layers):
    return nn.ModuleDict({"mlp": nn.Linear(D, D), **layers})


def weight_normed(old):
    layer = nn.Linear(D, K, bias=False)
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    return wrap(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("old", [True, False])
def test_the_teachers_last_layer_is_taken_as_it_is_now(old):
    model = nn.ModuleDict({f"{side}_head": head(last_layer=weight_normed(old)) for side in ("student", "teacher")})
    layer = model["teacher_head"]["last_layer"]
    directions = layer.weight_v if old else layer.parametrizations.weight.original1
    with torch.no_grad():
        directions.normal_()  # after the last forward pass, as a teacher's average does
    w = prototypes_of(model)
    assert w.requires_grad  # for a term in the loss
    unit = nn.functional.normalize
    torch.testing.assert_close(unit(w), unit(directions.detach()))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.ModuleDict({"prototypes": nn.Linear(D, K, bias=False)}), lambda m: m["prototypes"].weight),
        (nn.ParameterDict({"prototypes": torch.randn(K, D)}), lambda m: m["prototypes"]),
        (head(last_layer=MixtureLayer(K, D, 8)), lambda m: m["last_layer"].mixture.directions()),
        (head(prototypes=OnlineMixture(K, D, 8)), lambda m: m["prototypes"].directions()),
        (nn.Linear(D, K, bias=False), lambda m: m.weight),  # the only matrix there is
    ],
)
def test_found_by_name(model, expected):
    assert torch.equal(prototypes_of(model), expected(model))


def test_given_as_a_path_a_layer_a_matrix_or_a_function():
    model = head(experts=nn.Linear(D, K))
    for where in (
        "experts",
        "experts.weight",
        model["experts"],
        model["experts"].weight,
        lambda m: m["experts"].weight,
    ):
        assert torch.equal(prototypes_of(model, where), model["experts"].weight)


def test_what_is_not_found_says_what_to_pass():
    model = head(experts=nn.Linear(D, K))
    with pytest.raises(
        ValueError, match=r"no prototypes found on ModuleDict; pass prototypes=.*'experts.weight' \(12, 4\)"
    ):
        prototypes_of(model)
    with pytest.raises(ValueError, match=r"no layer 'expert' on ModuleDict; pass prototypes=.*'experts.weight'"):
        prototypes_of(model, "expert")
    with pytest.raises(ValueError, match="no matrix either"):
        prototypes_of(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"BatchNorm1d gives shape \(3,\) of torch.float32, not prototypes"):
        prototypes_of(nn.Sequential(nn.BatchNorm1d(3)), "0")


def test_of_several_sets_one_has_to_be_named():
    model = head(last_layer=nn.Linear(D, K, bias=False), last_layer2=nn.Linear(D, K, bias=False))
    with pytest.raises(ValueError, match=r"several sets of prototypes.*'last_layer', 'last_layer2'"):
        prototypes_of(model)
    assert torch.equal(prototypes_of(model, "last_layer2"), model["last_layer2"].weight)
