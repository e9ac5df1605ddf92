"""An MoE layer for any torch model: batch first, made from a few keywords, on one process or on several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from stablemoe_ds.config.messages import error_messages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.distributed.placement import ALONE
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import build_moe_layer
from stablemoe_ds.model.initialize import start_value
from stablemoe_ds.model.layout import pieces
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass
from stablemoe_ds.routing.fixed import freeze, freeze_balanced
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.tables.table import RoutingTable

UNKNOWN = -1
"""Expert of an id before a table is given."""


@dataclass(frozen=True)
class MoEReport:
    """What a layer did in one call.

    loss: fp32 scalar to add to the model's own loss: each auxiliary loss times its weight, a mean over the real tokens
    of all processes. It carries gradient; 0 in evaluation and once routing is fixed.
    losses: the auxiliary losses by name ("balance", "distill"), without weights and gradient.
    expert_BSK: int64 [B, S, K], the experts of each token; -1 where there is none.
    served_N: int64 [N], this process's tokens by expert. dropped: int64 scalar, choices dropped by capacity.
    agreement: fp32 scalar, share of real tokens whose expert would stay the same after a freeze; None if unknown.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    expert_BSK: Tensor  # noqa: N815
    served_N: Tensor  # noqa: N815
    dropped: Tensor
    agreement: Tensor | None
    statistic_N: Tensor | None = None  # noqa: N815


