"""Backbones read off the keys and shapes of a checkpoint: ViT, DINOv3's ViT, Swin, XCiT and ResNet.

timm's models hold the weights; where the code that trained a family computes something else than timm does, the
difference is made up for here. The code compared: facebookresearch/dino, dinov2, dinov3, xcit and webssl,
bytedance/ibot, microsoft/esvit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.checkpoints.backbone import Backbone, count_of, load, ratio
from uncollapse.checkpoints.files import line_of
from uncollapse.checkpoints.within import Within
from uncollapse.errors import InputError
from uncollapse.models.tokens import ClassToken, PatchTokens

HEAD_DIM = 64
"""Width of an attention head where neither shapes nor buffers tell: every published ViT of DINO, iBOT, MSN and
DINOv2 has it."""
WIDE_HEADS = {2688: 128, 3072: 128, 3584: 128, 4096: 128}
"""Width of a ViT → width of its heads, for Web-SSL's 2B, 3B, 5B and 7B models, whose code says so."""


_PIXELS = 2048
"""Largest side of the images of an encoder that is run; the largest published one takes 518."""


def backbone_of(weights: Mapping[str, Tensor], where: str) -> Backbone:
    """The backbone that these weights are, in evaluation mode.

    Args:
        weights: floating-point tensors of one network, named from its root. where: the file, for messages.

    Raises:
        InputError: no known kind, or a part that was not understood; the message names it.
    """
    weights = dict(renamed({n: t.float() for n, t in weights.items()}))
    if absent := [n for n, t in weights.items() if t.is_meta]:
        raise InputError(f"{where}: {absent[0]} has no values; --data cannot run the encoder")
    try:
        with Within(weights.values()):
            backbone = _known(weights, where)
    except InputError:
        raise
    except Exception as error:  # shapes that fit no network can fail anywhere
        raise InputError(f"{where}: the backbone was not understood ({line_of(error)}); --data cannot run it") from None
    if backbone.size > _PIXELS:
        raise InputError(f"{where}: an encoder for images of {backbone.size} pixels; at most {_PIXELS} are looked at")
    backbone.module.eval().requires_grad_(False)
    if backbone.tokens is not None:
        backbone.tokens.eval().requires_grad_(False)
    return backbone


_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Places of a ResNet's children in ``nn.Sequential(*resnet.children())``, as lightly's tutorials have it."""
_TORCHVISION = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)
"""Names in torchvision's vision transformer, and timm's for the same."""


def renamed(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Other libraries' spellings of the same networks, as timm names them."""
    if "0.weight" in weights and "1.running_mean" in weights and "7.0.conv1.weight" in weights:
        return {f"{_CHILDREN.get(n.split('.', 1)[0], '?')}.{n.partition('.')[2]}": t for n, t in weights.items()}
    if "conv_proj.weight" in weights and "encoder.pos_embedding" in weights:
        out = weights
        for old, new in _TORCHVISION:
            out = {re.sub(old, new, n): t for n, t in out.items()}
        return {n: t for n, t in out.items() if not n.startswith("heads.")}
    return weights


def _known(weights: dict[str, Tensor], where: str) -> Backbone:
    from uncollapse.checkpoints.capi import capi_backbone

    if "patch_embed.weight" in weights and any(n.startswith("encoder.blocks.") for n in weights):
        return capi_backbone(weights, where)
    if "rope_embed.periods" in weights:
        return _dinov3(weights, where)
    if any(n.endswith(".relative_position_bias_table") for n in weights):
        return _swin(weights, where)
    if "patch_embed.proj.0.0.weight" in weights:
        return _xcit(weights, where)
    if "patch_embed.proj.weight" in weights:
        module, width, size, described = _vit(weights, where)
        return Backbone(module, width, size, described, PatchTokens(module.vit))  # type: ignore[arg-type]
    if "conv1.weight" in weights and "layer4.0.conv1.weight" in weights:
        return Backbone(*_resnet(weights, where))
    first = ", ".join(list(weights)[:3]) or "nothing"
    raise InputError(
        f"{where}: the backbone was not understood (no ViT, Swin, XCiT, CAPI encoder or ResNet; it begins with "
        f"{first}), so --data cannot run it; its prototypes can still be diagnosed without --data"
    )


