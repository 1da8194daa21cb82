"""Encoders: timm models by name, and a three-convolution one for images of a few pixels."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from uncollapse.config.schema import BackboneConfig
from uncollapse.errors import ConfigError, meant


class Conv3(nn.Sequential):
    """Three strided 3×3 convolutions with batch norm and average pooling: ``(n, 3, H, W)`` → ``(n, 4·width)``.

    For the built-in digits, where any timm model is far too large.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.num_features = 4 * width
        channels = [3, width, 2 * width, 4 * width]
        for i in range(3):
            conv = nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1, bias=False)
            self.extend([conv, nn.BatchNorm2d(channels[i + 1]), nn.ReLU(inplace=True)])
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map ``(n, 4·width, h, w)``, as timm's models call it."""
        for layer in list(self)[:-2]:  # a slice would be a Conv3 of its own
            x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map to its feature vector ``(n, 4·width)``; there is no classifier to leave out."""
        for layer in list(self)[-2:]:
            x = layer(x)
        return x


_NOT_OF_MODELS = frozenset(
    [
        "model_name",
        "checkpoint_path",
        "cache_dir",
        "model_cfg",
        "feature_cfg",
        "features_only",
        "kwargs_filter",
        "scriptable",
        "exportable",
        "no_jit",
    ]
)
"""Options of ``timm.create_model`` that are not the model's."""


def timm_options(config: BackboneConfig) -> dict[str, Any]:
    """What ``timm.create_model`` takes, beside name and ``num_classes=0``, to build an encoder without stochastic
    depth."""
    options: dict[str, Any] = dict(config.options)
    if "vit" in config.name or "deit" in config.name:
        options.setdefault("dynamic_img_size", True)
    if config.name.startswith("swin"):
        options.setdefault("strict_img_size", False)
        options["drop_path_rate"] = 0.0  # timm's own default is another
    return options


def build_backbone(config: BackboneConfig, drop_path: bool = True) -> tuple[nn.Module, int]:
    """The encoder and the length of its feature vector (class token, or pooled map).

    ``drop_path=False`` builds the teacher's copy, which has no stochastic depth. Vision transformers take
    every view size: timm resizes their position embedding bicubically with antialiasing, the released codes of DINO and
    iBOT without. So do Swin transformers, whose windows pad what they do not divide.

    Raises:
        ConfigError: an unknown model, or options that it does not take.
    """
    if config.name == "conv3":
        try:
            conv = Conv3(**config.options)
        except TypeError as error:
            raise ConfigError(f"backbone.options: conv3 does not take them ({error})") from None
        return conv, conv.num_features
    import timm

    # A name or an option may be a stranger's: hub names are downloaded, and some options read files or weights.
    if not re.fullmatch(r"[\w.-]+", config.name) or not timm.is_model(config.name):
        hint = meant(config.name, ["conv3", *timm.list_models()], "timm.list_models() names what it has")
        raise ConfigError(f"backbone.name: timm has no model {config.name!r} ({hint})")
    if refused := [name for name in config.options if name.startswith("pretrained") or name in _NOT_OF_MODELS]:
        raise ConfigError(f"backbone.options: {refused[0]} is no option of a model's architecture; leave it out")
    options = timm_options(config)
    if config.drop_path and drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"backbone.name: timm cannot build {config.name!r} with {options} ({reason}); "
            "timm.list_models() names what it has"
        ) from None
    if config.drop_path_uniform and config.drop_path and drop_path:
        for module in model.modules():
            for name in {"drop_path", "drop_path1", "drop_path2"} & dict(module.named_children()).keys():
                setattr(module, name, timm.layers.DropPath(config.drop_path))
    features: Any = getattr(model, "head_hidden_size", None) or model.num_features
    return model, int(features)
