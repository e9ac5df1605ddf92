"""A trained model, opened from its checkpoint to be looked at: evaluation, generation, reports."""

from __future__ import annotations

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.checkpoint.restore import load_weights
from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.data.run_data import RunData
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import Groups, World
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting, TableRouting


class TrainedModel:
    """Model, tokenizer and routing of a checkpoint, in this process's world."""

    def __init__(self, checkpoint: Checkpoint, world: World, tokenizer: Tokenizer | None = None) -> None:
        """``tokenizer``: instead of the one the run names. Raises UserError if it is not the one trained with."""
        self.checkpoint = checkpoint
        self.run = for_world(checkpoint.run, world.size)
        self.tokenizer = tokenizer or open_tokenizer(checkpoint)
        check_tokenizer(checkpoint, self.tokenizer)
        self.groups = Groups(world, self.run.parallel.tensor, self.run.parallel.expert)
        self.model = StableMoEGPT(self.run, checkpoint.vocab_size, self.groups.placement)
        load_weights(self.model, self.groups, checkpoint)
        self.model.to(world.device).eval()
        for layer in self.model.moe_layers:
            layer.set_deepspeed_parallelism()
        self.data = RunData(self.run, batch_plan(self.run, world.size), self.groups, self.tokenizer)

    @property
    def routing(self) -> FixedRouting | None:
        """Routes by ids: the frozen table in stage 2, what a switch would freeze now in stage 1.

        None for a dense model, and for routers that are never frozen: there the learned routers are the model.
        """
        table = self.checkpoint.table()
        if table is not None:
            return TableRouting(table, self.groups.world.device)
        if not two_stages(self.run):
            return None
        counts = None
        if self.run.moe.router == "stablemoe_balanced":
            counts = token_counts(self.run.data.train, self.tokenizer, self.checkpoint.vocab_size)
        return self.model.frozen_routing(counts, self.checkpoint.tokenizer)


def for_world(run: RunConfig, world_size: int) -> RunConfig:
    """The run laid out for looking: as trained if the processes allow it, else one process's worth of parallelism."""
    parallel = run.parallel.model_copy(update={"compile": False})  # a look is over before compiling has paid
    if world_size % parallel.tensor or world_size % parallel.expert:
        parallel = parallel.model_copy(update={"tensor": 1, "expert": 1})
    sequences = run.schedule.tokens_per_step // run.data.sequence_length
    micro = min(parallel.micro_batch or sequences, 8)
    data_ranks = world_size // parallel.tensor
    schedule = run.schedule.model_copy(update={"tokens_per_step": micro * data_ranks * run.data.sequence_length})
    parallel = parallel.model_copy(update={"micro_batch": micro})
    return run.model_copy(update={"parallel": parallel, "schedule": schedule})


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer the run names. Raises UserError if it names none."""
    if not checkpoint.run.data.tokenizer:
        raise UserError(f"the run of checkpoint {checkpoint.path} names no tokenizer: text cannot be read or written")
    return Tokenizer(checkpoint.run.data.tokenizer)


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> None:
    """Raise UserError unless the checkpoint was trained with this tokenizer."""
    found = tokenizer.fingerprint if tokenizer else ""
    if checkpoint.tokenizer != found:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {checkpoint.tokenizer[:12] or 'none'}, but "
            f"{tokenizer.path if tokenizer else 'the run'} is {found[:12] or 'none'}: name the one it was trained with"
        )
