"""The lines of Python that a model card gives: they run as printed, in the export's folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from uncollapse.checkpoints.exported import DINO_CHECKPOINT, ENCODER
from uncollapse.export.content import Content, rows_of
from uncollapse.models.backbones import timm_options
from uncollapse.models.network import OF_TOKENS
from uncollapse.models.tokens import plain
from uncollapse.prototypes.decoupled import MixturePrototypes

_OF_DINO = (
    f"\n\n`{DINO_CHECKPOINT}` is for code that reads DINO's checkpoints; "
    f'`torch.load("{DINO_CHECKPOINT}", weights_only=True)` gives its dictionaries.'
)


def usage(content: Content, to: str) -> str:
    """A block that loads encoder, head and the first set's prototypes, and runs them on images."""
    name = next(iter(content.facts))
    uses_timm = content.config.backbone.name != "conv3" and to != "dino"
    lines = _by_timm(content, to, name) if uses_timm else _by_us(content, name)
    size, views = content.config.views.global_size, content.config.views
    after = [
        "",
        f"images = torch.rand(2, 3, {size}, {size})  # RGB between 0 and 1; "
        f"the shorter side resized to fit, the centre cropped",
        f"mean, std = torch.tensor({list(views.mean)}), torch.tensor({list(views.std)})",
        "with torch.no_grad():",
        "    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)",
        *[f"    {line}" for line in _forward(content, name)],
    ]
    note = _OF_DINO if to == "dino" else ""
    return "```python\n" + "\n".join([*lines, *after]) + "\n```" + note + _targets(content, name)


def _by_timm(content: Content, to: str, name: str) -> list[str]:
    options = "".join(f", {key}={value!r}" for key, value in timm_options(content.config.backbone).items())
    if to == "hf":
        encoder = ['encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:USER/NAME"']
    else:
        encoder = [
            f'encoder = timm.create_model("{content.config.backbone.name}", num_classes=0{options}).eval()',
            f'timm.models.load_checkpoint(encoder, "{ENCODER}")',
        ]
    of_head = f"heads.{_head_name(content, name)}.mlp."
    head = [
        'tensors = load_file("head.safetensors")',
        "head = torch.nn.Sequential(",
        *[f"    {line}," for line in _layers(content.encoder.head_of(name))],
        ")",
        f"of_head = {of_head!r}",
        "head.load_state_dict({n.removeprefix(of_head): t for n, t in tensors.items() if n.startswith(of_head)})",
        "head.eval()",
        f'prototypes = tensors["prototypes.{name}.weight"]  # (K, D)',
        *([f'bias = tensors["prototypes.{name}.bias"]  # (K,)'] if _has_bias(content, name) else []),
    ]
    return ["import timm", "import torch", "from safetensors.torch import load_file", "", *encoder, *head]


def _by_us(content: Content, name: str) -> list[str]:
    return [
        "import torch",
        "from uncollapse import load_export",
        "",
        'export = load_export(".")',
        f'encoder, head = export.encoder, export.heads["{_head_name(content, name)}"]',
        f'prototypes = export.prototypes["{name}"]["weight"]  # (K, D)',
        *([f'bias = export.prototypes["{name}"]["bias"]  # (K,)'] if _has_bias(content, name) else []),
    ]


def _forward(content: Content, name: str) -> list[str]:
    model: Any = plain(content.encoder.backbone)
    features = "encoder(x)  # (n, d)"
    if name in OF_TOKENS:
        features = f"encoder.forward_features(x)[:, {model.num_prefix_tokens}:]  # (n, patches, d)"
    normalised = content.facts[name].unit_projections
    z = "torch.nn.functional.normalize(head(features), dim=-1)" if normalised else "head(features)"
    bias = " + bias" if _has_bias(content, name) else ""
    logits = f"({'z @ prototypes.T' + bias}) / {content.facts[name].temperature:g}"
    return [f"features = {features}", f"z = {z}  # (..., D)", f"logits = {logits}  # (..., K)"]


def _layers(head: Any) -> list[str]:
    lines = []
    for layer in head.mlp:
        sizes = ""
        if isinstance(layer, nn.Linear):
            sizes = f"{layer.in_features}, {layer.out_features}"
        elif isinstance(layer, nn.BatchNorm1d):
            sizes = str(layer.num_features)
        lines.append(f"torch.nn.{type(layer).__name__}({sizes})")
    return lines


def _head_name(content: Content, name: str) -> str:
    return content.facts[name].head.removeprefix("heads.")


def _has_bias(content: Content, name: str) -> bool:
    return rows_of(content.sets[name], content.side)[1] is not None


def _targets(content: Content, name: str) -> str:
    """What the training's own targets had that these logits have not."""
    lines = []
    if content.config.prototypes.vmf:
        lines.append("the normaliser of von Mises-Fisher densities (`uncollapse.vmf_bias`) is added to the logits")
    if content.centres:
        lines.append("the teacher's targets are centred (`memory.center` in `head.safetensors`)")
    if isinstance(content.sets[name], MixturePrototypes):
        lines.append(
            "the prototypes are the directions of a Gaussian mixture, whose means, variances and evidence (its weights "
            f"up to their sum) are `prototypes.{name}.mixture.*`; where targets are its posterior, these decide"
        )
    return "\n\nIn training, " + "; ".join(lines) + "." if lines else ""
