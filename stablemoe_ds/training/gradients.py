"""Gradients on their way to AdamW: fp32 throughout, summed only between ranks, their norm read once an update.

DeepSpeed 0.19.8 rounds them to the model's dtype where it reduces, also in a group of one rank; copies what it
reduces there and back; and reads one number an optimizer group to clip. The classes below are DeepSpeed's with these
few methods replaced, and :func:`adopt` puts them in the place of DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def adopt(engine: DeepSpeedEngine) -> None:
    """Let a DeepSpeed engine that was just initialized treat gradients as this file says."""
    engine.__class__ = _Engine
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.__class__ = _Bf16Optimizer
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        optimizer.__class__ = _ZeroOptimizer
        optimizer.check_grad_overflow = True  # the norm decides, in every dtype; see _ZeroOptimizer.check_overflow
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.__class__, optimizer.mpu = Zero3Optimizer, engine.mpu


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by so that it does not exceed ``limit``; 0 means no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


def global_norm(gradients: Iterable[tuple[int, Tensor]], device: torch.device | str) -> float:
    """L2 norm over all ranks, not finite if any gradient is not. Collective; the one wait for the device.

    gradients: fp32 tensors of this rank, each with the number of ranks that hold the same values.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for copies, gradient in gradients:
        by_copies.setdefault(copies, []).append(gradient)
    squares = torch.zeros((), device=device)
    for copies, held in by_copies.items():
        squares += nn.utils.get_total_norm(held).square() / copies
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return math.sqrt(float(squares))


def _copies(optimizer: Any, parameter: nn.Parameter) -> int:
    """Tensor-parallel ranks that compute with the same values of a parameter."""
    whole = getattr(parameter, "allreduce", True) and not getattr(parameter, "tensor_model_parallel", False)
    return optimizer.mpu.get_model_parallel_world_size() if whole else 1


class _Engine(DeepSpeedEngine):
    """Reduces the flat fp32 gradients of ZeRO 1 in bf16 where they lie, and nothing in a group of one."""

    def backward(self, loss: Tensor, **options: Any) -> Tensor:
        """From one micro-batch. DeepSpeed's hook on the model's outputs, which does not find ours, would tell its
        optimizer which is the last of an update; it moves the sums of gradients to host memory then."""
        if isinstance(self.optimizer, Zero3Optimizer):
            self.optimizer.set_gradient_accumulation_boundary(self.is_gradient_accumulation_boundary())
        scaled: Tensor = super().backward(loss, **options)
        return scaled

    def allreduce_no_retain(
        self, bucket: list[Tensor], dp_group: Any, numel_per_bucket: int = 500_000_000, dp_world_size: Any = None
    ) -> None:
        """dp_world_size: what the sum is divided by; for experts more than there are ranks in their group."""
        ranks = dist.get_world_size(dp_group)
        if ranks > 1 and not isinstance(self.optimizer, BF16_Optimizer):  # many small ones: DeepSpeed joins them
            super().allreduce_no_retain(bucket, dp_group, numel_per_bucket, dp_world_size)
            return
        for gradient in bucket:
            if ranks > 1:
                dist.all_reduce(gradient, group=dp_group)
            if dp_world_size != 1 and self.gradient_average:
                gradient.mul_(1.0 / dp_world_size)


class _Bf16Optimizer(BF16_Optimizer):
    """ZeRO 1 in bf16. Every rank has all gradients of its parameters, and steps its partition of them."""

    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Add a micro-batch's bf16 gradient to the fp32 sum, without DeepSpeed's fp32 copy of it."""
        if lp.grad is not None:
            self.fp32_groups_gradients[group_idx][param_idx].add_(lp.grad.view(-1))

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        for group, parameters in enumerate(self.bf16_groups):
            ranks = dist.get_world_size(self.real_dp_process_group[group])
            for parameter, gradient in zip(parameters, self.fp32_groups_gradients[group], strict=True):
                yield ranks * _copies(self, parameter), gradient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """DeepSpeed's engine clears the gradients afterwards."""
        norm = global_norm(self.gradients(), self.bf16_groups_flat[0].device)
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = math.inf if self.overflow else norm
        if not self.overflow:
            factor = clip_factor(norm, self.clip_grad)
            for partition, gradient in zip(
                self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
            ):
                partition.grad = gradient.mul_(factor) if factor != 1.0 else gradient
            self.optimizer.step()
            self._lazy_init_hp_params_optimizer_state()
            self.update_lp_params()


class _ZeroOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO 1 in fp32 and fp16, ZeRO 2 in every dtype. A rank has the mean gradients of its partition."""

    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        """Of the bucket in which gradients are reduced. The model's dtype, DeepSpeed's choice for ZeRO 2, would round
        routers' gradients, which are fp32, and sums over ranks."""
        dtype: torch.dtype = self.gradient_accumulation_dtype
        return dtype

    def allreduce_and_copy_with_multiple_ranks(
        self,
        small_bucket: list[Tensor],
        *args: Any,
        process_group: Any = None,
        output_bucket: list[Tensor | None] | None = None,
        **options: Any,
    ) -> None:
        group = self.dp_process_group if process_group is None else process_group
        if dist.get_world_size(group) > 1:
            super().allreduce_and_copy_with_multiple_ranks(
                small_bucket, *args, process_group=group, output_bucket=output_bucket, **options
            )
            return
        for gradient, output in zip(small_bucket, output_bucket or (), strict=False):
            self._add_to_grad_partition_buffer(output, gradient)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: a gradient that is not finite makes the norm so, on all ranks."""

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        for group, parameters in enumerate(self.params_in_partition):
            held = (g for g in self.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            for parameter, gradient in zip(parameters, held, strict=False):
                yield _copies(self, parameter), gradient

    def scaled_global_norm(self, norm_type: int = 2) -> float:
        return global_norm(self.gradients(), self.bit16_groups_flat[0].device)

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: float) -> None:
        factor = clip_factor(total_norm / self.loss_scale, self.clip_grad) / self.loss_scale
        if factor != 1.0:
            for gradient in grad_groups_flat:
                gradient.mul_(factor)


class Zero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3. A rank has the mean gradients of its part of every parameter; a norm that is not finite drops an update.

    refused: the next update is to be dropped whatever its gradients are; equal on all ranks. Gradients cannot be spoilt
    to that end: DeepSpeed's buffers of them reach beyond the end of a parameter and are not cleared there.
    """

    refused = False

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing, as in :class:`_ZeroOptimizer`; DeepSpeed's would leave out tensor ranks, and wait once more."""

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        for group, parameters in enumerate(self.fp16_groups):
            for parameter, gradient in zip(parameters, self._held(group, parameters), strict=True):
                yield _copies(self, parameter), gradient

    def _held(self, group: int, parameters: list[nn.Parameter]) -> Sequence[Tensor]:
        if not self.offload_optimizer:
            held: list[Tensor] = self.averaged_gradients[group]
            return held
        flat: Tensor = self.fp32_partitioned_groups_flat[group].grad
        offloaded = flat.split([vars(parameter)["ds_tensor"].numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, offloaded, strict=True):
            if not parameter.requires_grad:  # nothing has written over what it was before the switch
                gradient.zero_()
        return offloaded

    def _get_norm_groups(self) -> list[Tensor]:
        norm = math.inf if self.refused else global_norm(self.gradients(), get_accelerator().current_device_name())
        self.refused = False
        return [torch.tensor(norm, device=self.device)]
