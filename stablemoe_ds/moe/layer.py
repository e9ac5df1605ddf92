"""The MoE layer: route, send, serve, return, add up. Its residual connection is part of it (paper eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from stablemoe_ds.distributed.placement import REPLICATED, LayerPlacement
from stablemoe_ds.moe.capacity import capacity_of, kept_rows
from stablemoe_ds.moe.dispatch import combine, return_tokens, send_tokens
from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.experts import Experts, ExpertShape, MakeExperts
from stablemoe_ds.moe.plan import DispatchPlan, LayerPlan, at_places, cut, plan_dispatch
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass
from stablemoe_ds.moe.tensor_split import join_tokens, split_tokens
from stablemoe_ds.ops.compiler import compile_once
from stablemoe_ds.routing.router import Router
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView


class MoELayer(AutoEPMoELayer):
    """Routed experts on the residual stream: h + sum_k gate_k * (stack_k(h) - h) [+ shared experts].

    It subclasses DeepSpeed's ``AutoEPMoELayer`` so that the engine finds it, makes the expert groups known to ZeRO and
    reduces expert gradients among the copies of an expert only; router, dispatch and experts are its own. DeepSpeed's
    ``MoE`` would do for ZeRO 0, 1 and 2, but is refused under ZeRO 3.

    held_experts: global ids of this rank's experts, in the order of their places; the last of them, those in
    ``replicated``, are on every rank. place_N: int64 [N], the place of each expert for the tokens of this rank
    (:func:`at_places`); None: its number.
    """

    place_N: Tensor | None  # noqa: N815

    def __init__(
        self,
        router: Router,
        shape: ExpertShape,
        placement: LayerPlacement,
        *,
        block: int,
        index: int,
        follows: bool = False,
        shared: ExpertShape | None = None,
        capacity_factor: float | None = None,
        parts: int = 1,
        compiled: bool = False,
        make_experts: MakeExperts = Experts,
    ) -> None:
        """``block``: number of the block it belongs to, from 1. ``index``: which MoE layer it is, from 0.

        follows: its experts are chosen beforehand in every call, by a table. parts: into how many parts tokens are cut,
        so that one travels while experts serve another. compiled: the experts, as in :class:`Experts`, or the whole
        layer in training where it is one graph.
        make_experts: makes those that this rank holds.
        """
        nn.Module.__init__(self)  # not the base's, which takes over the weights of a layer from transformers
        ranks = placement.expert_parallel
        if router.experts % ranks:
            raise ValueError(f"{router.experts} experts cannot be divided over {ranks} expert-parallel ranks")
        self.held_experts = placement.held_experts(index, router.experts)
        self.num_experts, self.ep_size, self.num_local_experts = router.experts, ranks, len(self.held_experts)
        self.expert_group_name = self.ep_group_name = f"ep_size_{ranks}"
        self.ep_rank = placement.expert_rank
        self.enable_expert_tensor_parallelism = False
        self.block, self.index, self.follows = block, index, follows
        self.capacity_factor, self.parts = capacity_factor, parts
        self.placement = placement
        places, place_N, copied = placement.places, None, 0
        if places is not None:
            place_N, copied = torch.from_numpy(places.places_for(placement.expert_rank)[index]), places.replicated
        self.register_buffer("place_N", place_N, persistent=False)
        self.router = router
        self.spread = len(self.held_experts) - copied
        self.experts = make_experts(shape, self.spread, compiled)
        self.replicated = Experts(shape, copied, compiled) if copied else None
        self.shared = Experts(shared, 1, compiled) if shared else None
        self.expert_group: dist.ProcessGroup | None = None
        self._mark(self.experts, self.expert_group_name)
        if self.replicated is not None:
            self._mark(self.replicated, REPLICATED)

    def _mark(self, experts: nn.Module, group_name: str) -> None:
        """Let DeepSpeed know which ranks hold copies of these experts: those of the group with this name."""
        for parameter in experts.parameters():
            marks = {
                "allreduce": False,  # DeepSpeed's mark of an expert parameter
                "group_name": group_name,
                # ZeRO 3 cuts such a parameter over the ranks that hold a copy of it, not over all data ranks.
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": group_name,
                # Each tensor-parallel rank holds different experts or different tokens: count it in the norm.
                "model_parallel": self.placement.tensor_group is not None,
            }
            vars(parameter).update(marks)

    @property
    def stacks(self) -> dict[str, Sequence[int]]:
        """The modules that hold this rank's experts, by name, and the global ids of the experts in each."""
        return {"experts": self.held_experts[: self.spread], "replicated": self.held_experts[self.spread :]}

    def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
        """Take the expert-parallel group from DeepSpeed; called by ``deepspeed.initialize``."""
        if self.ep_size > 1:
            self.expert_group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, hidden_SBD: Tensor, routing: RoutingPass) -> tuple[Tensor, LayerReport]:
        """hidden [S, B, D], residual stream -> the stream with what the experts add, and what was done.

        Raises ValueError if the layer follows a table, and its routes are not known.
        """
        hidden_TD, tokens = hidden_SBD.flatten(0, 1), routing.tokens
        fixed_TK, plan, counted = routing.known.get(self.block), routing.plans.get(self.block), self._counted(routing)
        if fixed_TK is None and self.follows:
            raise ValueError(f"the MoE layer at block {self.block} follows a table: pass the routes of its table")
        if routing.at_last_choice:
            routes = self.router(hidden_TD, tokens, fixed_TK, counted)
            stream_TD, dropped = hidden_TD, torch.zeros_like(routes.counts_N[0])
        else:
            one_graph = self._fits_one_graph(hidden_TD, plan)  # of all layers of this shape, whatever their routes are
            serve = compile_once(MoELayer._route_and_serve) if one_graph else MoELayer._route_and_serve
            stream_TD, routes, dropped = serve(self, hidden_TD, tokens, fixed_TK, plan, counted, routing.seed)
        report = LayerReport(
            self.block,
            routes.expert_TK,
            routes.counts_N,
            dropped,
            (tokens.real_T & (routes.expert_TK < 0).all(1)).sum(),
            routes.loss_sums,
            routes.agree,
            routes.statistic_N,
            routes.gate_TK.detach(),
        )
        return stream_TD.view_as(hidden_SBD), report

    def _fits_one_graph(self, hidden_TD: Tensor, plan: LayerPlan | None) -> bool:
        """Whether the layer can be compiled whole: the host decides nothing, and no other rank is asked.

        With a plan routes and sizes are known, and experts that are served at once look for them on the device.
        """
        experts, alone = self.experts, self.expert_group is None and self.placement.tensor_group is None
        whole = plan is not None and alone and self.capacity_factor is None
        return whole and self.training and isinstance(experts, Experts) and experts.are_one_graph(hidden_TD)

    def _route_and_serve(
        self,
        hidden_TD: Tensor,
        tokens: TokenView,
        fixed_TK: Tensor | None,
        plan: LayerPlan | None,
        counted: SumOverRanks,
        seed: int,
    ) -> tuple[Tensor, Routes, Tensor]:
        """The stream with what the experts add, [T, D]; the routes; and how many rows capacity cut here."""
        routes = self.router(hidden_TD, tokens, fixed_TK, counted)
        added_TD, dropped = self._serve(hidden_TD, routes.expert_TK, routes.gate_TK, plan, seed)
        return hidden_TD + added_TD, routes, dropped

    def _counted(self, routing: RoutingPass) -> SumOverRanks:
        """From this call's tokens by expert to those that a balance loss goes by."""
        if routing.counts_LN is None:
            return self.placement.sum_over_data_ranks
        counts_N = routing.counts_LN[self.index]
        return lambda _: counts_N

    def _serve(
        self, hidden_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, plan: LayerPlan | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        """What routed and shared experts add, [T, D]; and how many rows capacity cut here.

        While the tokens of one part travel, the shared experts work, then the routed experts on the part before.
        """
        tensor_group, group, parts = self.placement.tensor_group, self.expert_group, self.parts
        share_TD = split_tokens(hidden_TD, tensor_group)
        share_gate_TK = split_tokens(gate_TK, tensor_group)
        if plan is None:
            place_TK = at_places(split_tokens(expert_TK, tensor_group), self.place_N)
            plan = plan_dispatch(place_TK, self.num_local_experts * self.ep_size, group, parts)
        sent = [send_tokens(x_TD, part, group) for x_TD, part in zip(cut(share_TD, parts), plan, strict=True)]
        shared_TD = None
        if self.shared is not None:
            shared_TD = self.shared(hidden_TD, ExpertOffsets.whole(hidden_TD.shape[0], hidden_TD.device))
        returned, dropped = [], hidden_TD.new_zeros((), dtype=torch.int64)
        for arriving, part in zip(sent, plan, strict=True):
            added_RD, cut_off = self._ask_experts(arriving.wait(), part, seed)
            returned.append(return_tokens(added_RD, part, group))
            dropped = dropped + cut_off
        gates = cut(share_gate_TK, parts)
        added = [combine(back.wait(), gate, part) for back, gate, part in zip(returned, gates, plan, strict=True)]
        added_TD = join_tokens(added[0] if parts == 1 else torch.cat(added), hidden_TD.shape[0], tensor_group)
        return added_TD if shared_TD is None else added_TD + shared_TD, dropped

    def _ask_experts(self, rows_RD: Tensor, plan: DispatchPlan, seed: int) -> tuple[Tensor, int]:
        """What this rank's experts add to the rows that came, [R, D]; and how many rows exceeded capacity."""
        if self.capacity_factor is None or not self.training:
            return self._added_to(rows_RD, plan.offsets), 0
        capacity = capacity_of(self.capacity_factor, plan.group_total, self.num_experts)
        kept, sizes = kept_rows(plan.offsets.sizes, capacity, self.held_experts, seed * 1009 + self.index)
        kept = kept.to(rows_RD.device)
        served = self._added_to(rows_RD.index_select(0, kept), ExpertOffsets.of(sizes, rows_RD.device))
        return torch.zeros_like(rows_RD).index_copy(0, kept, served), rows_RD.shape[0] - sum(sizes)

    def _added_to(self, rows_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """What spread and replicated experts add to their rows, [R, D]."""
        if self.replicated is None:
            return self.experts(rows_RD, offsets)
        rows, own, copied = offsets.divided(self.spread)
        return torch.cat([self.experts(rows_RD[:rows], own), self.replicated(rows_RD[rows:], copied)])
