"""Configurations inside checkpoints: a stranger's words, which reach neither the network nor the machine's limits."""

import dataclasses

import pytest
import torch

from layouts import T
from uncollapse.config.load import load_config, set_key
from uncollapse.config.tiny import tiny
from uncollapse.diagnosis.run import diagnose_file
from uncollapse.errors import InputError
from uncollapse.training.state import build_state, state_dicts


def own_run(changes: dict) -> dict:
    """A checkpoint of a run of ours whose configuration says something else."""
    config = tiny(load_config("demo"))
    content = dataclasses.asdict(config)
    for key, value in changes.items():
        set_key(content, key, value)
    return {**state_dicts(build_state(config)), "config": content, "format": 1, "step": 3}


HUGE = "larger than the weights"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone.name": "hf-hub:timm/resnet18.a1_in1k", "backbone.options": {}}, "timm has no model"),
        ({"backbone.name": "local-dir:/tmp", "backbone.options": {}}, "timm has no model"),
        ({"backbone.name": "resnet18", "backbone.options": {"checkpoint_path": "/tmp/x"}}, "checkpoint_path is no"),
        ({"backbone.name": "resnet18", "backbone.options": {"pretrained_cfg": {"file": "/x"}}}, "pretrained_cfg"),
        ({"backbone.name": "vit_tiny_patch16_224", "backbone.options": {"depth": 10_000_000}}, "it was not built"),
        ({"backbone.name": "vit_tiny_patch16_224", "backbone.options": {"depth": 16_000}}, HUGE),
        ({"backbone.name": "vit_tiny_patch16_224", "backbone.options": {"img_size": 16_000}}, HUGE),
        ({"backbone.name": "resnet18", "backbone.options": {"layers": [9000, 1, 1, 1]}}, HUGE),
        (
            {
                "backbone.name": "swin_tiny_patch4_window7_224",
                "backbone.options": {"window_size": 150, "img_size": 4800},
            },
            HUGE,
        ),
        ({"backbone.options": {"width": 16_000}}, HUGE),
        ({"head.layers": 16_000}, HUGE),
        ({"head.hidden": 10**9}, "it was not built"),
        ({"views.global_size": 100_000}, "views of 100000 pixels"),
        ({"seed": 10**1000}, "too long"),
        ({"backbone.name": T.w}, "holds a Tensor"),
        ({"backbone": None}, "does not fit|not understood"),
    ],
)
def test_a_configuration_from_a_file_builds_nothing_that_the_file_cannot_fill(changes, says, tmp_path, monkeypatch):
    def called(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", called)
    monkeypatch.setattr("socket.socket.connect", called)
    torch.save(own_run(changes), tmp_path / "a")
    with pytest.raises(InputError, match=says) as caught:
        diagnose_file(tmp_path / "a", data="builtin:digits", limit=10)
    assert "\n" not in str(caught.value)
