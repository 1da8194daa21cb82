"""Every metric: how it is made and fed, and the function that says what it must come to."""

import torch

import uncollapse as un

K, D, EPS = 40, 8, 0.1


def made(n=24, seed=0):
    """Prototypes with duplicates, and three batches of projections ``(V, n, D)``."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(K, D, generator=random)
    w[K // 2 :] = w[: K // 2] + 0.1 * torch.randn(K // 2, D, generator=random)
    base = torch.randn(3, 1, n, D, generator=random)
    return w, base + 0.3 * torch.randn(3, 2, n, D, generator=random)


def counts(z, w):
    return un.usage_counts(un.prototype_argmax(z, w), len(w))


EXPECTED = {
    "UniquePrototypesMetric": lambda z, w: un.unique_prototypes(w, EPS),
    "NearestCosineMetric": lambda z, w: un.nearest_cosine(w),
    "UsedPrototypesMetric": lambda z, w: un.used_prototypes(counts(z[0], w)),
    "UniqueAmongUsedMetric": lambda z, w: un.unique_among_used(w, counts(z[0], w), EPS),
    "EffectivePrototypesMetric": lambda z, w: un.effective_prototypes(counts(z[0], w), w, EPS),
    "AlivePrototypesMetric": lambda z, w: un.used_prototypes(counts(z[0], w)),  # the window holds all calls
    "ViewInformationMetric": lambda z, w: un.view_information(z, w).bits,
    "EffectiveRankMetric": lambda z, w: un.effective_rank(z[0]),
}


WITH_EPS = {"UniquePrototypesMetric", "UniqueAmongUsedMetric", "EffectivePrototypesMetric"}


def new(name):
    if name == "AlivePrototypesMetric":
        return un.AlivePrototypesMetric(K, rows=1)
    return getattr(un, name)(EPS) if name in WITH_EPS else getattr(un, name)()


def feed(metric, z, w):
    """One batch ``(V, n, D)``, as each metric takes it."""
    name = type(metric).__name__
    if name in ("UniquePrototypesMetric", "NearestCosineMetric"):
        metric.update(w)
    elif name == "EffectiveRankMetric":
        metric.update(z[0])
    else:
        metric.update(z if name == "ViewInformationMetric" else z[0], w)
