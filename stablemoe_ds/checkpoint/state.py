"""What a checkpoint is taken from and brought back into."""

from __future__ import annotations

from typing import Any, Protocol

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.gpt import StableMoEGPT


class TrainingState(Protocol):
    """A model in training; ``training.engine.Engine`` is one.

    deepspeed: the engine of DeepSpeed that holds the optimizer's state. optimizer: DeepSpeed's, or torch's at ZeRO 0.
    """

    run: RunConfig
    model: StableMoEGPT
    groups: Groups
    deepspeed: Any

    @property
    def optimizer(self) -> Any: ...