def _gates_packed(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """SwiGLU in any spelling as timm's packed one: w1 (gate) above w2, or w12, → fc1, and w3 → fc2."""
    gated = any(re.search(r"\.mlp\.w(12|1)\.", n) for n in weights)
    out = {}
    for name, tensor in weights.items():
        if name.find(".mlp.w2.") > 0:
            continue
        if ".mlp.w1." in name:
            tensor = torch.cat([tensor, weights[name.replace(".w1.", ".w2.")]])
        out[re.sub(r"\.mlp\.(w12|w1|w3)\.", lambda m: ".mlp.fc2." if m[1] == "w3" else ".mlp.fc1.", name)] = tensor
    return out, gated


# ---------------------------------------------------------------------------------------- transformers


def _vit(weights: dict[str, Tensor], where: str) -> tuple[nn.Module, int, int, str]:
    """DINO, iBOT, MSN, DINOv2 and Web-SSL: learned positions, always run at the size that they were learned for.

    At that size nothing has to be interpolated, which every one of these repositories does in a way of its own.
    """
    from timm.layers.mlp import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    weights = {n: t.float() for n, t in weights.items()}
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    # FSDP checkpoints of DINOv2 number blocks within chunks: blocks.0.7.norm1 is block 7.
    weights = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", n): t for n, t in weights.items()}
    weights = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", n): t for n, t in weights.items()}  # iBOT's layer scale
    weights, gated = _gates_packed(weights)
    weights.pop("mask_token", None)
    weights.pop("masked_embed", None)
    depth = count_of(weights, r"blocks\.(\d+)\.")
    head = WIDE_HEADS.get(width, HEAD_DIM)
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) if "pos_embed" in weights else 0
    learned = side > 0 and weights["pos_embed"].shape[1] == side * side + 1
    if not learned or "cls_token" not in weights or "blocks.0.mlp.fc1.weight" not in weights or width % head:
        missing = (
            f"a width of {width}, which is no multiple of {head}"
            if width % head
            else "blocks without an MLP"
            if depth and learned
            else "no learned position embedding on a square, class token or blocks"
        )
        raise InputError(f"{where}: a vision transformer that was not understood ({missing}); --data cannot run it")
    registers = weights.pop("register_tokens", None)
    # timm would put its own default activation into the gate.
    options: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    if registers is not None:
        # Registers have no position: the class token's is added to it, and only patches keep theirs.
        options |= {"reg_tokens": registers.shape[1], "no_embed_class": True}
        weights["reg_token"] = registers
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    model = VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // head,
        mlp_ratio=ratio(weights["blocks.0.mlp.fc1.weight"].shape[0], width),
        num_classes=0,
        global_pool="token",
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        proj_bias="blocks.0.attn.proj.bias" in weights,
        dynamic_img_size=True,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        **options,
    )
    load(model, weights, where, "vision transformer")
    kind = "ViT with SwiGLU" if gated else "ViT"
    return ClassToken(model), width, side * patch, f"{kind}, {depth} blocks of width {width}, patch {patch}"


class _UntiedNorm(nn.Module):
    """DINOv3's ``untie_cls_and_patch_norms``: one norm for class token and registers, another for patches."""

    def __init__(self, prefix: nn.Module, patches: nn.Module, count: int) -> None:
        super().__init__()
        self.prefix, self.patches, self.count = prefix, patches, count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.prefix(x[:, : self.count]), self.patches(x[:, self.count :])], 1)


