"""Tokens as a network would give them, small enough for brute force in float64."""

import torch
import torch.nn.functional as F

from uncollapse.methods.contract import Batch
from uncollapse.models.network import Projected
from uncollapse.prototypes.sets import JointPrototypes

N, D, K, P, LOCALS = 5, 6, 9, 7, 2
"""Images, length of a projection, prototypes, patches, local views."""


class Made:
    """Tokens of every patch of every view, as a network would give them, sets, centres and ragged masks."""

    def __init__(self, shared, hidden=True, patch_dim=D):
        g = torch.Generator().manual_seed(0)

        def unit(*shape, dim=D):
            return F.normalize(torch.randn(*shape, dim, generator=g, dtype=torch.float64), dim=-1)

        self.student, self.teacher = unit(2 + LOCALS, N).requires_grad_(), unit(2, N)
        self.student_patches = unit(2, N, P, dim=patch_dim).requires_grad_()
        self.teacher_patches = unit(2, N, P, dim=patch_dim)
        self.mask = torch.rand(2, N, P, generator=g) < 0.4
        self.mask[0, 1] = False  # a crop without a mask
        self.mask[1, 2] = True  # and one hidden altogether
        self.mask &= hidden
        dims = {"cls": D} if shared else {"cls": D, "patch": patch_dim}
        self.sets = {name: JointPrototypes(K, dim, True, 0.0, g).double() for name, dim in dims.items()}
        for prototypes in self.sets.values():
            prototypes.teacher_v.normal_(generator=g)
        self.memory = {n: 0.1 * torch.randn(K, generator=g, dtype=torch.float64) for n in ("center", "center_patch")}
        images = torch.zeros(N, 3, 1, 1)
        views = {"global": [images] * 2, "local": [images] * LOCALS}
        self.features = 3 * torch.randn(2 + LOCALS, N, 4, generator=g, dtype=torch.float64)
        self.features.requires_grad_()
        self.batch = Batch(views, {"global": self.mask}, torch.zeros(2 + LOCALS, N, dtype=torch.long))

    def net(self, views, keys=None, read=None, hide=False, mean=False):
        student = len(views) > 2
        assert hide == student, "patches are hidden from the student alone"
        patches = self.student_patches if student else self.teacher_patches
        average = patches.mean((0, 1, 2)) if mean else None
        cls, features = (self.student, self.features) if student else (self.teacher, self.features[:2].detach())
        return Projected(cls, patches[read], average, features)

    def weights(self, name, side):
        prototypes = self.sets[name]
        v, g = (getattr(prototypes, f"{side}_{x}") for x in "vg")
        return v / v.norm(dim=1, keepdim=True) * g
