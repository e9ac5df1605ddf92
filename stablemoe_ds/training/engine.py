"""The only room that calls ``deepspeed.initialize``: one optimizer update over the model, whatever the layout."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from stablemoe_ds.config.batch import BatchPlan
from stablemoe_ds.config.deepspeed import deepspeed_config
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import DeepSpeedMpu, Groups, limit_waiting
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting
from stablemoe_ds.training.optimizer import DISTILLED, fp32_parameters, make_adamw, parameter_groups, restore_fp32
from stablemoe_ds.training.routed_batch import RoutedBatch


@dataclass(frozen=True)
class StepSums:
    """What one update saw, summed over all ranks and accumulation steps; host numbers.

    loss, balance, distill: sums over tokens. scored, real: tokens counted by them. agree: tokens for which the
    distilled router named the learned expert. dropped: (token, choice) pairs beyond capacity. unserved: (token, layer)
    pairs without an expert. counts_LN: tokens (times K) by MoE layer and expert. statistics_LN: means of what the
    routers wanted to know, empty for most.
    """

    loss: float
    balance: float
    distill: float
    scored: int
    real: int
    agree: int
    dropped: int
    unserved: int
    counts_LN: list[list[int]]  # noqa: N815
    statistics_LN: list[list[float]]  # noqa: N815
    stop_requested: bool

    @property
    def loads(self) -> list[float]:
        """max/mean load of each MoE layer in this update."""
        return [max(row) * len(row) / max(1, sum(row)) for row in self.counts_LN]


def tokens_of(routed: Sequence[RoutedBatch]) -> Tensor:
    """int64 [2]: tokens scored and real of this rank's micro-batches."""
    return torch.stack([torch.stack([r.batch.scored.sum(), r.batch.real.sum()]) for r in routed]).sum(0)


