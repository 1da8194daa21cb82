"""View information on made images whose truth is known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score

import uncollapse.measure.information
from uncollapse import effective_prototypes, view_information
from uncollapse.config.load import load_config
from uncollapse.data.load import load_images
from uncollapse.measure.unique import cosine_argmax
from uncollapse.measure.usage import prototype_argmax, usage_counts
from uncollapse.models.embed import embed, project_views
from uncollapse.models.network import build_encoder
from uncollapse.training.run import train

DIM = 64


def unit(x):
    return F.normalize(x, dim=-1)


class Made:
    """K prototypes in groups of equal size. An image has one prototype, which its views keep, draw again from its group
    (``redrawn``), or do either with even odds (``half``); or it owns ten at random and each view takes one."""

    def __init__(self, k, groups, kind, spread=0.3):
        generator = torch.Generator().manual_seed(k)
        self.k, self.groups, self.each, self.kind = k, groups, k // groups, kind
        centres = unit(torch.randn(groups, 1, DIM, generator=generator))
        around = unit(torch.randn(groups, self.each, DIM, generator=generator))
        self.w = unit(centres + spread * around).view(k, DIM)

    def views(self, views, n, seed, odds=None):
        generator = torch.Generator().manual_seed(seed)
        odds = torch.ones(self.k) if odds is None else odds
        first = torch.multinomial(odds, n, replacement=True, generator=generator).expand(views, n)
        again = first // self.each * self.each + torch.randint(self.each, (views, n), generator=generator)
        if self.kind == "redrawn":
            first = again
        if self.kind == "half":
            first = torch.where(torch.rand(views, n, generator=generator) < 0.5, first, again)
        if self.kind == "private":
            own = torch.randint(self.k, (n, 10), generator=generator)
            first = own[torch.arange(n), torch.randint(10, (views, n), generator=generator)]
        return unit(self.w[first] + 0.02 * torch.randn(views, n, DIM, generator=generator))

    @property
    def truth(self):
        """Bits. A pair agrees with probability ``same``; otherwise it is even over ``rest`` other prototypes."""
        keep = {"kept": 1.0, "redrawn": 0.0, "half": 0.25, "private": 0.1}[self.kind]
        others = self.k if self.kind == "private" else self.each
        same = keep + (1 - keep) / others
        entropy = -same * math.log2(same)
        if same < 1:
            entropy -= (1 - same) * math.log2((1 - same) / (others - 1))
        return math.log2(self.k) - entropy


@pytest.mark.parametrize("kind", ["kept", "redrawn", "half", "private"])
@pytest.mark.parametrize(("k", "groups", "n"), [(16, 4, 359), (16, 4, 10_000), (256, 16, 359), (1024, 32, 359)])
def test_never_above_the_truth_and_near_it(kind, k, groups, n):
    """By the mean of several draws where there are few images: one draw in fifty is above by two standard errors."""
    made = Made(k, groups, kind)
    z_fit = made.views(2, 8 * k, 0)
    draws = [view_information(made.views(4, n, 1 + seed), made.w, z_fit) for seed in range(max(1, 1436 // n))]
    bits = sum(d.bits for d in draws) / len(draws)
    error = sum(d.standard_error for d in draws) / len(draws) ** 1.5
    assert made.truth - 0.3 <= bits <= made.truth + 2 * error
    assert draws[0].of_image.mean() == pytest.approx(draws[0].bits)
    assert (draws[0].n, draws[0].n_fit, draws[0].views, draws[0].fitted_on) == (n, 8 * k, 4, "other images")


def test_many_prototypes_and_few_images():
    made = Made(4096, 64, "kept")
    found = view_information(made.views(2, 359, 1), made.w, made.views(2, 8 * 4096, 2))
    assert 12 - 0.3 <= found.bits <= 12 + 2 * found.standard_error


@pytest.mark.parametrize("kind", ["kept", "redrawn", "half", "private"])
def test_it_hardly_depends_on_the_number_of_views(kind):
    made = Made(64, 8, kind)
    few, many = (view_information(made.views(v, 1000, 1), made.w, made.views(v, 512, 2)) for v in (4, 48))
    assert abs(few.bits - many.bits) < 0.1


def test_recognising_single_images_is_not_information_about_prototypes():
    """With many views, counting pairs in a table reads several bits where there is half a one."""
    made = Made(1024, 32, "private")
    z = made.views(24, 359, 1)
    chosen = cosine_argmax(z.flatten(0, 1), made.w).view(24, 359)
    plain = mutual_info_score(chosen[:12].flatten().numpy(), chosen[12:].flatten().numpy()) / math.log(2)
    found = view_information(z, made.w)
    assert plain > 4
    assert found.bits < made.truth + 2 * found.standard_error < 1


def test_copies_of_prototypes_add_nothing():
    made = Made(64, 8, "half")
    z, z_fit = made.views(4, 1000, 1), made.views(4, 8 * 256, 2)
    copies = made.w.repeat(4, 1) + 0.001 * torch.randn(256, DIM, generator=torch.Generator().manual_seed(0))
    once, four = view_information(z, made.w, z_fit), view_information(z, copies, z_fit)
    assert abs(once.bits - four.bits) < 0.2


def test_fitting_images_of_another_distribution_do_not_overstate():
    """Long-tailed fitting images, balanced scored ones: shares in p that were taken from the first would read 2 bits
    too many."""
    made = Made(256, 16, "kept")
    tail = torch.arange(1.0, 257.0) ** -1.5
    found = view_information(made.views(4, 1000, 1), made.w, made.views(4, 4000, 2, odds=tail))
    assert 8 - 0.5 < found.bits <= 8 + 2 * found.standard_error


def test_without_other_images_each_half_is_scored_by_the_other():
    made = Made(64, 8, "half")
    found = view_information(made.views(4, 2001, 1), made.w)
    assert made.truth - 0.3 <= found.bits <= made.truth + 2 * found.standard_error
    assert (found.n, found.n_fit, found.fitted_on) == (2001, 1000, "the other half")


@pytest.mark.parametrize("k", [32, 1024])
def test_views_that_share_nothing_carry_nothing(k):
    generator = torch.Generator().manual_seed(0)
    w, z, z_fit = (torch.randn(*shape, DIM, generator=generator) for shape in ((k,), (4, 500), (4, 500)))
    found = view_information(z, w, z_fit)
    assert -0.1 < found.bits <= 2 * found.standard_error
    one = view_information(z, w[:1], z_fit)
    assert one.bits == pytest.approx(0, abs=1e-6)


def test_lengths_blocks_and_dtypes_do_not_matter(monkeypatch):
    made = Made(64, 8, "half")
    z, z_fit = made.views(3, 100, 1), made.views(3, 300, 2)
    expected = view_information(z, made.w, z_fit).of_image
    monkeypatch.setattr(uncollapse.measure.information, "rows_at_once", lambda *_, **__: 7)
    stretched = made.w.double() * torch.linspace(0.5, 2, 64)[:, None]
    torch.testing.assert_close(view_information(3 * z, stretched, z_fit).of_image, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("z", "fit", "message"),
    [
        ((1, 9, 8), (2, 9, 8), "z_views holds 1 views of 9 images; view information needs at least 2 views of 2"),
        ((2, 3, 8), None, "at least 2 views of 4"),
        ((2, 9, 8), (1, 9, 8), "z_fit holds 1 views"),
        ((2, 9, 7), None, r"need z_views \(views, images, D\) and prototypes \(K, D\), got \(2, 9, 7\) and \(5, 8\)"),
        ((9, 8), None, r"got \(9, 8\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(z, fit, message):
    with pytest.raises(ValueError, match=message):
        view_information(torch.randn(z), torch.randn(5, 8), None if fit is None else torch.randn(fit))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_rows_without_a_direction_are_refused(bad):
    z = torch.randn(2, 9, 8)
    z[1, 3] = bad
    with pytest.raises(ValueError, match="they have no direction"):
        view_information(z, torch.randn(5, 8), torch.randn(2, 9, 8))
    with pytest.raises(ValueError, match="they have no direction"):
        view_information(torch.randn(2, 9, 8), torch.randn(5, 8), z)


@pytest.mark.slow
def test_an_untrained_encoder_with_its_own_projections_stays_below_a_trained_one(tmp_path):
    """The way to a high N_eff without learning anything: prototypes that are projections of images, all in use."""
    config = load_config("demo", {"log.evaluate_train": 100})
    trained = train(config, tmp_path, max_steps=200, say=lambda line: None, accelerator="cpu")
    images, held_out = load_images("builtin:digits", config.data, config.seed)
    encoder = build_encoder(config, drop_path=False)
    cpu = torch.device("cpu")
    projections, unseen = (embed(encoder, part, config.views, 0, cpu)[1] for part in (images, held_out))
    w = projections[torch.randperm(len(projections), generator=torch.Generator().manual_seed(0))[:1024]]
    own = view_information(
        project_views(encoder, held_out, config.views, config.seed, 0, cpu),
        w,
        project_views(encoder, images, config.views, config.seed, 0, cpu),
    )
    counts = usage_counts(prototype_argmax(unseen, w), 1024)
    assert effective_prototypes(counts, w) > 2 * trained["effective"]["0.025"]
    error = math.hypot(own.standard_error, trained["view_information"]["standard_error"])
    assert own.bits < trained["view_information"]["bits"] - 3 * error


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    made = Made(256, 16, "half")
    z, z_fit = made.views(3, 300, 1), made.views(2, 2048, 2)
    expected = view_information(z, made.w, z_fit)
    found = view_information(z.cuda(), made.w.cuda(), z_fit.cuda())
    torch.testing.assert_close(found.of_image, expected.of_image, rtol=0, atol=0.02)
