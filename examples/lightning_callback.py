"""PrototypeCallback in a Lightning run that knows nothing of this library.

    python examples/lightning_callback.py

`SwAV` below is an ordinary `LightningModule` with a layer called ``prototypes``. The callback finds it by its name; the
views come from what ``validation_step`` returns. Nothing in the module was written for it.
"""

import logging
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from uncollapse import PrototypeCallback, sinkhorn

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)


def view(x):
    """A random shift by a pixel, and noise."""
    return x.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3)) + 0.2 * torch.randn_like(x)


class SwAV(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)
        )
        self.prototypes = nn.Linear(32, 128, bias=False)

    def training_step(self, batch, _):
        z = [F.normalize(self.encoder(view(batch[0])), dim=-1) for _ in range(2)]
        scores = [self.prototypes(x) for x in z]
        left, right = (sinkhorn(s.detach() / 0.05) for s in scores)
        log_left, log_right = (F.log_softmax(s / 0.1, dim=-1) for s in scores)
        return -(left * log_right + right * log_left).sum(-1).mean() / 2

    def validation_step(self, batch, _):
        return {"projections": torch.stack([F.normalize(self.encoder(view(batch[0])), dim=-1) for _ in range(2)])}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs=3):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(workers|litlogger).*")
    torch.manual_seed(0)
    training, held_out = (TensorDataset(x) for x in (IMAGES[:1297], IMAGES[1297:]))
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[PrototypeCallback(target="projections")],  # the line
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "accelerator": "cpu"},
    )
    trainer.fit(SwAV(), DataLoader(training, 64, shuffle=True, drop_last=True), DataLoader(held_out, 100))
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name} {float(value):.3g}")
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main()
