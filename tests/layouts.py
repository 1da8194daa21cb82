"""Synthetic checkpoints in the layout of each family, with a known number of unique prototypes."""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch

EPS = 0.025


def _at(base: torch.Tensor, other: torch.Tensor, distance: float) -> torch.Tensor:
    """The unit vector at a cosine distance from base, towards other; both unit and orthogonal."""
    cos = 1 - distance
    return cos * base + math.sqrt(1 - cos * cos) * other


@dataclass
class Planted:
    """(K, D) rows of any length, and what they count to at ε = 0.025."""

    w: torch.Tensor
    unique: int
    components: int
    no_neighbour: int


def planted(distinct: int = 6, copies: int = 20, outside: int = 2, chains: int = 2, dim: int = 48, seed: int = 0):
    """Copies on both sides of ε, and chains in which every second link is kept by greedy but joined by the graph."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    assert 3 * distinct + 2 * chains <= dim
    base, near, far = axes[:distinct], axes[distinct : 2 * distinct], axes[2 * distinct : 3 * distinct]
    rows = list(base)
    for i in range(copies):
        rows.append(_at(base[i % distinct], near[i % distinct], 0.001 + 0.02 * float(torch.rand((), generator=rng))))
    for i in range(outside):
        rows.append(_at(base[i], far[i], 0.03))
    for i in range(chains):
        a, b = axes[3 * distinct + 2 * i], axes[3 * distinct + 2 * i + 1]
        step = math.acos(1 - 0.02)
        rows += [math.cos(k * step) * a + math.sin(k * step) * b for k in range(3)]
    w = torch.stack(rows) * (0.2 + torch.rand(len(rows), 1, generator=rng, dtype=torch.float64))
    alone = distinct - min(distinct, copies)
    return Planted(w.float(), distinct + outside + 2 * chains, distinct + outside + chains, alone + outside)


def norm_old(p: Planted, prefix: str, g: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{prefix}.weight_g": torch.full((len(p.w), 1), g), f"{prefix}.weight_v": p.w}


def norm_new(p: Planted, prefix: str) -> dict[str, torch.Tensor]:
    at = f"{prefix}.parametrizations.weight.original"
    return {f"{at}0": torch.ones(len(p.w), 1), f"{at}1": p.w}


def mlp(prefix: str, dim: int, bn: bool = False) -> dict[str, torch.Tensor]:
    sizes, out, i = [(32, 24), (32, 32), (dim, 32)], {}, 0
    for rows, columns in sizes:
        out[f"{prefix}.{i}.weight"] = torch.randn(rows, columns)
        out[f"{prefix}.{i}.bias"] = torch.zeros(rows)
        if bn and rows == 32:
            i += 1
            for name in ("weight", "bias", "running_mean", "running_var"):
                out[f"{prefix}.{i}.{name}"] = torch.ones(rows)
        i += 2
    return out


def backbone(prefix: str = "backbone.") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}patch_embed.proj.weight": torch.randn(24, 3, 8, 8),
        f"{prefix}blocks.0.attn.qkv.weight": torch.randn(72, 24),
    }


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


ARGS = argparse.Namespace(arch="vit_small", out_dim=65536, lr=np.float64(0.1), batch=np.int64(3))


def _net(p: Planted, bn: bool = False, new: bool = False) -> dict[str, torch.Tensor]:
    layer = norm_new if new else norm_old
    return {**backbone(), **mlp("head.mlp", p.w.shape[1], bn), **layer(p, "head.last_layer")}


T, S, X = planted(6, seed=1), planted(8, copies=30, seed=2), planted(5, copies=21, seed=3)


def _dino(new: bool = False, wrap: str = "module.") -> dict:
    loss = {"center": torch.zeros(1, len(T.w))}
    optimizer = {"state": {0: {"exp_avg": torch.randn(40, 48), "step": 3}}, "param_groups": [{"lr": np.float64(0.1)}]}
    return {
        "student": prefixed(wrap, _net(S, new=new)),
        "teacher": _net(T, new=new),
        "optimizer": optimizer,
        "epoch": 100,
        "args": ARGS,
        "dino_loss": loss,
        "fp16_scaler": None,
    }


def _ibot(shared: bool) -> dict:
    def net(p: Planted, other: Planted) -> dict:
        return {**_net(p), **norm_old(p if shared else other, "head.last_layer2")}

    return {
        "student": prefixed("module.", net(S, X)),
        "teacher": net(T, X),
        "optimizer": {},
        "epoch": 3,
        "args": ARGS,
        "ibot_loss": {"center": torch.zeros(1, len(T.w)), "center2": torch.zeros(1, 1, len(X.w))},
    }


def _esvit() -> dict:
    def net(p: Planted) -> dict:
        return {
            "layers.0.blocks.0.norm1.weight": torch.ones(24),
            "patch_embed.proj.weight": torch.randn(24, 3, 4, 4),
            **mlp("head.mlp", 48),
            **norm_old(p, "head.last_layer"),
            **mlp("head_dense.mlp", 48),
            **norm_old(X, "head_dense.last_layer"),
        }

    loss = {"center": torch.zeros(1, len(T.w)), "center_grid": torch.zeros(1, len(X.w))}
    return {"student": prefixed("module.", net(S)), "teacher": net(T), "args": ARGS, "dino_loss": loss}


def _msn() -> dict:
    net = {
        "module.patch_embed.proj.weight": torch.randn(24, 3, 8, 8),
        "module.fc.fc1.weight": torch.randn(32, 24),
        "module.fc.fc3.weight": torch.randn(48, 32),
    }
    return {
        "encoder": net,
        "opt": {"state": {}},
        "prototypes": T.w,
        "target_encoder": dict(net),
        "epoch": 5,
        "loss": np.float64(1.0),
        "batch_size": 64,
        "world_size": 16,
        "lr": 1e-3,
        "temperature": 0.1,
    }


def _carp() -> dict:
    states = [prefixed("module.", _net(p, bn=True)) for p in (S, T)]
    return {"student": states[0], "teacher": states[1], "optimizer": {}, "epoch": 1, "args": ARGS, "fp16_scaler": {}}


def _capi() -> dict:
    model = {
        **backbone("student.backbone."),
        **norm_old(S, "student.head.last_layer"),
        **backbone("teacher.backbone."),
        "teacher.head.layer.weight": T.w,
        "teacher.head.layer.bias": torch.zeros(len(T.w)),
    }
    return {"iteration": 9, "model": model, "optimizer": {}, "clustering_optimizer": {}}


def _dinov2() -> dict:
    net = {**backbone(), **mlp("dino_head.mlp", 48), **norm_old(T, "dino_head.last_layer")}
    return {"teacher": {**net, **mlp("ibot_head.mlp", 48), **norm_old(X, "ibot_head.last_layer")}}


def _dinov3() -> dict:
    wrapped = "student.dino_head._fsdp_wrapped_module.", "teacher.dino_head._checkpoint_wrapped_module."
    return {"model": {f"{wrapped[0]}last_layer.weight": S.w, f"{wrapped[1]}last_layer.weight": T.w}}


def _swav() -> dict:
    net = {"conv1.weight": torch.randn(8, 3, 7, 7), "projection_head.0.weight": torch.randn(32, 24)}
    return prefixed("module.", {**net, "projection_head.3.weight": torch.randn(48, 32), "prototypes.weight": T.w})


def _swav_several() -> dict:
    return prefixed(
        "module.",
        {
            "projection_head.0.weight": torch.randn(32, 24),
            "prototypes.prototypes0.weight": T.w,
            "prototypes.prototypes1.weight": X.w,
        },
    )


def _lightly_swav() -> dict:
    state = {"backbone.0.weight": torch.randn(8, 3, 7, 7), "prototypes.heads.0.weight": T.w}
    state |= {"prototypes.heads.0.bias": torch.zeros(len(T.w)), "prototypes.heads.1.weight": X.w}
    return {"state_dict": state, "epoch": 1, "pytorch-lightning_version": "2.4", "hyper_parameters": {"lr": 1}}


def _lightly_dino() -> dict:
    state = {**norm_old(S, "student_head.last_layer"), **norm_old(T, "teacher_head.last_layer")}
    return {"state_dict": {**state, **mlp("student_head.layers", 48)}}


def _solo() -> dict:
    state = {**backbone("backbone."), **norm_old(S, "head.last_layer"), **norm_old(T, "momentum_head.last_layer")}
    return {"state_dict": {**state, "classifier.weight": torch.randn(10, 24)}, "optimizer_states": [{"a": 1}]}


def _solo_swav() -> dict:
    return {"state_dict": {"projector.0.weight": torch.randn(32, 24), **norm_old(T, "prototypes")}}


def _own_joint() -> dict:
    sides = {"student_v": S.w, "student_g": torch.ones(len(S.w), 1)}
    sides |= {"teacher_v": T.w, "teacher_g": torch.ones(len(T.w), 1)}
    return {"format": 1, "step": 4, "student": {}, "teacher": {}, "prototypes": {"cls": sides}}


def _own(weight: dict) -> dict:
    return {"format": 1, "step": 4, "student": {}, "teacher": {}, "prototypes": {"cls": weight}}


def _own_mixture() -> dict:
    return _own({"mixture.mean": T.w, "mixture.variance": torch.ones(1, 1), "mixture.queue": torch.randn(7, 48)})


LAYOUTS = {
    "DINO": (_dino(), "DINO", [("teacher", "cls", T), ("student", "cls", S)]),
    "DINO, new weight norm": (_dino(new=True), "DINO", [("teacher", "cls", T), ("student", "cls", S)]),
    "DINO, compiled": (_dino(wrap="module._orig_mod."), "DINO", [("teacher", "cls", T), ("student", "cls", S)]),
    "DINO, FSDP": (_dino(wrap="_fsdp_wrapped_module."), "DINO", [("teacher", "cls", T), ("student", "cls", S)]),
    "iBOT, shared": (_ibot(True), "iBOT", [("teacher", "cls", T), ("student", "cls", S)]),
    "iBOT, separate": (
        _ibot(False),
        "iBOT",
        [("teacher", "cls", T), ("teacher", "patch", X), ("student", "cls", S), ("student", "patch", X)],
    ),
    "EsViT": (
        _esvit(),
        "EsViT",
        [("teacher", "cls", T), ("teacher", "region", X), ("student", "cls", S), ("student", "region", X)],
    ),
    "MSN": (_msn(), "MSN", [("shared", "cls", T)]),
    "CARP": (_carp(), "CARP", [("teacher", "cls", T), ("student", "cls", S)]),
    "CAPI": (_capi(), "CAPI", [("teacher", "clusters", T), ("student", "patch", S)]),
    "DINOv2": (_dinov2(), "DINOv2 / DINOv3", [("teacher", "cls", T), ("teacher", "patch", X)]),
    "DINOv3, wrapped": (_dinov3(), "DINOv2 / DINOv3", [("teacher", "cls", T), ("student", "cls", S)]),
    "Web-SSL heads": (_dinov2()["teacher"], "DINOv2 / DINOv3", [("unstated", "cls", T), ("unstated", "patch", X)]),
    "SwAV": (_swav(), "SwAV", [("shared", "cls", T)]),
    "SwAV, several": (_swav_several(), "SwAV", [("shared", "cls", T), ("shared", "cls", X)]),
    "lightly SwAV": (_lightly_swav(), "lightly", [("unstated", "cls", T), ("unstated", "cls", X)]),
    "lightly DINO": (_lightly_dino(), "lightly", [("teacher", "cls", T), ("student", "cls", S)]),
    "solo-learn DINO": (_solo(), "solo-learn", [("teacher", "cls", T), ("student", "cls", S)]),
    "solo-learn SwAV": (_solo_swav(), "solo-learn", [("unstated", "cls", T)]),
    "ours, joint": (_own_joint(), "uncollapse", [("teacher", "cls", T), ("student", "cls", S)]),
    "ours, fixed": (_own({"weight": T.w}), "uncollapse", [("shared", "cls", T)]),
    "ours, mixture": (_own_mixture(), "uncollapse", [("shared", "cls", T)]),
}
"""Name → checkpoint, family, and the (side, set, planted) that must be found, in order."""
