"""lightly's DINO with its last layer replaced by the decoupled mixture, which no gradient touches.

    python examples/lightly_dino_mixture.py

Trains on scikit-learn's digits with the layer that DINO learns, and with the mixture in its place. The student's head
ends in the mixture; the teacher's head ends in its projections, from which the mixture learns and makes the targets.
lightly's loss goes with its layer: its centre and its teacher's temperature have no place beside a mixture.
"""

import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from sklearn.datasets import load_digits
from torch import nn

from uncollapse import (
    MixtureLayer,
    effective_prototypes,
    fused_dino_loss_on_logits,
    prototype_argmax,
    prototypes_of,
    usage_counts,
    used_prototypes,
)

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
PROTOTYPES, DIM, BATCH, EPS = 256, 32, 64, 0.025


def view(x):
    """A random shift by a pixel, and noise."""
    return x.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3)) + 0.2 * torch.randn_like(x)


def network():
    layers = nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()
    return nn.Sequential(*layers, DINOProjectionHead(128, 128, DIM, PROTOTYPES, batch_norm=True))


def train(decoupled, steps):
    """Returns the student, whose last layer has the prototypes."""
    torch.manual_seed(0)
    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    if decoupled:
        mixture = MixtureLayer(PROTOTYPES, DIM, rows=2 * BATCH)
        student[-1].last_layer, teacher[-1].last_layer = mixture, nn.Identity()
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(PROTOTYPES, warmup_teacher_temp_epochs=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        update_momentum(student, teacher, m=0.99)
        batch = IMAGES[torch.randint(len(IMAGES), (BATCH,))]
        views = [view(batch), view(batch)]
        from_teacher = torch.stack([teacher(x) for x in views])
        if decoupled:
            mixture.update(from_teacher)  # once per step, before the student sees its directions
            targets = mixture.targets(from_teacher).dense()
            loss = fused_dino_loss_on_logits([student(x) for x in views], list(targets), temperature=0.1)
        else:
            loss = criterion(list(from_teacher), [student(x) for x in views])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


@torch.no_grad()
def measure(student):
    prototypes = prototypes_of(student)
    z = F.normalize(student[-1].layers(student[:-1](IMAGES)), dim=-1)  # what goes into the last layer
    counts = usage_counts(prototype_argmax(z, prototypes), PROTOTYPES)
    return {"used": used_prototypes(counts), "effective": effective_prototypes(counts, prototypes, EPS)}


def main(steps=200):
    results = {name: measure(train(name == "decoupled", steps)) for name in ("joint", "decoupled")}
    for name, row in results.items():
        print(f"{name}: {row['used']} of {PROTOTYPES} prototypes used by 1,797 digits, N_eff {row['effective']:.1f}")
    return results


if __name__ == "__main__":
    main()
