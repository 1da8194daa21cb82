"""A plain PyTorch loop like SwAV's, with the fused loss and PrototypeMonitor.

    python examples/swav_fused.py

`fused_dino_loss` on Sinkhorn's targets is SwAV's objective: it takes projections and prototypes, and forms the gradient
block by block, so that the (rows, prototypes) array of logits is never kept. The monitor says which prototypes live.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from uncollapse import PrototypeMonitor, fused_dino_loss, sinkhorn

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
PROTOTYPES, DIM, BATCH = 512, 32, 64


def view(x):
    """A random shift by a pixel, and noise."""
    return x.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3)) + 0.2 * torch.randn_like(x)


def main(steps=150):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIM)
    encoder = nn.Sequential(*layers)
    prototypes = nn.Parameter(F.normalize(torch.randn(PROTOTYPES, DIM), dim=-1))
    optimizer = torch.optim.AdamW([*encoder.parameters(), prototypes], lr=3e-3)
    monitor = PrototypeMonitor(PROTOTYPES, rows=2 * BATCH)
    losses = []
    for step in range(steps):
        with torch.no_grad():
            prototypes.copy_(F.normalize(prototypes, dim=-1))  # as SwAV does before every step
        batch = IMAGES[torch.randint(len(IMAGES), (BATCH,))]
        z = [F.normalize(encoder(view(batch)), dim=-1) for _ in range(2)]
        with torch.no_grad():
            targets = [sinkhorn(x @ prototypes.T / 0.05) for x in z]
        loss = fused_dino_loss(z, prototypes, targets, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        monitor.observe_projections(torch.cat(z), prototypes)  # raw: not balanced
        if step % 50 == 49:
            unique = monitor.sweep(prototypes)
            print(f"step {step + 1}: loss {loss:.3f}, {monitor.alive()} of {PROTOTYPES} alive, unique {unique}")
    return {"losses": losses, "alive": monitor.alive(), "unique": monitor.sweep(prototypes), "window": monitor.window}


if __name__ == "__main__":
    main()
