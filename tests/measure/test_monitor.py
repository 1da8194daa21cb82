"""The monitor in a loop that is not ours: what it counts, and that it is a module like any other."""

import pytest
import torch
from torch import nn

from uncollapse import PrototypeMonitor


def test_alive_is_what_was_an_argmax_within_the_window():
    monitor = PrototypeMonitor(prototypes=5, rows=3, window=2)
    monitor.observe_argmax(torch.tensor([0, 1, 1]))
    assert not monitor.window_full
    monitor.observe(torch.eye(5)[[2, 3]])
    assert (monitor.alive(), monitor.calls, monitor.window_full) == (4, 2, True)
    monitor.observe_projections(torch.eye(5)[[4]], torch.eye(5))
    assert monitor.alive() == 3
    assert PrototypeMonitor(100, rows=8).window == 250
    assert monitor.sweep(torch.eye(5)) == {"0.025": 5, "0.1": 5, "0.25": 5, "0.5": 5}


def test_it_is_checkpointed_and_moved_with_the_model_it_belongs_to():
    model = nn.Linear(3, 4)
    model.monitor = PrototypeMonitor(4, rows=2)
    model.monitor.observe_argmax(torch.tensor([1, 2]))
    assert not list(model.monitor.parameters())
    again = nn.Linear(3, 4)
    again.monitor = PrototypeMonitor(4, rows=1)
    again.load_state_dict(model.state_dict())
    assert (again.monitor.alive(), again.monitor.calls, again.monitor.window) == (2, 1, model.monitor.window)
    assert {b.device.type for b in model.to("meta").monitor.buffers()} == {"meta"}


def test_what_an_earlier_version_saved_is_read():
    monitor = PrototypeMonitor(4, rows=2)
    monitor.load_state_dict({"calls": 7, "window": 3, "last_used": torch.tensor([7, 6, 2, -1])})
    assert (monitor.calls, monitor.window, monitor.alive()) == (7, 3, 2)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="need prototypes and rows"):
        PrototypeMonitor(0, rows=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_projections_of_any_float_type_are_compared_in_float32_at_least(dtype):
    random = torch.Generator().manual_seed(0)
    vectors, z = torch.randn(300, 8, generator=random), torch.randn(64, 8, generator=random).to(dtype)
    monitor = PrototypeMonitor(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        monitor.observe_projections(z, vectors)
    expected = (z.double() @ vectors.double().T).argmax(1).unique()
    assert monitor.last_used.add(1).nonzero()[:, 0].tolist() == expected.tolist()