def _dinov3(weights: dict[str, Tensor], where: str) -> Backbone:
    """Rotary positions whose periods are in the file, and with them the width of a head."""
    from timm.models.eva import Eva

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    periods = weights.pop("rope_embed.periods")
    head = 4 * len(periods)
    weights, gated = _gates_packed(weights)
    depth = count_of(weights, r"blocks\.(\d+)\.")
    if not depth or width % head or "cls_token" not in weights or "blocks.0.mlp.fc1.weight" not in weights:
        raise InputError(
            f"{where}: DINOv3's transformer was not understood (heads of {head}, {depth} blocks); --data cannot run it"
        )
    registers = weights.pop("storage_tokens", None)
    count = 0 if registers is None else registers.shape[1]
    if registers is not None:
        weights["reg_token"] = registers
    # RMSNorm has no bias. LayerNorm's ε is not in the file: 1e-5 is that of every published DINOv3.
    norm: Any = partial(nn.LayerNorm if "norm.bias" in weights else nn.RMSNorm, eps=1e-5)
    biased = "blocks.0.attn.qkv.bias" in weights
    rows = weights["blocks.0.mlp.fc1.weight"].shape[0]
    model: Any = Eva(
        img_size=16 * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // head,
        num_classes=0,
        global_pool="token",
        qkv_bias=biased,
        swiglu_mlp=gated,
        mlp_ratio=ratio(rows // 2 if gated else rows, width),
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        num_reg_tokens=count,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        use_fc_norm=False,
        dynamic_img_size=True,
        norm_layer=norm,
    )
    model.rope.periods.copy_(periods)
    renamed = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", n): t for n, t in weights.items()}
    renamed.pop("mask_token", None)
    # local_cls_norm is for small crops in training, and none are looked at here.
    renamed = {n: t for n, t in renamed.items() if not n.startswith("local_cls_norm.")}
    for i in range(depth if biased else 0):
        at = f"blocks.{i}.attn."
        bias = renamed.pop(f"{at}qkv.bias") * renamed.pop(f"{at}qkv.bias_mask", torch.ones(()))
        if not bool(torch.isfinite(bias).all()):
            raise InputError(f"{where}: {at}qkv's bias or its mask is not finite; --data cannot run it")
        renamed[f"{at}q_bias"], key, renamed[f"{at}v_bias"] = bias.chunk(3)
        model.blocks[i].attn.k_bias.copy_(key)  # a buffer that timm does not save; the mask makes it zero
    if "cls_norm.weight" in renamed:
        model.norm = _UntiedNorm(norm(width), model.norm, 1 + count)
        untied = {"cls_norm.": "norm.prefix.", "norm.": "norm.patches."}
        renamed = {
            next((new + n.removeprefix(old) for old, new in untied.items() if n.startswith(old)), n): t
            for n, t in renamed.items()
        }
    load(model, renamed, where, "DINOv3 transformer")
    described = f"DINOv3 ViT{' with SwiGLU' if gated else ''}, {depth} blocks of width {width}, patch {patch}"
    # Rotary positions know no size: 224 pixels are what DINOv3's own models are built for.
    return Backbone(model, width, 224 // patch * patch, described, PatchTokens(model))


def _swin(weights: dict[str, Tensor], where: str) -> Backbone:
    """EsViT's and iBOT's Swin: the view feature is the mean of the normed tokens, regions are those tokens."""
    from timm.models.swin_transformer import SwinTransformer

    weights = {n: t for n, t in weights.items() if not n.endswith(("attn_mask", "masked_embed"))}
    stages = count_of(weights, r"layers\.(\d+)\.blocks\.")
    depths = tuple(count_of(weights, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(stages))
    tables = [weights.get(f"layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(stages)]
    embed = weights.get("patch_embed.proj.weight")
    if not stages or 0 in depths or embed is None or embed.ndim != 4 or any(t is None for t in tables):
        raise InputError(
            f"{where}: a Swin transformer that was not understood ({stages} stages, blocks {depths}); "
            "--data cannot run it"
        )
    if "absolute_pos_embed" in weights:
        raise InputError(f"{where}: a Swin transformer with absolute positions, which was not understood")
    windows = [(round(len(t) ** 0.5) + 1) // 2 for t in tables if t is not None]
    width, _, patch, _ = embed.shape
    size = _swin_size(windows, patch, where)
    rows = weights["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    model = SwinTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depths=depths,
        window_size=max(windows),
        num_heads=tuple(t.shape[1] for t in tables if t is not None),
        mlp_ratio=ratio(rows, width),
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in weights,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
    )
    # The originals shrink the map at the end of a stage, timm at the start of the next.
    renamed = {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", n): t
        for n, t in weights.items()
    }
    load(model, renamed, where, "Swin transformer")
    described = f"Swin, {'-'.join(map(str, depths))} blocks, width {model.num_features}, window {max(windows)}"
    return Backbone(model, model.num_features, size, described, PatchTokens(model))


def _swin_size(windows: list[int], patch: int, where: str) -> int:
    """Side of the images: 224, or the smallest whose maps are cut into these windows without a remainder."""
    largest = max(windows)
    for size in (224, largest * patch << (len(windows) - 1), min(windows) * patch << (len(windows) - 1)):
        maps = [size // patch >> i for i in range(len(windows))]
        whole = (
            all(m % w == 0 for m, w in zip(maps, windows, strict=True)) and size % (patch << (len(windows) - 1)) == 0
        )
        if whole and all(w == min(largest, m) for m, w in zip(maps, windows, strict=True)):
            return size
    raise InputError(f"{where}: no image size fits Swin's windows {windows} at patch {patch}; --data cannot run it")


def _xcit(weights: dict[str, Tensor], where: str) -> Backbone:
    """DINO's XCiT, whose number of heads is that of its temperatures."""
    from timm.models.xcit import Xcit

    width = weights["cls_token"].shape[-1] if "cls_token" in weights else 0
    convolutions = count_of(weights, r"patch_embed\.proj\.(\d+)\.0\.") // 2 + 1
    depth = count_of(weights, r"blocks\.(\d+)\.")
    temperature = weights.get("blocks.0.attn.temperature")
    if not width or convolutions not in (3, 4) or temperature is None or "blocks.0.mlp.fc1.weight" not in weights:
        raise InputError(
            f"{where}: an XCiT that was not understood ({convolutions} convolutions, {depth} blocks); "
            "--data cannot run it"
        )
    patch = 2**convolutions
    model = Xcit(
        img_size=224,
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=len(temperature),
        mlp_ratio=ratio(weights["blocks.0.mlp.fc1.weight"].shape[0], width),
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        cls_attn_layers=count_of(weights, r"cls_attn_blocks\.(\d+)\."),
        use_pos_embed="pos_embeder.token_projection.weight" in weights,
        # Of XCiT's sizes only nano, 128 wide, norms the class token alone in its last blocks.
        tokens_norm=width != 128,
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if m := re.match(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)$", name):
            renamed |= {f"{m[1]}{part}.{m[2]}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[name] = tensor
    load(model, renamed, where, "XCiT")
    return Backbone(model, width, 224, f"XCiT, {depth} blocks of width {width}, patch {patch}")


# ---------------------------------------------------------------------------------------- convolutions


def _resnet(weights: dict[str, Tensor], where: str) -> tuple[nn.Module, int, int, str]:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    weights = {n: t.float() for n, t in weights.items()}
    layers = [count_of(weights, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in weights
    block: Any = Bottleneck if bottleneck else BasicBlock
    model = ResNet(block, tuple(layers), num_classes=0)
    if weights["conv1.weight"].shape != model.conv1.weight.shape:
        raise InputError(
            f"{where}: a ResNet with an unusual stem {tuple(weights['conv1.weight'].shape)}; not understood"
        )
    load(model, weights, where, "ResNet")
    return model, model.num_features, 224, f"ResNet of {layers} {'bottleneck' if bottleneck else 'basic'} blocks"
