"""Recipes: what they hold, and that a wrong one is refused in one line that names the key."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.config.facts import arm_keys, method_name, mode_name, targets_of
from uncollapse.config.load import build_config, dump_config, load_config, recipe_names
from uncollapse.config.plain_yaml import parse_value
from uncollapse.config.schema import ARMS, KINDS, RIVALS, Config
from uncollapse.config.tiny import tiny
from uncollapse.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_shrinks_every_recipe(name, kind):
    config = tiny(load_config(name, {"prototypes.kind": kind}))
    assert config.prototypes.count <= 64
    assert config.run.batch <= 32
    assert config.prototypes.kind == kind
    assert config.teacher == load_config(name).teacher  # the method itself is not shrunk


def test_published_numbers_of_vits16():
    c = load_config("dino-vits16")
    assert (c.run.epochs, c.run.batch, c.optim.lr, c.optim.min_lr) == (800, 1024, 5e-4, 1e-5)
    assert (c.prototypes.count, c.prototypes.learn_norm, c.prototypes.freeze_epochs) == (65536, True, 1)
    assert (c.teacher.temperature_start, c.teacher.temperature, c.teacher.temperature_warmup_epochs) == (
        0.04,
        0.07,
        30,
    )
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.25, 1), (0.05, 0.25), 10)
    assert (c.optim.weight_decay, c.optim.weight_decay_end, c.optim.clip) == (0.04, 0.4, 0)
    assert (c.teacher.momentum, c.teacher.momentum_end, c.teacher.student_temperature) == (0.996, 1.0, 0.1)


def test_published_numbers_of_resnet50():
    c = load_config("dino-resnet50")
    assert (c.run.epochs, c.run.batch, c.optim.name, c.optim.lr, c.optim.min_lr) == (
        800,
        4080,
        "lars",
        0.3,
        0.0048,
    )
    assert (c.prototypes.count, c.prototypes.learn_norm, c.head.batch_norm) == (60000, False, True)
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.14, 1), (0.05, 0.14), 6)
    assert c.optim.weight_decay == c.optim.weight_decay_end == 1e-6


def test_published_numbers_of_swav():
    """As in the released script for 800 epochs, whose rates are those of 4,096 images."""
    c = load_config("swav-resnet50")
    o, scale = c.optim, c.run.batch / c.optim.lr_batch
    assert (c.run.epochs, c.run.batch, o.name, o.warmup_epochs) == (800, 4096, "lars", 10)
    assert (o.lr * scale, o.warmup_start * scale, o.min_lr, o.decay_biases) == pytest.approx((4.8, 0.3, 4.8e-3, True))
    assert o.weight_decay == o.weight_decay_end == 1e-6
    assert (c.prototypes.count, c.head.bottleneck, c.head.layers, c.head.activation) == (3000, 128, 2, "relu")
    assert (c.teacher.temperature, c.teacher.student_temperature, c.method.iterations) == (0.05, 0.1, 3)
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.14, 1), (0.05, 0.14), 6)
    assert c.backbone.options == {"zero_init_last": False}


def test_published_numbers_of_carp():
    """The defaults of its released code."""
    c = load_config("carp-resnet50")
    assert (c.prototypes.count, c.method.block, c.head.bottleneck, c.prototypes.learn_norm) == (65536, 512, 256, False)
    assert (c.optim.name, c.optim.lr, c.optim.min_lr, c.optim.warmup_epochs) == ("lars", 0.45, 0.0048, 0)
    assert (c.teacher.momentum, c.teacher.momentum_end, c.prototypes.freeze_epochs) == (0.99, 1.0, 0)
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.2, 1), (0.05, 0.2), 6)
    assert (c.head.batch_norm, c.head.normalise, c.backbone.options) == (True, False, {"zero_init_last": True})


def test_published_numbers_of_ibot():
    """The README's command for ViT-S/16, and the defaults of its code."""
    c = load_config("ibot-vits16")
    assert (c.run.epochs, c.run.batch, c.optim.lr, c.optim.min_lr, c.optim.clip) == (800, 1024, 5e-4, 1e-6, 3)
    assert (c.prototypes.count, c.prototypes.learn_norm, c.prototypes.freeze_epochs) == (8192, True, 1)
    assert (c.method.shared, c.method.masked_crops, c.method.mask_ratio) == (True, 0.5, (0.1, 0.5))
    assert (c.teacher.temperature_start, c.method.patch_temperature_start, c.teacher.temperature) == (0.04, 0.04, 0.07)
    assert (c.teacher.temperature_warmup_epochs, c.teacher.momentum, c.backbone.drop_path) == (30, 0.996, 0.1)
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.25, 1), (0.05, 0.25), 10)


