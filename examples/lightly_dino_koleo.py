"""lightly's DINO with KoLeo-Proto added: one line in the loss.

    python examples/lightly_dino_koleo.py

Trains the same small DINO on scikit-learn's digits without and with that line, and counts how many of its prototypes
are different from one another. Their learning rate is high, so that seconds show what takes long runs many epochs.
"""

import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from sklearn.datasets import load_digits
from torch import nn

from uncollapse import effective_prototypes, koleo_proto, prototype_argmax, unique_prototypes, usage_counts

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
PROTOTYPES, DIM, EPS = 512, 16, 0.25


def view(x):
    """A random shift by a pixel, and noise."""
    return x.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3)) + 0.2 * torch.randn_like(x)


def network():
    layers = nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()
    return nn.Sequential(*layers, DINOProjectionHead(128, 128, DIM, PROTOTYPES, batch_norm=True))


def train(koleo, steps):
    """DINO with ``koleo`` times KoLeo-Proto in its loss; returns the teacher."""
    torch.manual_seed(0)
    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    last_layer = student[-1].last_layer
    criterion = DINOLoss(PROTOTYPES, teacher_temp=0.07, warmup_teacher_temp_epochs=0)
    rest = [p for name, p in student.named_parameters() if "last_layer" not in name]
    groups = [{"params": rest}, {"params": [last_layer.weight_v], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.04)
    for _ in range(steps):
        update_momentum(student, teacher, m=0.99)
        batch = IMAGES[torch.randint(len(IMAGES), (64,))]
        views = [view(batch), view(batch)]
        loss = criterion([teacher(x) for x in views], [student(x) for x in views])
        loss = loss + koleo * koleo_proto(last_layer.weight_v)  # the line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval()


@torch.no_grad()
def measure(teacher):
    head = teacher[-1]
    prototypes = head.last_layer.weight_v
    z = F.normalize(head.layers(teacher[:-1](IMAGES)), dim=-1)  # what goes into the last layer
    counts = usage_counts(prototype_argmax(z, prototypes), PROTOTYPES)
    return {
        "unique": unique_prototypes(prototypes, EPS),
        "effective": effective_prototypes(counts, prototypes, EPS),
    }


def main(steps=150):
    results = {koleo: measure(train(koleo, steps)) for koleo in (0.0, 0.1)}
    for koleo, row in results.items():
        print(
            f"KoLeo-Proto x {koleo}: {row['unique']} of {PROTOTYPES} unique at ε = {EPS}, N_eff {row['effective']:.1f}"
        )
    return results


if __name__ == "__main__":
    main()
