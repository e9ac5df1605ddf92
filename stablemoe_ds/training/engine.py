"""The only room that calls ``deepspeed.initialize``: one optimizer update over the model, whatever the layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from stablemoe_ds.config.batch import BatchPlan
from stablemoe_ds.config.deepspeed import deepspeed_config
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.moe.plan import RoutedBatch
from stablemoe_ds.routing.fixed import FixedRouting
from stablemoe_ds.training.groups import DeepSpeedMpu, Groups
from stablemoe_ds.training.optimizer import DISTILLED, fp32_parameters, make_adamw, parameter_groups, restore_fp32


@dataclass(frozen=True)
class StepSums:
    """What one update saw, summed over all ranks and accumulation steps; host numbers.

    loss, balance, distill: sums over tokens. scored, real: tokens counted by them. agree: tokens for which the
    distilled router named the learned expert. dropped, assigned: (token, choice) pairs. counts_LN: by MoE layer.
    """

    loss: float
    balance: float
    distill: float
    scored: int
    real: int
    agree: int
    dropped: int
    counts_LN: list[list[int]]  # noqa: N815
    stop_requested: bool

    @property
    def loads(self) -> list[float]:
        """max/mean load of each MoE layer in this update."""
        return [max(row) * len(row) / max(1, sum(row)) for row in self.counts_LN]


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

        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[],
            config=deepspeed_config(run, plan),
            mpu=DeepSpeedMpu(),
            dist_init_required=False,
        )

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer (ZeRO 1 and 2), or torch's own (ZeRO 0)."""
        return self.deepspeed.optimizer

    def freeze_distilled(self) -> None:
        """Stop the distilled routers for good: no gradient, no momentum, no decay."""
        self._frozen = True
        for router in self.model.distilled_routers:
            router.requires_grad_(False)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            # Under ZeRO requires_grad alone does not freeze: momentum goes on moving the flat partition.
            scale = 1.0
            if group["name"] == DISTILLED:
                scale = 0.0 if self._frozen else self.run.moe.distilled.lr_scale
            group["lr"] = lr * scale

    def accumulate(
        self, routed: Sequence[RoutedBatch], routing: FixedRouting | None, draw: int, stop: bool
    ) -> StepSums:
        """Forward and backward of one update's micro-batches; gradients are reduced, weights not yet changed.

        routing: fixed routes for batches that come without; None in stage 1.
        draw: seed of random decisions in this update.
        stop: this process was asked to stop; every rank learns whether any was.
        """
        groups, moe = self.groups, self.run.moe
        routed = [micro.to(groups.world.device) for micro in routed]
        counted = torch.stack([torch.stack([r.batch.scored.sum(), r.batch.real.sum()]) for r in routed]).sum(0)
        scored, real = groups.sum_over_data_ranks(counted).float().clamp_min(1).unbind()
        # DeepSpeed averages over data ranks and accumulation steps; this makes of the average a global mean.
        shares = groups.data_size * len(routed)
        outputs: list[ForwardOutput] = []
        self.deepspeed.train()
        for number, micro in enumerate(routed):
            if self.run.model.dropout:
                torch.manual_seed(hash((draw, number, groups.data_rank)) & 0x7FFF_FFFF)
            fixed_LTK = micro.fixed_LTK
            if fixed_LTK is None and routing is not None:
                fixed_LTK = routing(micro.batch.ids)
            output = self.deepspeed(micro.batch, fixed_LTK, draw * len(routed) + number, micro.plans)
            loss = output.loss_sum * (shares / scored)
            for name, weight in (("balance", moe.balance_weight), ("distill", moe.distill_weight)):
                auxiliary = output.auxiliary_sum(name)
                if auxiliary is not None:
                    loss = loss + auxiliary * (weight * shares / real)
            self.deepspeed.backward(loss)
            if number < len(routed) - 1:
                self.deepspeed.step()
            outputs.append(output)
        return self._sums(outputs, counted, stop)

    def update(self) -> float:
        """Clip and step; returns the gradient norm before clipping."""
        norm = None
        if self.run.parallel.zero_stage == 0:
            norm = self._clip()
        self.deepspeed.step()
        return float(norm if norm is not None else self.deepspeed.get_global_grad_norm() or 0.0)

    def _clip(self) -> Tensor:
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
        return norm

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
                torch.tensor(float(stop), device=counted.device),
            ]
        ).double()
        per_layer = len(layers) // len(outputs)
        served = [torch.stack([o.layers[i].served_N for o in outputs]).sum(0) for i in range(per_layer)]
        data = groups.sum_over_data_ranks(torch.cat([head, *(row.double() for row in served)])).tolist()
        dropped = 0
        if self.run.moe.capacity_factor is not None and layers:
            dropped = int(groups.sum_over_world(torch.stack([layer.dropped for layer in layers]).sum()))
        rows, experts = data[len(head) :], self.run.moe.experts
        return StepSums(
            loss=data[0],
            balance=data[1],
            distill=data[2],
            scored=int(data[3]),
            real=int(data[4]),
            agree=int(data[5]),
            dropped=dropped,
            counts_LN=[[int(n) for n in rows[i * experts : (i + 1) * experts]] for i in range(per_layer)],
            stop_requested=data[6] > 0,
        )
