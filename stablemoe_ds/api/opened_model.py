"""A trained model, opened for logits, generation and routes."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablemoe_ds.checkpoint.attached import open_tokenizer
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import start_world, stop_world
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.tables.table import RoutingTable

Text = str | Sequence[int] | Tensor
"""A text, its ids, or a batch of ids, int64 [B, S]."""


def open_model(path: str | Path, tokenizer: str | Path | None = None, *, resident_experts: float = 1.0) -> OpenedModel:
    """Open the newest model of a run directory, or the one of a checkpoint in it. Several models can be open at once.

    tokenizer: for a checkpoint that does not contain one.
    resident_experts: fraction of each MoE layer's experts to keep in memory; the others are fetched from the checkpoint
    when their tokens come. Needs routes that follow from token ids.
    Raises UserError if there is no checkpoint, if it is damaged, or if its routes are learned and experts are to be
    fetched.
    """
    checkpoint = Checkpoint.open(path)
    atexit.register(stop_world)  # without it gloo now and then aborts the interpreter
    world = start_world(checkpoint.run.parallel.timeout_minutes)
    return OpenedModel(TrainedModel(checkpoint, world, resident_experts), tokenizer)


class OpenedModel:
    """A trained model with its routing and its tokenizer, as returned by :func:`open_model`.

    Methods take a text or its ids. In stage 1, experts are chosen by the distilled router, which the switch would
    freeze; with ``learned=True`` by the learned router, as in training.
    """

    def __init__(self, trained: TrainedModel, tokenizer_file: str | Path | None = None) -> None:
        self.trained, self._tokenizer_file = trained, tokenizer_file

    @property
    def run(self) -> RunConfig:
        """The configuration of the training run."""
        return self.trained.checkpoint.run

    @property
    def table(self) -> RoutingTable | None:
        """The routing table that the model follows; None if it follows none."""
        return self._fixed.table

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids (``encode``) and back (``decode``). Raises UserError if it is not found."""
        return open_tokenizer(self.trained.checkpoint, self._tokenizer_file)

    @cached_property
    def _fixed(self) -> RouteSource:
        return self.trained.routes

    def logits(self, text: Text, learned: bool = False) -> Tensor:
        """fp32 [B, S, V]: logits of the next id after each id of a text, or of B rows of ids of equal length."""
        ids_BS = self._ids(text)
        routes = self.trained.learned if learned else self._fixed
        with inference(self.trained.model):
            return self.trained.model.logits(ids_BS, routes(ids_BS))

    def routes(self, text: Text, learned: bool = False) -> Tensor:
        """int64 [L, B, S, K]: the experts that serve each id, by MoE layer.

        Raises UserError for a model without experts.
        """
        ids_BS = self._ids(text)
        if not self.trained.model.moe_layers:
            raise UserError(f"checkpoint {self.trained.checkpoint.path} is a dense model: it has no routes")
        known = (self.trained.learned if learned else self._fixed)(ids_BS)
        if len(known) < len(self.trained.model.moe_layers):
            real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
            with inference(self.trained.model):
                done = self.trained.model(Batch(ids_BS, ids_BS, real_BS, real_BS), known).layers
            known = {layer.block: layer.expert_TK for layer in done}
        batch, length = ids_BS.shape
        return torch.stack([e_TK.view(length, batch, -1).transpose(0, 1) for e_TK in known.values()])

    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Continue each prompt and return the new text; a single prompt counts as a list of one.

        options: ``temperature`` (0: the likeliest id each time), ``top_p``, ``seed``, ``use_cache``.
        Raises UserError for a prompt or an option that cannot be used.
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenizer.encode(prompt) or [self.tokenizer.eos_id] for prompt in given]
        options = {"eos_id": self.tokenizer.eos_id, "max_new_tokens": max_new_tokens, **options}
        new = generate(self.trained.model, ids, self._fixed, **options)
        # A model may have more ids than its tokenizer; those spell nothing.
        return [self.tokenizer.decode([i for i in part if i < self.tokenizer.vocab_size]) for part in new]

    def _ids(self, text: Text) -> Tensor:
        """int64 [B, S] on the model's device. Raises UserError for ids that the model does not have."""
        given = self.tokenizer.encode(text) or [self.tokenizer.eos_id] if isinstance(text, str) else text
        ids = torch.as_tensor(given, device=self.trained.groups.world.device)
        ids_BS = ids[None] if ids.dim() == 1 else ids
        vocab, room = self.trained.model.vocab_size, self.run.data.sequence_length
        if ids_BS.dim() != 2 or ids_BS.is_floating_point() or not 1 <= ids_BS.shape[1] <= room:
            raise UserError(
                f"ids: got {ids.dtype} of shape {list(ids.shape)}: expected whole numbers [S] or [B, S], with S from 1 "
                f"to {room} (data.sequence_length)"
            )
        if ids_BS.min() < 0 or ids_BS.max() >= vocab:
            raise UserError(f"ids: got {int(ids_BS.min())} to {int(ids_BS.max())}: expected 0 to {vocab - 1}")
        return ids_BS.long()
