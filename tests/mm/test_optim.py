"""Muon does what torch's does, in FP32 and for many matrices at once, and gets the matrices that it is meant for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mm.checkpoint import debug_model
from mm.stages import STAGES, LearningRates, apply
from mm.train.config import OptimConfig
from mm.train.muon import Muon, orthogonal
from mm.train.optim import make_optimizer

SHAPES = ((6, 9), (9, 6), (6, 9), (5, 5))


def test_updates_are_nearly_orthogonal() -> None:
    x_XRC = (
        torch.randn(3, 11, 17, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e3])[:, None, None]
    )
    u_XRC = orthogonal(x_XRC)
    singular = torch.linalg.svdvals(u_XRC)
    assert singular.min() > 0.6 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(x_XRC, full_matrices=False)
    inner = left.mT @ u_XRC @ right.mT  # diagonal: the singular vectors stay
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-4)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_steps_are_those_of_torch(in_bf16: bool) -> None:
    """Which multiplies in bf16, so no nearer than that; with `dtype: bfloat16`, so do ours. Parameters stay FP32."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizer = Muon([{"params": ours}], **settings)
    oracle = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == torch.float32 and torch.allclose(p, q, atol=0.01)


def test_muon_gets_the_matrices_of_layers_alone() -> None:
    model = debug_model()
    rates = LearningRates(encoder=1e-3, adapter=1e-3, gates=1e-2)
    config = OptimConfig(steps=2, batch_size=1, lr=rates, matrices="muon")
    optimizer = make_optimizer(apply(STAGES["image-adapter"], model, rates), config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: "momentum" in group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert groups["image_adapter.projection.weight"] and not groups["image_adapter.projection.bias"]
    assert groups["image_encoder.blocks.0.attn.qkv.weight"]
    assert not any(
        groups[name] for name in groups if "embed" in name or "norm" in name or "gate" in name.rpartition(".")[2]
    )
    plain = make_optimizer(apply(STAGES["image-adapter"], model, rates), dataclasses.replace(config, matrices="adamw"))
    assert not any("momentum" in group for group in plain.param_groups)
    with pytest.raises(ValueError, match=r"optim.matrices 'sgd' is unknown; choose 'adamw' or 'muon'"):
        dataclasses.replace(config, matrices="sgd")
