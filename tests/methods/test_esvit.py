"""EsViT's two terms and two centres beside brute force in float64, and which regions the network gives for them."""

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, batch_of, small
from uncollapse.config.load import load_config
from uncollapse.errors import ConfigError
from uncollapse.methods import esvit
from uncollapse.methods.contract import At, Batch
from uncollapse.models.network import Projected
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.training.state import build_state

N, D, K, WIDE, REGIONS, FEW = 3, 6, 9, 5, 7, 4
START = At(0, 0.0, 0.0, 0, None)


class Made:
    """Projections and features of every region of every view, as a network would give them, and sets and centres."""

    def __init__(self, locals_=2):
        g = torch.Generator().manual_seed(0)

        def unit(*shape):
            return F.normalize(torch.randn(*shape, D, generator=g, dtype=torch.float64), dim=-1)

        self.student, self.teacher = unit(2 + locals_, N).requires_grad_(), unit(2, N)
        regions = [REGIONS, REGIONS, *[FEW] * locals_]
        self.student_regions = [unit(N, t).requires_grad_() for t in regions]
        self.teacher_regions = [unit(N, REGIONS) for _ in range(2)]
        self.student_features = [torch.randn(N, t, WIDE, generator=g, dtype=torch.float64) for t in regions]
        self.teacher_features = [torch.randn(N, REGIONS, WIDE, generator=g, dtype=torch.float64) for _ in range(2)]
        self.sets = {name: JointPrototypes(K, D, True, 0.0, g).double() for name in ("cls", "region")}
        for prototypes in self.sets.values():
            prototypes.teacher_v.normal_(generator=g)
        centres = ("center", "center_region")
        self.memory = {name: 0.1 * torch.randn(K, generator=g, dtype=torch.float64) for name in centres}
        images = torch.zeros(N, 3, 1, 1)
        views = {"global": [images] * 2, **({"local": [images] * locals_} if locals_ else {})}
        self.batch = Batch(views, {}, torch.zeros(2 + locals_, N, dtype=torch.long))

    def net(self, views, keys=None):
        if keys is not None:  # the student's, which may have stochastic depth
            return self.projected(self.student, self.student_regions, self.student_features)
        assert len(views) == 2
        return self.projected(self.teacher, self.teacher_regions, self.teacher_features)

    @staticmethod
    def projected(cls, regions, features):
        return Projected(cls, None, None, cls, region=regions, region_features=features)

    def weights(self, name, side):
        prototypes = self.sets[name]
        v, g = (getattr(prototypes, f"{side}_{x}") for x in "vg")
        return v / v.norm(dim=1, keepdim=True) * g

    def learned(self):
        return [
            self.student,
            *self.student_regions,
            *(p for s in self.sets.values() for p in (s.student_v, s.student_g)),
        ]


def config(**keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "teacher.temperature_start": 0.05}
    return load_config("esvit-swint7", {**few, **keys})


def terms_of(c, made):
    student = esvit.see_student(c, made.net, made.batch)
    teacher = esvit.see_teacher(c, made.net, made.batch.only("global"), None)
    targets = esvit.assign(c, teacher, made.sets, made.memory, START)
    return esvit.objective(c, student, targets, made.sets, START), teacher


def brute(made):
    """The released code's two halves, one cross-entropy at a time."""

    def cross(student, teacher, name, center):
        target = torch.softmax((made.weights(name, "teacher") @ teacher - made.memory[center]) / 0.05, 0).detach()
        return -(target * torch.log_softmax(made.weights(name, "student") @ student / 0.1, 0)).sum()

    pairs = [(v, q) for v in range(len(made.student)) for q in range(2) if v != q]
    views, regions = torch.zeros(2, dtype=torch.float64)
    for v, q in pairs:
        for i in range(N):
            views = views + cross(made.student[v, i], made.teacher[q, i], "cls", "center") / N
            own = made.student_regions[v][i]
            for r in range(len(own)):
                feature, theirs = made.student_features[v][i, r], made.teacher_features[q][i]
                nearest = max(range(REGIONS), key=lambda j: float(F.cosine_similarity(feature, theirs[j], dim=0)))
                target = made.teacher_regions[q][i, nearest]
                regions = regions + cross(own[r], target, "region", "center_region") / len(own) / N
    return {"cls": views / len(pairs), "region": regions / len(pairs)}