def test_larger_models_have_rates_of_their_own_and_larger_data_fewer_epochs():
    """What the released settings say of ViT-B/16, and the number of epochs that the papers give for each."""
    for name, vmf in (("dino-vitb16", False), ("dino-vmf-vitb16", True)):
        c = load_config(name)
        assert (c.run.epochs, c.run.batch, c.optim.lr, c.optim.min_lr, c.optim.clip) == (400, 1024, 7.5e-4, 2e-6, 0.3)
        assert (c.prototypes.count, c.prototypes.learn_norm, c.prototypes.vmf) == (65536, vmf, vmf)
        assert (c.prototypes.freeze_epochs, c.teacher.temperature_warmup_epochs) == (3, 50)
    epochs = {"ibot-vitb16": 400, "ibot-vitl16": 250, "ibot-vitb16-in22k": 80, "ibot-vitl16-in22k": 50}
    assert {name: load_config(name).run.epochs for name in epochs} == epochs
    for name in epochs:
        c = load_config(name)
        assert (c.prototypes.count, c.method.shared, c.teacher.temperature) == (8192, True, 0.07)
    for name in ("ibot-vmf-kp-vits16", "ibot-vmf-kp-vitb16", "ibot-vmf-kp-vits16-inat18"):
        c = load_config(name)
        assert (c.prototypes.kind, c.prototypes.diversity, method_name(c)) == ("koleo", "koleo", "ibot-vmf")
        assert (c.prototypes.learn_norm, c.prototypes.count) == (True, 8192)


def test_published_numbers_of_dinov2():
    """Its code's two configurations, in passes over the images instead of epochs of 1,250 steps."""
    short, large = load_config("dinov2-vitl16"), load_config("dinov2-vitl14")
    for c, steps, images, batch in ((short, 100, 1_281_167, 2048), (large, 500, 14_197_086, 3072)):
        each = images // batch  # steps of a pass
        assert c.run.batch == batch
        assert c.run.epochs * each == pytest.approx(1250 * steps, rel=1e-3)
        assert c.optim.warmup_epochs * each == pytest.approx(1250 * (10 if c is short else 80), rel=1e-3)
        assert c.teacher.temperature_warmup_epochs * each == pytest.approx(1250 * 30, rel=1e-3)
        assert c.prototypes.freeze_epochs * each == pytest.approx(1250, rel=1e-3)
        base = 4e-3 if c is short else 2e-4
        assert c.optim.lr * batch / c.optim.lr_batch == pytest.approx(base * (batch / 1024) ** 0.5, rel=1e-6)
        assert (c.teacher.temperature_start, c.teacher.temperature, c.teacher.temperature_by) == (0.04, 0.07, "step")
        assert (c.optim.min_lr, c.optim.clip, c.optim.clip_of, c.optim.patch_embed_lr) == (1e-6, 3, "network", 0.2)
        assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.32, 1), (0.05, 0.32), 8)
        assert (c.method.koleo_weight, c.method.masked_crops, c.method.mask_ratio) == (0.1, 0.5, (0.1, 0.5))
        assert (c.backbone.drop_path_uniform, c.backbone.options) == (True, {"init_values": 1e-5})
    assert (short.prototypes.count, short.method.shared, targets_of(short)) == (65536, True, "centred")
    assert (large.prototypes.count, large.method.shared, targets_of(large)) == (131072, False, "sinkhorn")
    assert (large.head.bottleneck, large.method.patch_bottleneck, large.views.local_size) == (384, 256, 98)
    assert (short.optim.layer_decay, large.optim.layer_decay) == (0.9, 1.0)
    assert (short.teacher.momentum, large.teacher.momentum) == (0.992, 0.994)
    assert (short.optim.weight_decay_end, large.optim.weight_decay_end) == (0.4, 0.2)
    assert (short.backbone.drop_path, large.backbone.drop_path) == (0.3, 0.4)


