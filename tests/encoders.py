"""Small encoders with random weights, and the names that each family's own code gives them.

Where timm computes what a family computes, a timm model is the reference and its weights are renamed; where it does
not, the reference is written out here.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.mlp import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit


def noisy(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight and running statistic moved off its start, so that none can be left out unnoticed."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.state_dict().values():
            if p.is_floating_point():
                p.add_(0.1 * torch.rand(p.shape, generator=rng))
    return model.eval()


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return noisy(VisionTransformer(**{**sizes, **options}, num_classes=0, dynamic_img_size=True))


def gated_vit(**options) -> tuple[VisionTransformer, dict]:
    """DINOv2's ViT-g and Web-SSL: fused SwiGLU, layer scale, blocks numbered within chunks."""
    model = vit(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=3.0, init_values=0.5, **options)
    state = {
        n.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): t for n, t in model.state_dict().items()
    }
    return model, {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", n): t for n, t in state.items()}


def swin(window: int = 2) -> tuple[SwinTransformer, dict]:
    """EsViT's: downsampling at the end of a stage, integer indices of positions, LayerNorm with ε = 1e-6."""
    torch.manual_seed(0)
    model = noisy(
        SwinTransformer(
            img_size=224,
            patch_size=8,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=window,
            num_classes=0,
            mlp_ratio=2.0,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )
    )
    state = {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", n): t
        for n, t in model.state_dict().items()
    }
    for stage in (0, 1):
        state[f"layers.{stage}.blocks.1.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        state[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(1, 4, 4)
    return model, state


def xcit(patch: int = 16, width: int = 64) -> tuple[Xcit, dict]:
    """XCiT's own names: a fused qkv in the class attention, and the positions' misspelt module."""
    torch.manual_seed(0)
    model = noisy(
        Xcit(
            img_size=32,
            patch_size=patch,
            embed_dim=width,
            depth=2,
            num_heads=4,
            num_classes=0,
            tokens_norm=width != 128,
        )
    )
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("pos_embed.", "pos_embeder.")
        if re.match(r"cls_attn_blocks\.\d+\.attn\.[kv]\.", name):
            continue
        if m := re.match(r"(cls_attn_blocks\.\d+\.attn\.)q\.(weight|bias)", name):
            name = f"{m[1]}qkv.{m[2]}"
            tensor = torch.cat([model.state_dict()[f"{m[1]}{part}.{m[2]}"] for part in "qkv"])
        state[name] = tensor
    return model, state


def dinov3(gated: bool = False, masked: bool = True, registers: int = 3) -> tuple[Eva, dict]:
    """Rotary positions with their periods, storage tokens, a mask over the key's bias, w1/w2/w3 gates."""
    torch.manual_seed(0)
    model = Eva(
        img_size=32,
        patch_size=16,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="token",
        qkv_bias=True,
        swiglu_mlp=gated,
        mlp_ratio=2.0,
        init_values=0.5,
        num_reg_tokens=registers,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        use_fc_norm=False,
        dynamic_img_size=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
    )
    noisy(model)
    model.rope.periods.copy_(100 ** (torch.arange(8) / 8))
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name).replace("reg_token", "storage_tokens")
        if gated and (m := re.match(r"(.*\.mlp\.)fc([12])\.(weight|bias)$", name)):
            parts = dict(zip(("w1", "w2"), tensor.chunk(2), strict=True)) if m[2] == "1" else {"w3": tensor}
            state |= {f"{m[1]}{part}.{m[3]}": rows for part, rows in parts.items()}
        elif not name.endswith(("q_bias", "v_bias")):
            state[name] = tensor
    for i, block in enumerate(model.blocks):
        attn = block.attn
        if masked:
            attn.k_bias.zero_()
        key = torch.full_like(attn.k_bias, 7.0) if masked else attn.k_bias
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([attn.q_bias, key, attn.v_bias]).detach()
        if masked:
            one = torch.ones(64)
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([one, 0 * one, one])
    state["rope_embed.periods"] = model.rope.periods.clone()
    state |= {"mask_token": torch.randn(1, 64), "local_cls_norm.weight": torch.ones(64)}
    return model, state


def capi(width: int = 16, head: int = 8, depth: int = 2, patch: int = 8, registers: int = 4) -> dict:
    """Weights of CAPI's encoder, with a decoder beside it."""
    rng = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return 0.4 * torch.randn(*shape, generator=rng)

    state = {
        "patch_embed.weight": weight(width, 3, patch, patch),
        "patch_embed.bias": weight(width),
        "registers": weight(1, registers, width),
        "mask_token": weight(1, width),
    }
    for i in range(depth):
        at = f"encoder.blocks.{i}.residual"
        for layer in ("q_proj", "k_proj", "v_proj", "proj"):
            state[f"{at}1.fn.{layer}.weight"] = weight(width, width)
        state[f"{at}1.fn.rope.freqs"] = 5 * weight(2, head)
        # channels turn in pairs, a half apart, by one angle
        state[f"{at}1.fn.rope.freqs"][:, head // 2 :] = state[f"{at}1.fn.rope.freqs"][:, : head // 2]
        state[f"{at}2.fn.fc1.weight"], state[f"{at}2.fn.fc2.weight"] = weight(24, width), weight(width, 24)
        state[f"{at}1.norm.weight"], state[f"{at}2.norm.weight"] = 1 + weight(width), 1 + weight(width)
    state["decoder.blocks.0.residual1.norm.weight"] = weight(width)
    return state


def capi_tokens(state: dict, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
    """What CAPI's encoder computes, written another way: rotations as complex numbers, attention head by head."""
    tokens = F.conv2d(x, state["patch_embed.weight"], state["patch_embed.bias"], stride=8)
    rows, columns = tokens.shape[2:]
    places = [(r / (rows - 1), c / (columns - 1)) for r in range(rows) for c in range(columns)]
    # four registers: one at each corner, going round
    places = torch.tensor([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0), *places])
    h = torch.cat([state["registers"].expand(len(x), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)

    def rms(y: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale

    for i in range(depth):
        at = f"encoder.blocks.{i}.residual"
        y = rms(h, state[f"{at}1.norm.weight"])
        q, k, v = (y @ state[f"{at}1.fn.{n}_proj.weight"].T for n in "qkv")
        freqs = state[f"{at}1.fn.rope.freqs"]
        size = freqs.shape[1]
        turn = torch.polar(torch.ones(()), places @ freqs[:, : size // 2])
        heads = []
        for a in range(0, q.shape[-1], size):
            one, two = (
                torch.complex(t[..., a : a + size // 2], t[..., a + size // 2 : a + size]) * turn for t in (q, k)
            )
            score = (one @ two.conj().transpose(1, 2)).real / size**0.5
            heads.append(score.softmax(-1) @ v[..., a : a + size])
        h = h + torch.cat(heads, -1) @ state[f"{at}1.fn.proj.weight"].T
        hidden = F.gelu(rms(h, state[f"{at}2.norm.weight"]) @ state[f"{at}2.fn.fc1.weight"].T)
        h = h + hidden @ state[f"{at}2.fn.fc2.weight"].T
    return rms(h, 1.0)[:, 4:]