@pytest.mark.parametrize(("locals_", "share"), [(2, 0.5), (0, 0.5), (2, 0.2)])
def test_terms_and_gradients_are_the_papers(locals_, share):
    made = Made(locals_)
    terms, _ = terms_of(config(**{"method.region_weight": share, "views.local_count": locals_}), made)
    expected = brute(made)
    expected = {"cls": (1 - share) * expected["cls"], "region": share * expected["region"]}
    assert list(terms) == list(expected)
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term, rtol=1e-9, atol=0)
    one, other = (torch.autograd.grad(sum(t.values()), made.learned()) for t in (terms, expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_nearest_region_is_by_cosine_not_by_product():
    """The longest feature would win every product."""
    student = torch.tensor([[[1.0, 0.2]]])
    teacher = torch.tensor([[[3.0, 9.0], [0.1, 0.0], [-5.0, 0.0]]])
    assert (student @ teacher.mT).argmax(-1).item() == 0
    assert esvit.nearest_regions(student, teacher).item() == 1


def test_each_centre_is_of_its_own_teacher_logits():
    c, made = config(), Made()
    _, teacher = terms_of(c, made)
    was = {name: t.clone() for name, t in made.memory.items()}
    esvit.remember(c, teacher, made.sets, made.memory, START)
    rows = {"center": ("cls", made.teacher), "center_region": ("region", torch.stack(made.teacher_regions))}
    for name, (of, z) in rows.items():
        logits = torch.stack([made.weights(of, "teacher") @ row for row in z.reshape(-1, D)])
        torch.testing.assert_close(made.memory[name], 0.9 * was[name] + 0.1 * logits.mean(0).detach())


SMALL_VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
BACKBONES = {
    "Swin": ({}, (16, 4)),
    "conv3": ({"backbone.name": "conv3", "backbone.options": {}}, (16, 4)),
    "ViT": ({"backbone.name": "vit_tiny_patch16_224", "backbone.options": SMALL_VIT}, (16, 4)),
    "ResNet": ({"backbone.name": "resnet10t", "backbone.options": {}}, (1, 1)),
}
"""Keys, and how many regions a global and a local view have."""


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_network_gives_every_region_of_every_view(backbone):
    """Those of local views too, each image as if it were alone; the class feature is the backbone's own."""
    keys, places = BACKBONES[backbone]
    steps = Steps(small("esvit", **keys))
    c, net = steps.config, steps.state.student.eval()
    batch = batch_of(c, steps.state, 0)
    views = [*batch.views["global"], *batch.views["local"]]
    with torch.no_grad():
        seen = esvit.see_student(c, net, batch)
        levels = ["region"] * 2 + [esvit.LOCAL] * 2
        for v, (level, view) in enumerate(zip(levels, views, strict=True)):
            z, features = seen.z[level][v % 2], seen.features[level][v % 2]
            assert features.shape[:2] == z.shape[:2] == (c.run.batch, places[level == esvit.LOCAL])
            torch.testing.assert_close(seen.z["cls"][v], net.head(net.backbone(view)), rtol=0, atol=2e-5)
            one = esvit.see_teacher(c, net, Batch({"global": [view[3:4]]}, {}, batch.keys[:1, :1]), None)
            torch.testing.assert_close(features[3], one.features["region"][0, 0], rtol=0, atol=2e-5)
            torch.testing.assert_close(z[3], one.z["region"][0, 0], rtol=0, atol=2e-5)
            torch.testing.assert_close(z, net.heads["region"](features), rtol=0, atol=2e-5)


def test_a_feature_of_a_swin_is_the_mean_of_its_regions():
    """As in the released code; what pairs with a region is what the view's feature is made of."""
    net = Steps(small("esvit")).state.student.eval()
    with torch.no_grad():
        out = net([torch.randn(3, 3, 32, 32)])
    torch.testing.assert_close(out.region_features[0].mean(1), out.features[0])


def test_a_region_counts_in_the_mixture_as_its_share_of_two_views():
    """32 images × 2 views × 16 regions are no more evidence a step than the 64 class tokens of the same views."""
    steps = Steps(small("esvit", "decoupled"))
    observed = {}
    for name, prototypes in steps.state.by_name.items():
        prototypes.observe = lambda z, progress, weight=None, name=name: observed.update({name: (len(z), weight)})
    steps.take()
    batch = steps.config.run.batch
    assert observed["cls"] == (2 * batch, None)
    count, weight = observed["region"]
    assert count == 2 * batch * 16
    assert weight.sum() == pytest.approx(2 * batch)


@pytest.mark.parametrize(("method", "name"), [("esvit", "region"), ("ibot-separate", "patch"), ("wessl", "head2")])
def test_alive_is_counted_on_as_many_tokens_as_images(method, name):
    """So that it means the same for every set: a window is 20 rows for each prototype's fair share."""
    steps = Steps(small(method, **({"method.masked_crops": 1.0} if method == "ibot-separate" else {})))
    watched = []
    monitor = steps.state.monitors[name]
    monitor.observe_projections = lambda z, vectors: watched.append(len(z))
    for _ in range(2):
        steps.take()
    assert watched == [steps.config.run.batch] * 2


def test_a_backbone_without_regions_is_refused_before_training(monkeypatch):
    monkeypatch.setattr("uncollapse.models.network.has_regions", lambda backbone: False)
    with pytest.raises(ConfigError, match=r"backbone\.name: .* gives no regions"):
        build_state(small("esvit"))