def test_published_numbers_of_msn():
    """The released configuration for ViT-S/16, and what its code fixes; rates are absolute there."""
    c = load_config("msn-vits16")
    o, scale = c.optim, c.run.batch / c.optim.lr_batch
    assert (c.run.epochs, c.run.batch, c.run.schedule_span, o.name) == (800, 1024, 1.25, "adamw")
    assert (o.lr * scale, o.warmup_start * scale, o.min_lr, o.warmup_epochs) == (1e-3, 2e-4, 1e-6, 15)
    assert (o.weight_decay, o.weight_decay_end, o.clip, o.clip_of) == (0.04, 0.4, 3, "encoder")
    assert (c.prototypes.count, c.prototypes.learn_norm, c.prototypes.weight_decay) == (1024, False, 0)
    assert (c.teacher.momentum, c.teacher.momentum_end, c.teacher.momentum_shape) == (0.996, 1.0, "linear")
    assert (c.teacher.temperature, c.teacher.temperature_start, c.teacher.student_temperature) == (0.025, 0.025, 0.1)
    assert (c.method.drop, c.method.prior_weight, c.method.prior, c.method.entropy_weight) == (0.15, 1, "uniform", 0)
    assert (targets_of(c), c.head.batch_norm, c.head.hidden, c.head.bottleneck) == ("sinkhorn", True, 2048, 256)
    assert (c.views.global_scale, c.views.local_scale, c.views.local_count) == ((0.3, 1), (0.05, 0.3), 10)
    assert (c.views.jitter_strength, c.views.blur, c.views.solarise) == ((0.4, 0.4, 0.4, 0.1), (0.5,) * 3, (0,) * 3)
    assert c.backbone.drop_path == c.prototypes.freeze_epochs == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"optim.learning_rate": 1.0}, "unknown key 'optim.learning_rate'"),
        ({"optim.warmup_epoch": 1.0}, "did you mean 'warmup_epochs'"),
        ({"optimizer": {"lr": 1.0}}, "unknown key 'optimizer'"),
        ({"run.batch": "many"}, "run.batch"),
        ({"run.batch": 0}, "run.batch"),
        ({"run.batch": 1.5}, "run.batch"),
        ({"run.batch": True}, "run.batch"),
        ({"prototypes.kind": "jiont"}, "prototypes.kind"),
        ({"prototypes.count": 1}, "prototypes.count"),
        ({"change.branch_step": 5}, "change.branch_step"),
        ({"views.global_scale": [0.9, 0.2]}, "views.global_scale"),
        ({"views.global_scale": [0.9]}, "views.global_scale"),
        ({"teacher.momentum": 1.2}, "teacher.momentum"),
        ({"teacher.temperature": 0.0}, "teacher.temperature"),
        ({"teacher.momentum": 0.99, "teacher.momentum_end": 0.9}, "teacher.momentum_end"),
        ({"optim.lr": float("nan")}, "optim.lr"),
        ({"optim.min_lr": 5.0}, "optim.min_lr"),
        ({"optim.warmup_start": 5.0}, "optim.warmup_start"),
        ({"optim.lr": 1e300}, "optim.lr"),
        ({"prototypes.freeze_epochs": 1e308}, "prototypes.freeze_epochs"),
        ({"seed": 2**63}, "seed"),
        ({"optim": 3}, "optim"),
        ({"optim.lr.start": 3}, "optim.lr"),
        ({"backbone.drop_path": 1.0}, "backbone.drop_path"),
    ],
)
def test_a_wrong_key_type_or_value_is_one_line_that_names_the_key(overrides, expected):
    with pytest.raises(ConfigError) as error:
        load_config("demo", overrides)
    message = str(error.value)
    assert expected in message
    assert "\n" not in message


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="dino-small32"):
        load_config("dino-vits61")


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("swav-small32", {"run.accumulate": 2}, "run.accumulate: must be 1: SwAV's codes"),
        ("carp-small32", {"run.accumulate": 2}, "run.accumulate: must be 1: CARP's entropy"),
        ("swav-small32", {"method.queue": 100}, "method.queue: 100 is not a multiple of run.batch, 128"),
        ("carp-small32", {"method.block": 2000}, "method.block: blocks of 2000 cannot be dealt from 1024 prototypes"),
        ("swav-small32", {"prototypes.targets": "centred"}, "prototypes.targets: swav has no centre"),
        ("carp-small32", {"prototypes.targets": "centred"}, "prototypes.targets: carp has no centre"),
        ("swav-small32", {"prototypes.targets": "posterior"}, "prototypes.targets: only a mixture has a posterior"),
        ("carp-small32", {"prototypes.vmf": True}, "prototypes.vmf: a vMF density is over unit vectors"),
        ("ibot-vits16", {"method.mask_ratio": [0.5, 0.1]}, "method.mask_ratio: the first number must not exceed"),
        ("ibot-vits16", {"backbone.name": "resnet50"}, "backbone.name: iBOT hides patches, which resnet50"),
        ("ibot-vits16", {"method.block": 512}, "method.block: the method has no such key"),
    ],
)
def test_what_a_method_cannot_do_is_one_line_that_names_the_key(recipe, overrides, expected):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, overrides)
    assert f"{recipe}: {expected}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2", "just words"])
