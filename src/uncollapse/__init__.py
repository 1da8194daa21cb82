"""uncollapse: prototypical self-supervised learning whose prototypes do not collapse.

The pieces a training loop of your own may want are importable from here; they load on first use, so that the
command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uncollapse.assign import centred_softmax as centred_softmax
    from uncollapse.assign import sinkhorn as sinkhorn
    from uncollapse.assign import sinkhorn_offsets as sinkhorn_offsets
    from uncollapse.carp_loss import fused_carp_loss as fused_carp_loss
    from uncollapse.carp_loss import random_blocks as random_blocks
    from uncollapse.cross_entropy import SoftmaxTargets as SoftmaxTargets
    from uncollapse.diagnosis import Diagnosis as Diagnosis
    from uncollapse.diagnosis import diagnose as diagnose
    from uncollapse.diversity import koleo_proto as koleo_proto
    from uncollapse.diversity import nearest_neighbours as nearest_neighbours
    from uncollapse.logit_loss import fused_dino_loss_on_logits as fused_dino_loss_on_logits
    from uncollapse.losses import dino_loss as dino_loss
    from uncollapse.losses import fused_dino_loss as fused_dino_loss
    from uncollapse.losses import fused_patch_loss as fused_patch_loss
    from uncollapse.losses import patch_weights as patch_weights
    from uncollapse.mean_entropy import me_max as me_max
    from uncollapse.measure.information import ViewInformation as ViewInformation
    from uncollapse.measure.information import view_information as view_information
    from uncollapse.measure.monitor import PrototypeMonitor as PrototypeMonitor
    from uncollapse.measure.unique import epsilon_sweep as epsilon_sweep
    from uncollapse.measure.unique import unique_prototypes as unique_prototypes
    from uncollapse.measure.usage import effective_prototypes as effective_prototypes
    from uncollapse.measure.usage import prototype_report as prototype_report
    from uncollapse.mixture import OnlineMixture as OnlineMixture
    from uncollapse.mixture_layer import MixtureLayer as MixtureLayer
    from uncollapse.vmf import vmf_bias as vmf_bias

__version__ = "0.1.0"

_HOMES = {
    "Diagnosis": "diagnosis",
    "MixtureLayer": "mixture_layer",
    "OnlineMixture": "mixture",
    "PrototypeMonitor": "measure.monitor",
    "SoftmaxTargets": "cross_entropy",
    "ViewInformation": "measure.information",
    "centred_softmax": "assign",
    "diagnose": "diagnosis",
    "dino_loss": "losses",
    "effective_prototypes": "measure.usage",
    "epsilon_sweep": "measure.unique",
    "fused_carp_loss": "carp_loss",
    "fused_dino_loss": "losses",
    "fused_dino_loss_on_logits": "logit_loss",
    "fused_patch_loss": "losses",
    "koleo_proto": "diversity",
    "me_max": "mean_entropy",
    "nearest_neighbours": "diversity",
    "patch_weights": "losses",
    "prototype_report": "measure.usage",
    "random_blocks": "carp_loss",
    "sinkhorn": "assign",
    "sinkhorn_offsets": "assign",
    "unique_prototypes": "measure.unique",
    "view_information": "measure.information",
    "vmf_bias": "vmf",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")
    return getattr(import_module(f"uncollapse.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
