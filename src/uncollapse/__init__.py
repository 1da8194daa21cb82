"""uncollapse: prototypical self-supervised learning whose prototypes do not collapse.

The pieces a training loop of your own may want are importable from here; they load on first use, so that the
command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uncollapse.diagnosis.result import Diagnosis as Diagnosis
    from uncollapse.diagnosis.run import diagnose as diagnose
    from uncollapse.export.load import Export as Export
    from uncollapse.export.load import load_export as load_export
    from uncollapse.losses.carp import fused_carp_loss as fused_carp_loss
    from uncollapse.losses.carp import random_blocks as random_blocks
    from uncollapse.losses.diversity import hyperspherical_energy as hyperspherical_energy
    from uncollapse.losses.diversity import koleo_features as koleo_features
    from uncollapse.losses.diversity import mst_length as mst_length
    from uncollapse.losses.diversity import orthogonality as orthogonality
    from uncollapse.losses.diversity import repulsion as repulsion
    from uncollapse.losses.diversity import spanning_pairs as spanning_pairs
    from uncollapse.losses.koleo import koleo_proto as koleo_proto
    from uncollapse.losses.koleo import nearest_neighbours as nearest_neighbours
    from uncollapse.losses.logits import fused_dino_loss_on_logits as fused_dino_loss_on_logits
    from uncollapse.losses.mean_entropy import me_max as me_max
    from uncollapse.losses.pairs import dino_loss as dino_loss
    from uncollapse.losses.pairs import fused_dino_loss as fused_dino_loss
    from uncollapse.losses.pairs import fused_patch_loss as fused_patch_loss
    from uncollapse.losses.pairs import patch_weights as patch_weights
    from uncollapse.measure.geometry import effective_rank as effective_rank
    from uncollapse.measure.information import ViewInformation as ViewInformation
    from uncollapse.measure.information import view_information as view_information
    from uncollapse.measure.monitor import PrototypeMonitor as PrototypeMonitor
    from uncollapse.measure.monitor import alive_prototypes as alive_prototypes
    from uncollapse.measure.monitor import nearest_cosine as nearest_cosine
    from uncollapse.measure.unique import epsilon_sweep as epsilon_sweep
    from uncollapse.measure.unique import unique_prototypes as unique_prototypes
    from uncollapse.measure.usage import effective_prototypes as effective_prototypes
    from uncollapse.measure.usage import prototype_argmax as prototype_argmax
    from uncollapse.measure.usage import prototype_report as prototype_report
    from uncollapse.measure.usage import unique_among_used as unique_among_used
    from uncollapse.measure.usage import usage_counts as usage_counts
    from uncollapse.measure.usage import used_prototypes as used_prototypes
    from uncollapse.monitoring.callback import PrototypeCallback as PrototypeCallback
    from uncollapse.monitoring.layer import prototypes_of as prototypes_of
    from uncollapse.monitoring.metrics import AlivePrototypesMetric as AlivePrototypesMetric
    from uncollapse.monitoring.metrics import EffectivePrototypesMetric as EffectivePrototypesMetric
    from uncollapse.monitoring.metrics import EffectiveRankMetric as EffectiveRankMetric
    from uncollapse.monitoring.metrics import NearestCosineMetric as NearestCosineMetric
    from uncollapse.monitoring.metrics import UniqueAmongUsedMetric as UniqueAmongUsedMetric
    from uncollapse.monitoring.metrics import UniquePrototypesMetric as UniquePrototypesMetric
    from uncollapse.monitoring.metrics import UsedPrototypesMetric as UsedPrototypesMetric
    from uncollapse.monitoring.metrics import ViewInformationMetric as ViewInformationMetric
    from uncollapse.prototypes.layer import MixtureLayer as MixtureLayer
    from uncollapse.prototypes.mixture import OnlineMixture as OnlineMixture
    from uncollapse.prototypes.vmf import vmf_bias as vmf_bias
    from uncollapse.targets.sinkhorn import centred_softmax as centred_softmax
    from uncollapse.targets.sinkhorn import sinkhorn as sinkhorn
    from uncollapse.targets.sinkhorn import sinkhorn_offsets as sinkhorn_offsets
    from uncollapse.targets.softmax import SoftmaxTargets as SoftmaxTargets

__version__ = "0.1.0"

_HOMES = {
    "AlivePrototypesMetric": "monitoring.metrics",
    "Diagnosis": "diagnosis.result",
    "EffectivePrototypesMetric": "monitoring.metrics",
    "EffectiveRankMetric": "monitoring.metrics",
    "Export": "export.load",
    "MixtureLayer": "prototypes.layer",
    "NearestCosineMetric": "monitoring.metrics",
    "OnlineMixture": "prototypes.mixture",
    "PrototypeCallback": "monitoring.callback",
    "PrototypeMonitor": "measure.monitor",
    "SoftmaxTargets": "targets.softmax",
    "UniqueAmongUsedMetric": "monitoring.metrics",
    "UniquePrototypesMetric": "monitoring.metrics",
    "UsedPrototypesMetric": "monitoring.metrics",
    "ViewInformation": "measure.information",
    "ViewInformationMetric": "monitoring.metrics",
    "alive_prototypes": "measure.monitor",
    "centred_softmax": "targets.sinkhorn",
    "diagnose": "diagnosis.run",
    "dino_loss": "losses.pairs",
    "effective_prototypes": "measure.usage",
    "effective_rank": "measure.geometry",
    "epsilon_sweep": "measure.unique",
    "fused_carp_loss": "losses.carp",
    "fused_dino_loss": "losses.pairs",
    "fused_dino_loss_on_logits": "losses.logits",
    "fused_patch_loss": "losses.pairs",
    "hyperspherical_energy": "losses.diversity",
    "koleo_features": "losses.diversity",
    "koleo_proto": "losses.koleo",
    "load_export": "export.load",
    "me_max": "losses.mean_entropy",
    "mst_length": "losses.diversity",
    "nearest_cosine": "measure.monitor",
    "nearest_neighbours": "losses.koleo",
    "orthogonality": "losses.diversity",
    "patch_weights": "losses.pairs",
    "prototype_argmax": "measure.usage",
    "prototype_report": "measure.usage",
    "prototypes_of": "monitoring.layer",
    "random_blocks": "losses.carp",
    "repulsion": "losses.diversity",
    "sinkhorn": "targets.sinkhorn",
    "sinkhorn_offsets": "targets.sinkhorn",
    "spanning_pairs": "losses.diversity",
    "unique_among_used": "measure.usage",
    "unique_prototypes": "measure.unique",
    "usage_counts": "measure.usage",
    "used_prototypes": "measure.usage",
    "view_information": "measure.information",
    "vmf_bias": "prototypes.vmf",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")
    return getattr(import_module(f"uncollapse.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