def test_files_that_are_not_recipes(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_command_line_values():
    assert parse_value("1e-3") == 1e-3
    assert parse_value("3") == 3
    assert parse_value("[0.2, 1.0]") == [0.2, 1.0]
    assert parse_value("null") is None
    assert parse_value("true") is True
    assert parse_value("joint") == "joint"


@settings(deadline=None)
@given(lr=st.floats(1e-4, 10), batch=st.integers(1, 4096), flip=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_any_valid_value_survives_the_file(lr, batch, flip, seed):
    config = build_config(
        {"seed": seed, "optim": {"lr": lr, "min_lr": 0.0}, "run": {"batch": batch}, "views": {"flip": flip}}
    )
    import yaml

    again = build_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert dataclasses.replace(Config(), seed=seed).seed == config.seed


@pytest.mark.parametrize("arm", [*ARMS, *RIVALS, *(f"{rival}-floor" for rival in RIVALS)])
def test_an_arm_is_named_by_what_makes_it(arm):
    assert mode_name(load_config("demo", arm_keys(arm))) == arm


def test_a_rivals_arm_is_what_it_says_whatever_the_recipe_has():
    for rival in ("koleo", *RIVALS):
        config = load_config("demo", {"prototypes.diversity": "mst", **arm_keys(rival)})
        assert (config.prototypes.kind, config.prototypes.diversity) == ("koleo", rival)


def test_neighbours_are_kept_only_where_they_are_looked_for():
    every = {"prototypes.koleo_every": 4}
    assert load_config("demo", {**arm_keys("mst"), **every}).prototypes.koleo_every == 4
    with pytest.raises(ConfigError, match=r"prototypes.koleo_every: energy looks for no neighbours"):
        load_config("demo", {**arm_keys("energy"), **every})


def test_a_method_with_von_mises_fisher_prototypes_has_a_name_of_its_own():
    shipped = {
        "demo": "dino",
        "dino-vmf-vits16": "dino-vmf",
        "ibot-vits16": "ibot",
        "ibot-vmf-vits16": "ibot-vmf",
        "swav-small32": "swav",
        "carp-small32": "carp",
    }
    assert {recipe: method_name(load_config(recipe)) for recipe in shipped} == shipped
    assert method_name(load_config("demo", {"method.center": "probabilities"})) == "dino-vmf"
    assert method_name(load_config("msn-vits16", {"method.prior": "power"})) == "pmsn"


def test_targets_are_the_modes_own_unless_the_recipe_says_otherwise():
    def targets(**keys):
        return targets_of(load_config("demo", {f"prototypes.{k}": v for k, v in keys.items()}))

    assert targets(kind="joint") == targets(kind="decoupled-paper") == "centred"
    assert targets(kind="decoupled") == "posterior"
    assert targets(kind="decoupled", targets="sinkhorn") == "sinkhorn"
    assert mode_name(load_config("demo", {"prototypes.kind": "decoupled", "prototypes.targets": "centred"})) == (
        "decoupled-centred"
    )
    with pytest.raises(ConfigError, match=r"prototypes.targets: only a mixture has a posterior, joint has none"):
        targets(kind="joint", targets="posterior")


def test_a_run_folder_of_before_names_its_target_inside_the_mixture():
    content = {"prototypes": {"kind": "decoupled", "mixture": {"target": "centred", "balance": "none"}}}
    prototypes = build_config(content).prototypes
    assert (prototypes.targets, prototypes.mixture.balance) == ("centred", "none")


def test_a_path_that_is_not_utf8_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"caf\\xe9.*not UTF-8; reach it by another name") as error:
        load_config("demo", {"data.path": "/photos/caf\udce9"})
    assert str(error.value).isprintable()
