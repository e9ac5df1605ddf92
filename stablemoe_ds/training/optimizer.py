"""AdamW over named parameter groups that ZeRO, expert parallelism and the freeze of the distilled router need."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stablemoe_ds.config.schema import OptimizerConfig, ScheduleConfig
from stablemoe_ds.model.layout import shape_of
from stablemoe_ds.moe.experts import Experts
from stablemoe_ds.routing.distilled import Fp32Module

DISTILLED = "distilled"
"""Name of the group that stops learning at the switch."""


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up, then the chosen decay to ``min_lr_ratio``."""
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule.decay]
    if schedule.decay == "constant":
        return optimizer.lr
    return optimizer.lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * factor)


def _kind(name: str, parameter: nn.Parameter, fp32: set[int], stacked: set[int]) -> str:
    """Group of a parameter. Vectors are not decayed; a stacked expert bias is a vector an expert."""
    if ".distilled." in name:
        return DISTILLED
    if id(parameter) in fp32:
        return "router"
    dims = len(shape_of(parameter)) - (id(parameter) in stacked)
    return "decay" if dims > 1 else "plain"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups by what is done to them: decay, plain, router, distilled; experts apart, marked for DeepSpeed.

    Only ``decay`` (matrices) is decayed. Router parameters keep their own groups since they stay fp32.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    fp32, stacked = ({id(p) for p in parameters_in(model, kind)} for kind in (Fp32Module, Experts))
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "plain": [], "router": [], DISTILLED: []}
    for name, parameter in model.named_parameters():
        groups[_kind(name, parameter, fp32, stacked)].append(parameter)
    named = [
        {"name": name, "params": params, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, params in groups.items()
        if params
    ]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    # It goes through a set of names, whose order differs from process to process; ZeRO works group by group.
    return sorted(split, key=lambda group: group["name"] if group.get("moe") else "")


def make_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW, on CPU and CUDA; it needs no compiled extension of DeepSpeed's."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def restore_fp32(saved: dict[nn.Parameter, Tensor]) -> None:
    """Put the fp32 values of router parameters back after DeepSpeed has cast every parameter of the model."""
    for parameter, value in saved.items():
        parameter.data = value.to(parameter.device)


def fp32_parameters(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Copies of the parameters that must stay fp32."""
    return {p: p.detach().clone() for p in parameters_in(model, Fp32Module)}


def parameters_in(model: nn.Module, kind: type[nn.Module]) -> list[nn.Parameter]:
    """Those of all modules of this kind, in the model's order."""
    return [p for module in model.modules() if isinstance(module, kind) for p in module.parameters()]
