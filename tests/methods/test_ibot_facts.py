"""What iBOT's released code does beyond its equations, and so do we."""

import pytest
import torch

from steps import Steps, small


def test_separate_prototypes_share_the_mlp_of_the_head():
    shared, separate = Steps(small("ibot")).state, Steps(small("ibot-separate")).state
    assert separate.parts.names() == ["cls", "patch"]
    assert list(separate.student.heads) == list(shared.student.heads) == ["cls"]
    assert [n for n, _ in separate.student.named_parameters()] == [n for n, _ in shared.student.named_parameters()]


def test_the_patches_centre_moves_where_nothing_is_hidden():
    """It is the mean over all patches, hidden or not."""
    steps = Steps(small("ibot", **{"method.masked_crops": 0.0}))
    done = steps.take()
    assert done.terms["patch"] == 0
    assert steps.state.memory["center_patch"].norm() > 0


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_centre_of_probabilities_takes_a_step_where_nothing_is_hidden(hidden):
    steps = Steps(small("ibot-vmf", **{"method.masked_crops": hidden}))
    steps.take()
    assert steps.state.memory["center_patch"].isfinite().all()
    assert bool(steps.state.memory["center_patch"].any()) == bool(hidden)


def test_the_mask_token_decays():
    state = Steps(small("ibot")).state
    token = state.student.backbone.mask_token
    roles = [g["role"] for g in state.optimizer.param_groups if any(p is token for p in g["params"])]
    assert roles == ["decay"]


def test_what_is_hidden_is_hidden_before_positions_are_added():
    """Two hidden patches differ by their positions alone; and what is behind them does not matter."""
    encoder = Steps(small("ibot")).state.student.eval()
    backbone = encoder.backbone
    with torch.no_grad():
        backbone.mask_token.normal_()
    x = torch.randn(3, 3, 32, 32)
    everything = torch.ones(3, 16, dtype=torch.bool)
    _, tokens = backbone.tokens(x, everything)
    torch.testing.assert_close(tokens[0], tokens[1])
    assert (tokens[0, 0] - tokens[0, 1]).norm() > 1e-3
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True
    behind = x.clone()
    behind[:, :, 8:16, 8:16] = 7.0  # the sixth of 4 × 4 patches
    torch.testing.assert_close(backbone.tokens(behind, mask), backbone.tokens(x, mask))