class Engine:
    """A model under DeepSpeed. ``accumulate`` runs forward and backward, ``update`` steps the optimizer."""

    def __init__(self, run: RunConfig, plan: BatchPlan, groups: Groups, model: StableMoEGPT) -> None:
        if run.precision.dtype == "fp16" and groups.world.device.type == "cpu":
            raise UserError(
                "precision.dtype: fp16 needs a GPU, this machine has none; nearest that works: bf16 or fp32"
            )
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.run, self.plan, self.groups, self.model = run, plan, groups, model
        self._frozen = False
        kept = fp32_parameters(model)

        def optimizer(_: Any) -> torch.optim.Optimizer:
            # DeepSpeed calls this after it has cast and moved the model, before ZeRO flattens the groups.
            restore_fp32(model, kept)
            return make_adamw(parameter_groups(model, run.optimizer.weight_decay), run.optimizer)

        with redirect_stdout(io.StringIO()):  # its optimizer for bf16 prints the memory in use, whatever is asked
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=[],
                config=deepspeed_config(run, plan),
                mpu=DeepSpeedMpu(),
                dist_init_required=False,
            )
        if run.parallel.zero_stage:
            # Without, ZeRO in fp32 looks at a mean of norms over ranks, which hides an expert that is not finite.
            self.optimizer.check_grad_overflow = True
        limit_waiting(groups.world.timeout)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer (ZeRO 1 and 2), or torch's own (ZeRO 0)."""
        return self.deepspeed.optimizer

    def freeze_distilled(self, frozen: bool = True) -> None:
        """Stop the distilled routers: no gradient, no momentum, no decay. ``False`` for a run that goes back."""
        self._frozen = frozen
        for router in self.model.distilled_routers:
            router.requires_grad_(not frozen)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            # Under ZeRO requires_grad alone does not freeze: momentum goes on moving the flat partition.
            scale = 1.0
            if group["name"] == DISTILLED:
                scale = 0.0 if self._frozen else self.run.moe.distilled.lr_scale
            group["lr"] = lr * scale

    def accumulate(
        self, routed: Sequence[RoutedBatch], routing: FixedRouting | None, seed: int, stop: bool
    ) -> StepSums:
        """Forward and backward of one update's micro-batches; gradients are reduced, weights not yet changed.

        routing: fixed routes for batches that come without; None in stage 1.
        seed: seed of random decisions in this update.
        stop: this process was asked to stop; every rank learns whether any was.
        """
        routed = [micro.to(self.groups.world.device) for micro in routed]
        counted = tokens_of(routed)
        outputs: list[ForwardOutput] = []
        self.deepspeed.train()
        for output, loss in self.forward(self.deepspeed, routed, counted, routing, seed):
            self.deepspeed.backward(loss)
            outputs.append(output)
            if len(outputs) < len(routed):
                self.deepspeed.step()
        return self._sums(outputs, counted, stop)

    def forward(
        self,
        model: Callable[..., ForwardOutput],
        routed: Sequence[RoutedBatch],
        counted: Tensor,
        routing: FixedRouting | None,
        seed: int,
    ) -> Iterator[tuple[ForwardOutput, Tensor]]:
        """Each micro-batch through ``model`` (this one, or DeepSpeed around it), and its loss to go backward from.

        counted: their :func:`tokens_of`.
        """
        groups, moe = self.groups, self.run.moe
        scored, real = groups.sum_over_data_ranks(counted).float().clamp_min(1).unbind()
        # DeepSpeed averages over data ranks and accumulation steps; this makes of the average a global mean.
        shares = groups.data_size * len(routed)
        for number, micro in enumerate(routed):
            if self.run.model.dropout:
                torch.manual_seed(hash((seed, number, groups.data_rank)) & 0x7FFF_FFFF)
            fixed_LTK = micro.fixed_LTK
            if fixed_LTK is None and routing is not None:
                fixed_LTK = routing(micro.batch.ids)
            output = model(micro.batch, fixed_LTK, seed * len(routed) + number, micro.plans)
            loss = output.loss_sum * (shares / scored)
            for name, weight in (("balance", moe.balance_weight), ("distill", moe.distill_weight)):
                auxiliary = output.auxiliary_sum(name)
                if auxiliary is not None:
                    loss = loss + auxiliary * (weight * shares / real)
            yield output, loss

    def update(self, keep: bool = True) -> float:
        """Clip and step; returns the gradient norm before clipping, not finite if the update was dropped.

        All ranks drop it if any has a gradient that is not finite: weights, moments and Adam's count stay what they
        are. keep: False drops it in any case; equal on all ranks.
        """
        if self.run.parallel.zero_stage == 0:
            norm = self._clip() if keep else math.inf
            if not math.isfinite(norm):
                self.model.zero_grad(set_to_none=True)  # torch's AdamW passes over what has no gradient
            self.deepspeed.step()
            return norm
        if not keep:
            self._spoil_gradients()
        self.deepspeed.step()
        return math.inf if self.optimizer.overflow else float(self.deepspeed.get_global_grad_norm() or 0.0)

    def _spoil_gradients(self) -> None:
        """Make DeepSpeed drop the update: the one way that its optimizers of ZeRO 1 and 2 have in common."""
        if hasattr(self.optimizer, "averaged_gradients"):
            gradients = [g for group in self.optimizer.averaged_gradients.values() for g in group or []]
        else:
            gradients = [g for group in self.optimizer.fp32_groups_gradients for g in group]
        for gradient in gradients:
            gradient.fill_(math.nan)

    def teach_routers(self, sums: StepSums) -> None:
        """Let routers learn what they do not learn by gradient, from what an update has seen."""
        device = self.groups.world.device
        for number, (layer, counts) in enumerate(zip(self.model.moe_layers, sums.counts_LN, strict=True)):
            if next(layer.router.buffers(), None) is None:
                continue  # without state there is nothing to learn; copying the counts would wait for the device
            statistic_N = torch.tensor(sums.statistics_LN[number], device=device) if sums.statistics_LN else None
            layer.router.after_update(torch.tensor(counts, dtype=torch.float32, device=device), statistic_N)

    def _clip(self) -> float:
        """Global norm and clipping for ZeRO 0, where DeepSpeed's norm is wrong under expert parallelism."""
        squares = torch.zeros((), device=self.groups.world.device)
        replicas = {True: self.groups.world.size // self.groups.expert, False: self.groups.data_size}
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        for parameter, gradient in gradients:
            expert = not getattr(parameter, "allreduce", True)
            cut = expert or getattr(parameter, "tensor_model_parallel", False)
            copies = replicas[expert] if cut else self.groups.world.size
            squares += gradient.float().square().sum() / copies
        norm = self.groups.sum_over_world(squares).sqrt()
        if self.run.optimizer.clip:
            factor = (self.run.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(factor)
        return float(norm)

    def _sums(self, outputs: list[ForwardOutput], counted: Tensor, stop: bool) -> StepSums:
        """One all-reduce and one wait for all that is logged about an update."""
        groups, zero = self.groups, torch.zeros((), device=counted.device)
        layers = [layer for output in outputs for layer in output.layers]
        agree = [layer.agree for layer in layers if layer.agree is not None]
        aux = {
            name: sum(((o.auxiliary_sum(name) or zero).detach() for o in outputs), zero)
            for name in ("balance", "distill")
        }
        head = torch.stack(
            [
                sum((o.loss_sum.detach() for o in outputs), zero),
                aux["balance"],
                aux["distill"],
                *counted,
                sum(agree, zero) / max(1, len(agree) // len(outputs)),
                torch.full((), float(stop), device=counted.device),
                sum((layer.unserved for layer in layers), zero),
            ]
        ).double()
        per_layer = len(layers) // len(outputs)
        served = [torch.stack([o.layers[i].served_N for o in outputs]).sum(0) for i in range(per_layer)]
        known = [layer.statistic_N.double() for layer in layers if layer.statistic_N is not None]
        told = [torch.stack(known[i::per_layer]).mean(0) / groups.data_size for i in range(per_layer)] if known else []
        data = groups.sum_over_data_ranks(torch.cat([head, *(row.double() for row in served), *told])).tolist()
        dropped = 0
        if self.run.moe.capacity_factor is not None and layers:
            dropped = int(groups.sum_over_world(torch.stack([layer.dropped for layer in layers]).sum()))
        experts = self.run.moe.experts
        rows = [data[start : start + experts] for start in range(len(head), len(data), experts)]
        return StepSums(
            loss=data[0],
            balance=data[1],
            distill=data[2],
            scored=int(data[3]),
            real=int(data[4]),
            agree=int(data[5]),
            dropped=dropped,
            unserved=int(data[7]),
            counts_LN=[[int(n) for n in row] for row in rows[:per_layer]],
            statistics_LN=rows[per_layer:],
            stop_requested=data[6] > 0,
        )
