"""A vector-quantisation codebook, looked at as prototypes: which codes are used, and how many differ.

    python examples/vq_codebook.py

A small VQ autoencoder of scikit-learn's digits, with codes on the unit sphere. Its codebook is learned by the gradient,
as in VQ-VAE, where most codes die; or it is the online mixture, whose components are kept alive.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from uncollapse import OnlineMixture, effective_prototypes, prototype_argmax, usage_counts, used_prototypes

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16  # (1797, 64)
CODES, DIM, SLOTS, BATCH = 256, 32, 2, 64  # each image is written with two codes


def train(mixture, steps):
    """Returns the encoder, the decoder and the codebook (K, D)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, SLOTS * DIM), nn.Unflatten(1, (SLOTS, DIM)))
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(SLOTS * DIM, 128), nn.ReLU(), nn.Linear(128, 64))
    learned = nn.Parameter(F.normalize(torch.randn(CODES, DIM), dim=-1))
    online = OnlineMixture(CODES, DIM, rows=BATCH * SLOTS)
    weights = [*encoder.parameters(), *decoder.parameters(), *([] if mixture else [learned])]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    for _ in range(steps):
        x = IMAGES[torch.randint(len(IMAGES), (BATCH,))]
        z = F.normalize(encoder(x), dim=-1)
        if mixture:
            online.observe(z.detach().flatten(0, 1))  # one EM update, no gradient
        codes = online.directions() if mixture else F.normalize(learned, dim=-1)
        chosen = codes[prototype_argmax(z.flatten(0, 1), codes)].view_as(z)
        passed = z + (chosen - z).detach()  # the straight-through estimate
        loss = (
            F.mse_loss(decoder(passed), x) + 0.1 * F.mse_loss(z, chosen.detach()) + 0.1 * F.mse_loss(chosen, z.detach())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder, codes.detach()


@torch.no_grad()
def measure(encoder, decoder, codes):
    z = F.normalize(encoder(IMAGES), dim=-1)
    code = prototype_argmax(z.flatten(0, 1), codes)
    counts = usage_counts(code, CODES)
    return {
        "used": used_prototypes(counts),
        "effective": effective_prototypes(counts, codes, eps=0.025),
        "error": float(F.mse_loss(decoder(codes[code].view_as(z)), IMAGES)),
    }


def main(steps=200):
    results = {name: measure(*train(name == "mixture", steps)) for name in ("gradient", "mixture")}
    for name, row in results.items():
        used = f"{row['used']} of {CODES} codes used, N_eff {row['effective']:.0f}"
        print(f"codebook by {name}: {used}, reconstruction error {row['error']:.4f}")
    return results


if __name__ == "__main__":
    main()
