"""The callback in runs that are not ours logs, under their names, what the functions give."""

import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uncollapse as un
from uncollapse import PrototypeCallback

K, D, N = 24, 6, 64
EPS = (0.025, 0.25)
pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|litlogger|GPU available|log_every_n|isinstance).*")


class Steps:
    """Two views, a linear layer of prototypes; whether its steps return anything beside the loss is up to the test."""

    def __init__(self, returns=None):
        super().__init__()
        self.encoder, self.prototypes = nn.Linear(8, D), nn.Linear(D, K, bias=False)
        self.returns = returns

    def step(self, batch):
        views = [F.normalize(self.encoder(batch[0] + shift), dim=-1) for shift in (0.0, 0.1)]
        logits = [self.prototypes(z) for z in views]
        loss = F.cross_entropy(logits[0] / 0.1, logits[1].argmax(-1))
        return {"loss": loss} | ({} if self.returns is None else {self.returns: torch.stack(views)})

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        return self.step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SwAVLike(Steps, pl.LightningModule):
    pass


def images():
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(1))


def fit(callbacks, folder, model=None, validate=True, epochs=1, trainer=pl.Trainer, **options):
    torch.manual_seed(0)
    model = model or SwAVLike()
    loader = DataLoader(TensorDataset(images()), batch_size=16)
    run = trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=1,
        **{"enable_checkpointing": False, **options},
    )
    run.fit(model, loader, loader if validate else None)
    return model, {key: float(value) for key, value in run.callback_metrics.items()}


def expected_of(model):
    with torch.no_grad():
        views = torch.stack([F.normalize(model.encoder(images() + shift), dim=-1) for shift in (0.0, 0.1)])
    w = model.prototypes.weight.detach()
    counts = un.usage_counts(un.prototype_argmax(views[0], w), K)
    values = {"nearest_cosine": un.nearest_cosine(w), "used": un.used_prototypes(counts), "n": N}
    for eps in EPS:
        values[f"unique@{eps}"] = un.unique_prototypes(w, eps)
        values[f"unique_among_used@{eps}"] = un.unique_among_used(w, counts, eps)
        values[f"effective@{eps}"] = un.effective_prototypes(counts, w, eps)
    information = un.view_information(views, w)
    values |= {"view_information": information.bits, "view_information_error": information.standard_error}
    return values | {"effective_rank": un.effective_rank(views[0])}


def test_with_views_as_target_every_key_is_the_function_of_its_name(tmp_path):
    callback = PrototypeCallback("p", target="views", epsilons=EPS)
    model, logged = fit([callback], tmp_path, SwAVLike("views"))
    expected = {f"p/{key}": value for key, value in expected_of(model).items()}
    assert set(logged) == {*expected, "p/alive"}
    assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert 1 <= logged["p/alive"] <= K


def test_without_arguments_it_listens_to_the_layer(tmp_path):
    model, logged = fit([PrototypeCallback(epsilons=EPS)], tmp_path)
    expected = expected_of(model)
    for key in ("used", "n", "effective@0.25", "unique@0.025", "effective_rank"):
        assert logged[f"prototypes/{key}"] == pytest.approx(expected[key], rel=1e-5)
    assert "prototypes/view_information" not in logged  # it does not know which rows are views of one image
    assert not model.prototypes._forward_pre_hooks


def test_alive_is_counted_where_only_validation_returns_projections(tmp_path):
    class OnlyThere(SwAVLike):
        def training_step(self, batch, batch_idx):
            return self.step(batch)["loss"]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "PrototypeCallback")
        _, logged = fit([PrototypeCallback(target="views")], tmp_path, OnlyThere("views"))
    assert {"prototypes/alive", "prototypes/view_information"} < set(logged)


def test_a_run_without_validation_has_its_training_images_under_names_that_say_so(tmp_path):
    _, logged = fit([PrototypeCallback(queue_length=40)], tmp_path, validate=False)
    assert logged["prototypes/train/n"] == 40
    assert {"prototypes/train/used", "prototypes/unique@0.1"} < set(logged)
    assert "prototypes/used" not in logged


def test_it_runs_in_the_other_package_of_lightning_too(tmp_path):
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning, beside lightning, is not installed")

    class Other(Steps, other.LightningModule):
        pass

    _, logged = fit([PrototypeCallback()], tmp_path, Other(), trainer=other.Trainer)
    assert logged["prototypes/n"] == N


def test_steps_within_an_epoch_where_asked_for(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append("prototypes/unique@0.025" in trainer.logged_metrics)

    fit([PrototypeCallback(every_n_steps=2), Watch()], tmp_path, validate=False)
    assert seen[0] is False
    assert any(seen)


def test_alive_goes_on_after_a_resume(tmp_path):
    save = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last")
    first = PrototypeCallback(window=1000)
    fit([first, save], tmp_path, enable_checkpointing=True)
    again = PrototypeCallback()
    torch.manual_seed(0)
    pl.Trainer(
        max_epochs=2,
        callbacks=[again],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(SwAVLike(), DataLoader(TensorDataset(images()), batch_size=16), ckpt_path=tmp_path / "last.ckpt")
    assert again.alive.window == 1000
    assert int(again.alive.called) == 8


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (PrototypeCallback(prototypes="heads"), "no layer 'heads' on SwAVLike; pass prototypes=.*'prototypes.weight'"),
        (PrototypeCallback(prototypes="prototypes.weight"), "pass target=, the key of the projections"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit([callback], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "embedding"}, "no tensor 'embedding' in what a step returned .*'loss', 'views'"),
        ({"target": "views", "target_shape": (3, 2)}, r"projections are \(2, 16, 6\), which does not end in"),
        ({"target": lambda outputs, batch: batch[0]}, "same space"),
        ({"target": lambda outputs, batch: outputs["views"].log().log()}, "64 of 64 images.*left out|must be"),
    ],
)
def test_what_cannot_be_measured_is_told_once_and_stops_no_run(options, message, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, logged = fit([PrototypeCallback(**options)], tmp_path, SwAVLike("views"), epochs=2)
    texts = [str(w.message) for w in told if "PrototypeCallback" in str(w.message)]
    assert len(texts) == len(set(texts))
    assert any(re.search(message, text) for text in texts), texts
    assert "prototypes/unique@0.025" in logged
    assert "prototypes/used" not in logged


def test_projections_of_another_shape_and_of_half_precision(tmp_path):
    target = PrototypeCallback(
        target=lambda outputs, batch: outputs["views"].unflatten(-1, (3, 2)), target_shape=(3, 2)
    )
    _, logged = fit([target], tmp_path, SwAVLike("views"), precision="bf16-mixed")
    assert logged["prototypes/n"] == N
    assert "prototypes/view_information" in logged