class MoELayer(nn.Module):
    """Routed experts on the residual stream: x + sum_k gate_k * expert_k(x) (StableMoE, Dai et al. 2022, eq. 7).

    The residual connection and the experts' norms are part of the layer. Initially every expert adds nothing.
    Under expert parallelism this process and its ``state_dict`` hold ``experts / expert_parallel`` of the experts.
    Routers compute in fp32, even if the model is cast to another dtype.
    """

    table_VK: Tensor  # noqa: N815

    def __init__(
        self,
        hidden_size: int,
        *,
        ffn_hidden_size: int,
        vocab_size: int | None = None,
        activation: str = "swiglu",
        norm: str = "rmsnorm",
        bias: bool = False,
        groups: Groups | None = None,
        seed: int | None = None,
        **moe: Any,
    ) -> None:
        """``moe``: settings of the section ``moe`` (docs/configuration.md), such as ``experts=8, top_k=2``,
        ``router="switch"`` or ``capacity_factor=1.25``.

        ffn_hidden_size: inner width of an expert. vocab_size: number of token ids, for a router that uses them.
        activation, norm, bias: of an expert, as in the section ``model``. groups: of :func:`join_processes`; None: this
        process alone. seed: determines the initial values, the same under every layout; None: drawn by torch.
        Raises UserError, with one line for each invalid setting.
        """
        super().__init__()
        model = {"activation": activation, "norm": norm, "bias": bias}
        run = _run(hidden_size, ffn_hidden_size, model, moe, _agreed(seed, groups))
        needs_ids = run.moe.facts.distilled or run.moe.facts.fixed
        if needs_ids and vocab_size is None:
            raise UserError(
                f"router '{run.moe.router}' needs token ids, but vocab_size is missing: give the number of ids, or a "
                "router that sees hidden states only, such as stablemoe_stage1, switch or topk"
            )
        ranks = 1 if groups is None else groups.expert
        if run.moe.experts % ranks:
            raise UserError(f"experts: got {run.moe.experts}: expected a multiple of expert_parallel, which is {ranks}")
        self.run, self.groups, self.vocab_size, self.frozen = run, groups, vocab_size, False
        self.layer = build_moe_layer(run, vocab_size or 1, ALONE if groups is None else groups.placement, 1, 0)
        self.layer.set_deepspeed_parallelism()
        with torch.no_grad():
            for piece in pieces(self, 1):
                piece.select(piece.parameter).copy_(start_value(piece.name, piece.shape, run))
        if needs_ids:
            table_VK = torch.full((vocab_size or 1, run.moe.top_k), UNKNOWN, dtype=torch.int32)
            self.register_buffer("table_VK", table_VK)
            self.register_load_state_dict_post_hook(lambda layer, _: layer._notice_table())

    def forward(
        self, hidden_BSD: Tensor, ids_BS: Tensor | None = None, real_BS: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, MoEReport]:
        """hidden [B, S, D] -> the stream [B, S, D] after the experts, and a report.

        ids_BS: int64 [B, S], token ids, for a router that uses them. real_BS: bool [B, S], False at padding, which
        passes unchanged; None: all are real. seed: decides which tokens are dropped beyond ``capacity_factor``; use a
        different one in every training step, the same on all processes.
        Collective under expert parallelism. Raises UserError if ids or a table are needed and missing.
        """
        ids_BS = self._ids(hidden_BSD, ids_BS)
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if real_BS is None else real_BS
        tokens = TokenView(ids_BS, real_BS.transpose(0, 1).flatten())
        known = {1: self.table_VK[ids_BS.transpose(0, 1).flatten()].long()} if self.frozen else {}
        hidden_SBD, done = self.layer(hidden_BSD.transpose(0, 1), RoutingPass(tokens, known, seed))
        return hidden_SBD.transpose(0, 1), self._report(done, real_BS)

    def freeze(self, token_counts: NDArray[np.int64] | None = None) -> RoutingTable:
        """Fix the routing to what the distilled router has learned (stage 2), and return it as a table.

        token_counts: int64 [V], how often each id occurs; for ``router="stablemoe_balanced"``.
        Raises UserError for a router that learns no table.
        """
        distilled, moe = self.layer.router.distilled, self.run.moe
        if distilled is None or not distilled.is_table:
            raise UserError(
                f"router '{moe.router}' with distilled kind '{moe.distilled.kind}' learns no table to freeze; nearest "
                "that works: router stablemoe with distilled kind word"
            )
        if moe.facts.needs_counts:
            if token_counts is None:
                raise UserError(f"router '{moe.router}' balances its table: give token_counts, the uses of each id")
            routing = freeze_balanced([distilled], (1,), token_counts, moe.table_load)
            self.follow(routing.table)
            return routing.table
        table = freeze([distilled], moe.top_k, (1,)).table
        assert table is not None  # the router is one
        self.follow(table)
        return table

    def follow(self, table: RoutingTable, layer: int = 0) -> None:
        """Route each token id by ``table`` from now on; ``layer``: which of the table's layers, counted from 0.

        Raises UserError if the table is for another number of experts, choices or ids, if it splits ids, or if this
        router sees no ids.
        """
        wanted = (self.run.moe.experts, self.run.moe.top_k, self.vocab_size)
        found = (table.experts, table.top_k, table.vocab_size)
        for name, has, needs in zip(("experts", "top_k", "vocab_size"), found, wanted, strict=True):
            if has != needs:
                raise UserError(f"the routing table has {name} {has}, this layer {needs}: expected the same")
        if "table_VK" not in self._buffers:
            raise UserError(f"router '{self.run.moe.router}' follows no table; nearest that works: router='hash'")
        if table.split is not None:
            raise UserError(
                f"the routing table splits {len(table.split.ids_J)} ids by the id before them, which this layer does "
                "not look at: expected a table without split ids"
            )
        if not 0 <= layer < len(table.blocks):
            raise UserError(f"layer: got {layer}: expected 0 to {len(table.blocks) - 1}, as the table has")
        self.table_VK.copy_(torch.tensor(table.expert_LVK[layer]))
        self._notice_table()

    def after_update(self, *reports: MoEReport) -> None:
        """Update what is not learned by gradient; call it once per update with the ``reports`` of its calls.

        ``router="topk"`` needs it for its bias, ``"expert_choice"`` for its thresholds; others do nothing. Collective.
        """
        counts_N = self._over_ranks(torch.stack([report.served_N for report in reports]).sum(0).float())
        seen = [report.statistic_N for report in reports if report.statistic_N is not None]
        ranks = 1 if self.groups is None else self.groups.data_size
        mean_N = self._over_ranks(torch.stack(seen).mean(0)) / ranks if seen else None
        self.layer.router.after_update(counts_N, mean_N)

    def _ids(self, hidden_BSD: Tensor, ids_BS: Tensor | None) -> Tensor:
        name = self.run.moe.router
        if self.run.moe.facts.fixed and not self.frozen:
            raise UserError(f"router '{name}' follows a table from the first call: give it one with follow(table)")
        if "table_VK" not in self._buffers:
            return hidden_BSD.new_zeros(hidden_BSD.shape[:2], dtype=torch.int64)
        if ids_BS is None:
            raise UserError(f"router '{name}' needs token ids: call the layer with hidden states and their ids")
        return ids_BS

    def _report(self, done: LayerReport, real_BS: Tensor) -> MoEReport:
        moe, (batch, length) = self.run.moe, real_BS.shape
        loss = torch.zeros((), device=real_BS.device)
        losses: dict[str, Tensor] = {}
        if done.loss_sums:
            ranks = 1 if self.groups is None else self.groups.data_size
            tokens = self._over_ranks(real_BS.sum().float()).clamp_min(1)
            for name, weight in (("balance", moe.balance_weight), ("distill", moe.distill_weight)):
                if name in done.loss_sums:
                    # The mean over processes, which their gradients are brought to, is the mean over all tokens.
                    mean = done.loss_sums[name] * (ranks / tokens)
                    loss, losses[name] = loss + weight * mean, mean.detach()
        expert_BSK = done.expert_TK.view(length, batch, -1).transpose(0, 1)
        agreement = None if done.agree is None else done.agree.float() / real_BS.sum().clamp_min(1)
        return MoEReport(loss, losses, expert_BSK, done.served_N, done.dropped, agreement, done.statistic_N)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return tensor if self.groups is None else self.groups.sum_over_data_ranks(tensor)

    def _notice_table(self) -> None:
        """Look once, not in every call, whether a table is there; then nothing moves the distilled router any more."""
        self.frozen = bool((self.table_VK != UNKNOWN).all())
        if self.layer.router.distilled is not None:
            self.layer.router.distilled.requires_grad_(not self.frozen)


