"""A trained model, opened from its checkpoint to be looked at: evaluation, generation, reports."""

from __future__ import annotations

from functools import partial

from stablemoe_ds.checkpoint.attached import token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.checkpoint.restore import load_weights
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups, World
from stablemoe_ds.evaluation.resident_experts import Residency
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.source import RouteMaker, RouteSource


class TrainedModel:
    """Model and routing of a checkpoint, in this process's world. Needs nothing but the checkpoint.

    residency: which experts are in memory; None: all.
    """

    def __init__(self, checkpoint: Checkpoint, world: World, resident_experts: float = 1.0) -> None:
        """``resident_experts``: see :class:`Residency`. Raises UserError if the model has no use for it."""
        self.checkpoint = checkpoint
        self.residency = None if resident_experts == 1 else Residency(checkpoint, resident_experts, world.device)
        self.run = for_world(checkpoint.run, world.size)
        self.groups = Groups(world, self.run.parallel.tensor, self.run.parallel.expert)
        experts_of = self.residency.experts_of if self.residency else {}
        self.model = StableMoEGPT(self.run, checkpoint.vocab_size, self.groups.placement, experts_of)
        load_weights(self.model, self.groups, checkpoint)
        self.model.to(world.device).eval()
        for layer in self.model.moe_layers:
            layer.set_deepspeed_parallelism()
        if self.residency:
            self.residency.fill(self.model, self.routes)

    @property
    def routes(self) -> RouteSource:
        """Routes by ids: the frozen ones in stage 2, what a switch would freeze now in stage 1.

        The learned routers of a dense model, and of a run whose routing is never fixed: there they are the model, but
        for layers that follow a table from the first update.
        """
        stage, table, maker = self.checkpoint.progress.stage, self.checkpoint.table(), self._maker
        return maker.frozen(table) if stage == 1 and maker.can_freeze else maker.restored(stage, table)

    @property
    def learned(self) -> RouteSource:
        """Routes as in stage 1: routers decide wherever a layer has learned to."""
        return self._maker.restored(1, self.checkpoint.table())

    @property
    def trained_with(self) -> RouteSource:
        """Routes as in the update before the checkpoint."""
        return self.learned if self.checkpoint.progress.stage == 1 else self.routes

    @property
    def _maker(self) -> RouteMaker:
        device, tokenizer = self.groups.world.device, self.checkpoint.tokenizer
        counts = partial(token_counts_of, self.checkpoint)  # read where a table is made of them
        return RouteMaker(self.run, self.model.distilled_routers, counts, tokenizer, device)


def for_world(run: RunConfig, world_size: int) -> RunConfig:
    """The run laid out for looking: as trained if the processes allow it, else one process's worth of parallelism.

    Sequences stay whole: without a backward pass one rank has room for them, and prompts have any length.
    """
    parallel = run.parallel.model_copy(
        update={"compile": False, "sequence": 1}  # a look is over before compiling has paid
    )
    if world_size % parallel.tensor or world_size % parallel.expert:
        parallel = parallel.model_copy(update={"tensor": 1, "expert": 1})
    sequences = run.schedule.tokens_per_step // run.data.sequence_length
    micro = min(parallel.micro_batch or sequences, 8)
    data_ranks = world_size // parallel.tensor
    schedule = run.schedule.model_copy(update={"tokens_per_step": micro * data_ranks * run.data.sequence_length})
    parallel = parallel.model_copy(update={"micro_batch": micro})
    return run.model_copy(update={"parallel": parallel, "schedule": schedule})
