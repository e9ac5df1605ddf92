"""The only room that calls ``deepspeed.initialize``: one optimizer update over the model, whatever the layout."""

from __future__ import annotations

import gc
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import deepspeed
import torch
from torch import Tensor

from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.deepspeed_config import deepspeed_config
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import DeepSpeedMpu, Groups, limit_waiting
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.training.gradients import Zero3Optimizer, adopt
from stablemoe_ds.training.optimizer import DISTILLED, fp32_parameters, make_adamw, parameter_groups, restore_fp32
from stablemoe_ds.training.routed_batch import RoutedBatch
from stablemoe_ds.training.sharded_weights import keep_fp32, shard
from stablemoe_ds.training.update_figures import UpdateFigures, update_figures


def tokens_of(routed: Sequence[RoutedBatch]) -> Tensor:
    """int64 [2]: tokens scored and real of this rank's micro-batches."""
    return torch.stack([torch.stack([r.batch.scored.sum(), r.batch.real.sum()]) for r in routed]).sum(0)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Let collections of garbage pass over all objects that exist by now.

    DeepSpeed's optimizers for ZeRO collect garbage on rank 0 a dozen times as they are built, to print the memory in
    use. Each time that would be half a second for the objects of the libraries.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
        self._norm: Tensor | float = 0.0
        config, sharded = deepspeed_config(run, plan), run.parallel.zero_stage == 3
        kept = shard(model, run, groups, config) if sharded else fp32_parameters(model)

        def optimizer(_: Any) -> torch.optim.Optimizer:
            # DeepSpeed calls this after it has cast and moved the model, before ZeRO flattens the groups.
            if not sharded:
                restore_fp32(kept)
            return make_adamw(parameter_groups(model, run.optimizer.weight_decay), run.optimizer)

        # Its optimizer for bf16 prints the memory in use, whatever is asked.
        with redirect_stdout(io.StringIO()), _only_new_garbage():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=[],
                config=config,
                mpu=DeepSpeedMpu(),
                dist_init_required=False,
            )
        adopt(self.deepspeed)
        if sharded:
            keep_fp32(self.optimizer, kept)
        kept.clear()  # DeepSpeed keeps the function above forever, and so what it refers to
        limit_waiting(groups.world.timeout)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer (ZeRO 1, 2 and 3), or torch's own (ZeRO 0)."""
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

    def accumulate(self, routed: Sequence[RoutedBatch], routes: RouteSource, seed: int) -> UpdateFigures:
        """Forward and backward of one update's micro-batches; gradients are reduced, weights not yet changed.

        routes: for batches that come without. seed: of random decisions in this update. Waits for no device.
        """
        routed = [micro.to(self.groups.world.device) for micro in routed]
        counted = tokens_of(routed)
        outputs: list[ForwardOutput] = []
        self.deepspeed.train()
        for output, loss in self.forward(self.deepspeed, routed, counted, routes, seed):
            self.deepspeed.backward(loss)
            outputs.append(output)
            if len(outputs) < len(routed):
                self.deepspeed.step()
        return update_figures(outputs, counted, self.groups)

    def forward(
        self,
        model: Callable[..., ForwardOutput],
        routed: Sequence[RoutedBatch],
        counted: Tensor,
        routes: RouteSource,
        seed: int,
    ) -> Iterator[tuple[ForwardOutput, Tensor]]:
        """Each micro-batch through ``model`` (this one, or DeepSpeed around it), and its loss to go backward from.

        counted: their :func:`tokens_of`. A loss that is not finite has gradients that are not: whatever drops an
        update for its gradients drops it for its losses, on all ranks, and the losses need not be read for that.
        """
        groups, moe = self.groups, self.run.moe
        counts_LN = self._chosen(routed, routes, seed)
        scored, real = groups.sum_over_data_ranks(counted).float().clamp_min(1).unbind()
        # DeepSpeed averages over data ranks and accumulation steps; this makes of the average a global mean.
        shares = groups.data_size * len(routed)
        for number, micro in enumerate(routed):
            self._seed_dropout(seed, number)
            output = model(micro.batch, micro.follow(routes), seed * len(routed) + number, micro.plans, counts_LN)
            loss = output.loss_sum * (shares / scored)
            for name, weight in (("balance", moe.balance_weight), ("distill", moe.distill_weight)):
                auxiliary = output.auxiliary_sum(name)
                if auxiliary is not None:
                    loss = loss + auxiliary * (weight * shares / real)
            yield output, loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def _chosen(self, routed: Sequence[RoutedBatch], routes: RouteSource, seed: int) -> Tensor | None:
        """fp32 [L, N]: tokens (times K) by MoE layer and expert of the whole update, over all ranks.

        A balance loss needs them before the first micro-batch goes backward (paper eq. 8). One micro-batch counts by
        itself, several are looked at beforehand. None where no loss needs that, or ``moe.balance_over`` saves it.
        """
        moe = self.run.moe
        balanced = moe.facts.balance_weight and moe.balance_weight and moe.balance_over == "update"
        all_known = len(routed[0].known or routes.blocks) == len(self.model.moe_layers)
        if all_known or len(routed) == 1 or not balanced:
            return None
        counts = []
        for number, micro in enumerate(routed):
            self._seed_dropout(seed, number)
            counts.append(self.model.choices(micro.batch, micro.follow(routes), seed * len(routed) + number))
        return self.groups.sum_over_data_ranks(torch.stack(counts).sum(0).float())

    def _seed_dropout(self, seed: int, number: int) -> None:
        """The same masks whenever micro-batch ``number`` of an update is run."""
        if self.run.model.dropout:
            torch.manual_seed(hash((seed, number, self.groups.data_rank)) & 0x7FFF_FFFF)

    def update(self, keep: bool = True) -> bool:
        """Clip and step; False if the update was dropped. Waits for the device, as DeepSpeed does for its decision.

        All ranks drop it if any has a gradient that is not finite: weights, moments and Adam's count stay what they
        are. keep: False drops it in any case; equal on all ranks.
        """
        if self.run.parallel.zero_stage == 0:
            self._norm = self._clip() if keep else math.inf
            kept = math.isfinite(float(self._norm))
            if not kept:
                self.model.zero_grad(set_to_none=True)  # torch's AdamW passes over what has no gradient
            self.deepspeed.step()
            return kept
        if not keep:
            self._spoil_gradients()
        self.deepspeed.step()
        dropped = bool(self.optimizer.overflow)
        self._norm = math.inf if dropped else self.deepspeed.get_global_grad_norm()
        return not dropped

    def gradient_norm(self) -> float:
        """Of the last update, before clipping; infinite if it was dropped. Waits for the device."""
        return float(self._norm)

    def _spoil_gradients(self) -> None:
        """Make DeepSpeed drop the update."""
        if isinstance(self.optimizer, Zero3Optimizer):
            self.optimizer.refused = True
            return
        if hasattr(self.optimizer, "averaged_gradients"):
            gradients = [g for group in self.optimizer.averaged_gradients.values() for g in group or []]
        else:
            gradients = [g for group in self.optimizer.fp32_groups_gradients for g in group]
        for gradient in gradients:
            gradient.fill_(math.nan)

    def teach_routers(self, figures: UpdateFigures) -> None:
        """Let routers learn what they do not learn by gradient, from what an update has seen. Waits for no device.

        Collective where a router has something to learn; the others have no state.
        """
        learning = [(i, m) for i, m in enumerate(self.model.moe_layers) if next(m.router.buffers(), None) is not None]
        if not learning:
            return
        counts_LN, statistics_LN = figures.for_routers()
        for i, layer in learning:
            layer.router.after_update(counts_LN[i], None if statistics_LN is None else statistics_LN[i])

    def _clip(self) -> Tensor:
        """Global norm and clipping for ZeRO 0, where DeepSpeed's norm is wrong under expert parallelism."""
        squares = torch.zeros((), device=self.groups.world.device)
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        for parameter, gradient in gradients:
            whole = getattr(parameter, "allreduce", True) and not getattr(parameter, "tensor_model_parallel", False)
            copies = self.groups.world.size if whole else self.groups.among_copies(parameter)[1]
            squares += gradient.float().square().sum() / copies
        norm = self.groups.sum_over_world(squares).sqrt()
        if self.run.optimizer.clip:
            factor = (self.run.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(factor)
        return norm
