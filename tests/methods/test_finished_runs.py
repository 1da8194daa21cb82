"""A finished run of each method, looked at as a stranger's would be: diagnosed, evaluated, reported, started from."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, small
from uncollapse.checkpoints.pretrained import start_from
from uncollapse.cli.main import main
from uncollapse.config.facts import targets_of
from uncollapse.data.load import load_images
from uncollapse.data.workers import eval_batches
from uncollapse.diagnosis.run import diagnose_file
from uncollapse.evaluate.source import open_encoder
from uncollapse.measure.geometry import entropy
from uncollapse.methods.contract import At, Seen, method_of
from uncollapse.models.embed import embed
from uncollapse.models.network import build_encoder
from uncollapse.models.tokens import plain, tokens
from uncollapse.run_folder.checkpoint import save_checkpoint
from uncollapse.training.run import train
from uncollapse.training.state import state_dicts

END = At(0, 1e6, 1.0, 0, None)
CPU = torch.device("cpu")
SETS = {  # of a method, and of a way to learn prototypes where that is not joint
    "swav": ["shared cls"],
    "msn": ["shared cls"],
    "carp": ["teacher cls", "student cls"],
    "ibot-separate": ["teacher cls", "teacher patch", "student cls", "student patch"],
    "ibot-vmf": ["teacher cls", "student cls"],
    "esvit": ["teacher cls", "teacher region", "student cls", "student region"],
    "wessl": [f"{side} {name}" for side in ("teacher", "student") for name in ("cls", "head2", "head3")],
    "capi capi": ["teacher patch", "student patch"],
    "carp capi": ["shared cls"],
}


def config(method):
    """180 digits to train on, 80 held out, and a rate at which lengths of prototypes soon differ."""
    few = {"data.held_out": 0.9, "data.held_out_max": 80, "log.evaluate_train": 100}
    return small(*method.split(), **few, **{"optim.lr": 0.02, "optim.lr_batch": 16})


@pytest.fixture(scope="module", params=SETS)
def finished(request, tmp_path_factory):
    """(method, folder, state) after a few steps, with a checkpoint as a run writes it."""
    steps = Steps(config(request.param))
    for _ in range(4):
        steps.take()
    folder = tmp_path_factory.mktemp("runs") / request.param
    content = {**state_dicts(steps.state), "config": asdict(steps.config)}
    assert save_checkpoint(folder / "checkpoints", 4, content, 1)
    return request.param, folder, steps.state


@torch.no_grad()
def rows(c, state):
    """Projections of the held-out images by level, from the network that is looked at."""
    _, held = load_images(c.data.path, c.data, c.seed, progress=False)
    net = state.evaluated
    z = {"cls": embed(net, held, c.views, 0, CPU)[1][None]}
    ((_, x),) = eval_batches(held, c.views.global_size, c.views.mean, c.views.std, 256, 0)
    net.eval()
    for level in state.parts.sets:
        if level == "patch":
            z[level] = net.head_of("patch")(tokens(plain(net.backbone), x)[1].flatten(0, 1))
        elif level == "region":
            z[level] = net([x]).region[0][None]
        elif level != "cls":
            z[level] = net([x]).others[level]
    net.train()
    return z


def test_it_is_diagnosed_with_images_as_it_trained(finished):
    """Every set by the head, the tokens, the lengths and the centre of its own, or the mean target would differ."""
    method, folder, state = finished
    c = config(method)
    found = diagnose_file(folder, data="builtin:digits", limit=80)
    assert [f"{d.source.side} {d.source.set}" for d in found] == SETS[method]
    for without, d in zip(diagnose_file(folder), found, strict=True):  # which reads as little of the file as it can
        assert without.norms == d.norms
        assert without.notes == d.notes[: len(without.notes)]
    z = rows(c, state)
    if targets_of(c) == "sinkhorn":  # balanced over a batch in training; here it is the softmax at their temperature
        targets = {
            name: state.prototypes(name).targets(of, c.teacher.temperature)
            for name, of in z.items()
            if name in state.sets
        }
    else:
        # No number of the diagnosis needs a region's match.
        targets = method_of(c).assign(c, Seen(z, features={"region": None}), state.sets, state.memory, END)
    for d in found:
        assert d.images is not None, d.notes
        name, side = d.source.set, "student" if d.source.side == "student" else "teacher"
        torch.testing.assert_close(F.normalize(d.vectors.float(), dim=1), state.prototypes(name).vectors(side))
        if side == "student":
            continue
        level = z[name].flatten(0, -2)
        assert (d.images.unit, d.images.n) == ("patches" if name in ("patch", "region") else "images", len(level))
        assert d.images.used == len((level @ F.normalize(d.vectors.float(), dim=1).T).argmax(1).unique())
        mean = targets[name].dense().flatten(0, -2).double().mean(0)
        assert d.images.marginal["entropy"] == pytest.approx(entropy(mean.numpy()), abs=1e-4)
        assert d.images.marginal["centred"] == (c.method.name in ("ibot", "esvit"))
        assert d.images.marginal["biased"] == (method == "ibot-vmf" or method.endswith("capi"))


@pytest.mark.parametrize("method", ["swav", "ibot-separate", "capi capi"])
def test_it_is_evaluated_and_reported_from_the_command_line(method, tmp_path, capsys):
    folder = tmp_path / method
    train(config(method), folder, max_steps=2, say=lambda line: None, accelerator="cpu")
    main(["evaluate", str(folder), "--data", "builtin:digits", "--tasks", "knn", "--device", "cpu"])
    assert "knn: top1" in capsys.readouterr().out
    ((label, found),) = json.loads((folder / "evaluation.json").read_text())["data"]["builtin:digits"][
        "encoders"
    ].items()
    assert label == ("model" if method == "swav" else "teacher")
    assert found["tasks"]["knn"]["top1"] > 0.1
    main(["report", str(folder), "--out", str(folder / "page.html")])
    assert "weighted kNN" in (folder / "page.html").read_text()


def test_its_encoder_is_the_one_that_is_looked_at(finished):
    method, folder, state = finished
    encoder = open_encoder(folder)
    x = torch.randn(3, 3, 32, 32)
    net = state.evaluated.eval()
    with torch.no_grad():
        features = net.backbone(x)
        torch.testing.assert_close(encoder.features(x), features)
        fresh = encoder.untrained()
        assert (fresh.features(x) - features).norm(dim=1).min() > 1e-3
        if method == "capi capi":
            assert encoder.project(features) is fresh.project(features) is encoder.vectors is None
            assert encoder.notes == ["its prototypes divide up patches, not images: only the backbone is evaluated"]
        else:
            torch.testing.assert_close(encoder.project(features), F.normalize(net.head(features), dim=1))
            torch.testing.assert_close(fresh.project(fresh.features(x)).norm(dim=1), torch.ones(3))
            torch.testing.assert_close(encoder.vectors, state.prototypes().vectors("teacher"))
    net.train()
    assert encoder.tokens == (method.startswith("ibot") or method in ("wessl", "msn", "capi capi"))


def test_another_run_starts_from_it(finished):
    """A transformer that hides patches starts from one that does not, and the other way round, heads included."""
    method, folder, state = finished
    other = config("dino-vmf" if method.startswith("ibot") else method)
    encoder = build_encoder(other, drop_path=True)
    lines = start_from(encoder, str(folder))
    assert encoder.heads.keys() == state.evaluated.heads.keys()
    pairs = [(encoder.backbone, plain(state.evaluated.backbone))]
    pairs += [(head, state.evaluated.heads[name]) for name, head in encoder.heads.items()]
    for own, theirs in pairs:
        expected = dict(theirs.named_parameters())
        assert all(torch.equal(p, expected[n]) for n, p in own.named_parameters())
    assert [line.split()[0] for line in lines] == ["started"] * sum(
        bool(list(module.parameters())) for module, _ in pairs
    )


def test_a_run_that_hides_patches_starts_from_one_that_does_not(tmp_path):
    other, hiding = build_encoder(small("dino-vmf"), False), build_encoder(small("ibot", seed=1), False)
    torch.save({"teacher": other.state_dict()}, tmp_path / "dino.pt")
    lines = start_from(hiding, str(tmp_path / "dino.pt"))
    assert all(torch.equal(t, other.backbone.state_dict()[n]) for n, t in hiding.backbone.vit.state_dict().items())
    assert "projection head too" in lines[-1]
