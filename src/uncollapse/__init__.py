"""uncollapse: prototypical self-supervised learning whose prototypes do not collapse.

The pieces a training loop of your own may want are importable from here; they load on first use, so that the
command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uncollapse.diagnosis import Diagnosis as Diagnosis
    from uncollapse.diagnosis import diagnose as diagnose
    from uncollapse.diversity import koleo_proto as koleo_proto
    from uncollapse.losses import dino_loss as dino_loss
    from uncollapse.losses import fused_dino_loss as fused_dino_loss
    from uncollapse.metrics import prototype_report as prototype_report
    from uncollapse.mixture import OnlineMixture as OnlineMixture
    from uncollapse.monitor import PrototypeMonitor as PrototypeMonitor
    from uncollapse.unique import epsilon_sweep as epsilon_sweep
    from uncollapse.unique import unique_prototypes as unique_prototypes

__version__ = "0.1.0"

_HOMES = {
    "Diagnosis": "diagnosis",
    "OnlineMixture": "mixture",
    "PrototypeMonitor": "monitor",
    "diagnose": "diagnosis",
    "dino_loss": "losses",
    "epsilon_sweep": "unique",
    "fused_dino_loss": "losses",
    "koleo_proto": "diversity",
    "prototype_report": "metrics",
    "unique_prototypes": "unique",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")
    return getattr(import_module(f"uncollapse.{_HOMES[name]}"), name)
