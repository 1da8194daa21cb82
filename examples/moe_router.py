"""A mixture-of-experts router, looked at as prototypes: the rows of its weight are what tokens are compared with.

    python examples/moe_router.py

A small classifier of scikit-learn's digits sends each row of pixels to one of its experts. Without a balancing term a
few experts take everything; with Switch Transformer's, the work is spread. N_eff(ε) counts experts whose directions
are alike as one: an expert that is used but is a copy of another one is not a second expert.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from uncollapse import effective_prototypes, unique_prototypes, usage_counts, used_prototypes

DIGITS = load_digits()
TOKENS = torch.tensor(DIGITS.images, dtype=torch.float32) / 16  # (1797, 8 tokens, 8 pixels)
LABELS = torch.tensor(DIGITS.target)
EXPERTS, DIM = 32, 16


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, DIM)
        self.place = nn.Parameter(0.5 * torch.randn(8, DIM))
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / DIM**0.5)
        self.head = nn.Linear(8 * DIM, 10)

    def forward(self, tokens):
        """Class scores, the router's probabilities, and the expert of each token."""
        x = self.embed(tokens) + self.place
        p = self.router(x).softmax(-1)
        gate, expert = p.max(-1)
        x = x + gate.unsqueeze(-1) * torch.einsum("ntd,ntde->nte", x, self.experts[expert]).relu()
        return self.head(x.flatten(1)), p, expert


def train(balance, steps):
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        chosen = torch.randint(len(TOKENS), (64,))
        scores, p, expert = model(TOKENS[chosen])
        share = usage_counts(expert, EXPERTS) / expert.numel()
        loss = F.cross_entropy(scores, LABELS[chosen]) + balance * EXPERTS * (share * p.mean((0, 1))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def measure(model):
    scores, _, expert = model(TOKENS)
    counts, w = usage_counts(expert, EXPERTS), model.router.weight
    return {
        "accuracy": float((scores.argmax(-1) == LABELS).double().mean()),
        "unique": unique_prototypes(w, eps=0.1),
        "used": used_prototypes(counts),
        "effective": effective_prototypes(counts, w, eps=0.1),
    }


def main(steps=200):
    results = {balance: measure(train(balance, steps)) for balance in (0.0, 0.1)}
    for balance, row in results.items():
        experts = f"{row['used']} used, N_eff {row['effective']:.1f} of {EXPERTS} experts, {row['unique']} unique"
        print(f"balancing x {balance}: {experts}; accuracy {row['accuracy']:.2f}")
    return results


if __name__ == "__main__":
    main()