def _agreed(seed: int | None, groups: Groups | None) -> int:
    """The seed that was given, or the first process's draw, so that all processes start from the same layer."""
    if seed is not None:
        return seed
    drawn = torch.randint(2**31, ())
    if groups is None:
        return int(drawn)
    here = drawn.to(groups.world.device)
    return int(groups.sum_over_world(here if groups.world.is_main else torch.zeros_like(here)))


def _run(hidden_size: int, ffn_hidden_size: int, model: dict[str, Any], moe: dict[str, Any], seed: int) -> RunConfig:
    """The settings as the rest of the package takes them: a run, of which only the layer is ever built."""
    backbone = {"layers": 1, "hidden_size": hidden_size, "heads": 1, "ffn_hidden_size": ffn_hidden_size, **model}
    tree = {
        "seed": seed,
        "model": backbone,
        # Raw, as published: the embedding is not ours, and a layer saved without its settings must stay as it is.
        "moe": {"layers": [1], "router_input": "raw", **moe},
        "optimizer": {"lr": 1.0},
        "schedule": {"steps": 1, "tokens_per_step": 1},
    }
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(error_messages(error, lambda _: "MoELayer")) from error
    refused = None
    if not run.moe.facts.routed:
        refused = f"moe.router: got '{run.moe.router}', which has no experts; nearest that works: stablemoe"
    elif run.moe.facts.table_from == "file":
        refused = "moe.router: got 'table'; nearest that works: router='hash', and follow(RoutingTable.read(file))"
    elif run.moe.distilled.kind == "transformer":
        refused = "moe.distilled.kind: got 'transformer', which only a whole run trains; nearest that works: word"
    elif run.moe.table is not None:
        refused = f"moe.table: got '{run.moe.table}'; nearest that works: follow(RoutingTable.read(file))"
    elif run.moe.start_table is not None:
        refused = "moe.start_table: only a whole run has the embedding that routers start from; leave it out"
    elif run.moe.layers != [1]:
        refused = f"moe.layers: got {run.moe.layers}, but this is one layer: leave it out"
    if refused:
        raise UserError(f"MoELayer: {refused}")
    return run
