"""The language model: megatron-core's ``GPTModel``, assembled through ``ModuleSpec`` from a :class:`RunConfig`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from stablemoe_ds.config.costs import shared_stack
from stablemoe_ds.config.resolved import settled
from stablemoe_ds.config.schema import DataConfig, ModelConfig, RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.placement import LayerPlacement
from stablemoe_ds.model.attention import CachedSelfAttention, SdpaAttention, UlyssesAttention
from stablemoe_ds.model.blocks import DenseBlock, DenseStack, MoEBlock
from stablemoe_ds.model.cross_entropy import cross_entropy
from stablemoe_ds.model.document_mask import Documents, can_be_fast
from stablemoe_ds.model.initialize import initialize_parameters
from stablemoe_ds.model.parts import DeviceRotaryEmbedding, Norm, RowLinear
from stablemoe_ds.model.stack import RoutedStack
from stablemoe_ds.moe.experts import Experts, ExpertShape, MakeExperts
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.plan import LayerPlan
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass, view_of
from stablemoe_ds.ops.compiler import require_compiler
from stablemoe_ds.ops.documents import document_starts
from stablemoe_ds.routing.build import make_router
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.routes import NOTHING_KNOWN, KnownRoutes, TokenView


@dataclass(frozen=True)
class ForwardOutput:
    """Sums over this rank's micro-batch; the caller divides by global counts.

    loss_sum: scalar, cross entropy summed over scored tokens. loss_BS: fp32 [B, S], of every position.
    layers: what each MoE layer did.
    """

    loss_sum: Tensor
    loss_BS: Tensor  # noqa: N815
    layers: list[LayerReport]

    def auxiliary_sum(self, name: str) -> Tensor | None:
        """The named auxiliary loss summed over MoE layers, unweighted; None if no layer has it."""
        sums = [layer.loss_sums[name] for layer in self.layers if name in layer.loss_sums]
        return torch.stack(sums).sum() if sums else None


class StableMoEGPT(GPTModel):
    """``GPTModel`` that takes routes with the batch and reports what its MoE layers did."""

    def __init__(
        self,
        run: RunConfig,
        vocab_size: int,
        placement: LayerPlacement,
        experts_of: Mapping[int, MakeExperts] = MappingProxyType({}),
    ) -> None:
        """Build on the CPU in fp32, initialised from ``run.seed`` alone: equal under every parallel layout.

        experts_of: by block, what makes the routed experts of an MoE layer, where it is not :class:`Experts`.
        Needs megatron-core's process groups (``distributed.groups``). Raises UserError if the run is to be compiled and
        this machine cannot.
        """
        run = settled(run)
        m = run.model
        if run.parallel.compile:
            require_compiler()
        specs = block_specs(run, vocab_size, placement, experts_of)
        config = transformer_config(run, len(specs))
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[], layer_norm=Norm),  # its decoder is replaced below
            vocab_size,
            run.data.sequence_length,
            share_embeddings_and_output_weights=m.tie_embeddings,
            position_embedding_type="rope" if m.positions == "rope" else "learned_absolute",
            rotary_base=m.rope_base,
        )
        self.run_config, self.sequence_parallel = run, placement.sequence_parallel
        self.decoder = RoutedStack(config, TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm))
        if m.positions == "rope":
            self.rotary_pos_emb = DeviceRotaryEmbedding(
                config.kv_channels, 1.0, rotary_base=m.rope_base, use_cpu_initialization=True
            )
            self.rotary_pos_emb.part = placement.sequence_rank
        if m.embedding == "scaled":
            scale = math.sqrt(m.hidden_size)
            self.embedding.word_embeddings.register_forward_hook(lambda _module, _args, out: out * scale)
        initialize_parameters(self, run)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """MoE layers in the order of the stack."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    @property
    def distilled_routers(self) -> list[DistilledRouter]:
        """The distilled router of each MoE layer; none if nothing is distilled."""
        return [layer.router.distilled for layer in self.moe_layers if layer.router.distilled is not None]

    def router_state(self) -> dict[str, Tensor]:
        """What routers keep besides their parameters, by name: equal on all ranks."""
        routers = {f"{name}.router": m.router for name, m in self.named_modules() if isinstance(m, MoELayer)}
        return {f"{at}.{name}": buffer for at, router in routers.items() for name, buffer in router.named_buffers()}

    def forward(
        self,
        batch: Batch,
        known: KnownRoutes = NOTHING_KNOWN,
        seed: int = 0,
        plans: Mapping[int, LayerPlan] | None = None,
        counts_LN: Tensor | None = None,
    ) -> ForwardOutput:
        """Loss of one micro-batch.

        known: routes made beforehand from ``batch.ids``.
        seed: seed of random decisions in this call, equal on all ranks.
        plans: by block, made beforehand from ``known``; a layer without one makes its own.
        counts_LN: see :class:`RoutingPass`.
        """
        routing = RoutingPass(view_of(batch), known, seed, plans or {}, counts_LN)
        loss_BS = self._run(routing, labels=batch.labels, apart=self.keeps_documents_apart).float()
        return ForwardOutput((loss_BS * batch.scored).sum(), loss_BS, routing.reports)

    @torch.no_grad()
    def choices(self, batch: Batch, known: KnownRoutes, seed: int) -> Tensor:
        """int64 [L, N]: real tokens (times K) of this rank by the expert that each MoE layer's router chooses.

        As in :meth:`forward` with the same routes and seed, at the cost of the stack up to the last MoE layer.
        Collective.
        """
        routing = RoutingPass(view_of(batch), known, seed, only_choices=len(self.moe_layers))
        self._run(routing, labels=batch.labels, apart=self.keeps_documents_apart)
        return torch.stack([report.served_N for report in routing.reports])

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """megatron-core's step from the stack's output to logits or losses, if they are wanted."""
        if kwargs["extra_block_kwargs"]["routing"].ended:
            return hidden_states
        output: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return output

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """fp32 [B, S], of ids [B, S] and logits [S, B, V], which are lost; in place of megatron-core's own."""
        group = self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None
        loss_T = cross_entropy(logits.flatten(0, 1), labels.transpose(0, 1).flatten(), group)
        return loss_T.view(logits.shape[:2]).transpose(0, 1)

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether :meth:`forward`, and so training and evaluation, keeps a sequence's documents apart."""
        return self.run_config.data.document_mask != "none"

    def logits(
        self, ids_BS: Tensor, known: KnownRoutes = NOTHING_KNOWN, cache: Any = None, apart: bool = False
    ) -> Tensor:
        """fp32 [B, S, V]: scores of the next id at each position, or [B, 1, V] of the last one with a cache.

        cache: megatron-core ``StaticInferenceContext``; ``ids_BS`` then continue at its offset.
        apart: keep the documents of a sequence apart; otherwise a sequence is one document, as a prompt is.
        """
        real_T = torch.ones(ids_BS.numel(), dtype=torch.bool, device=ids_BS.device)
        routing = RoutingPass(TokenView(ids_BS, real_T), known)
        return self._run(routing, cache=cache, apart=apart).float()

    def _run(
        self, routing: RoutingPass, labels: Tensor | None = None, cache: Any = None, apart: bool = False
    ) -> Tensor:
        if strays := routing.known.keys() - set(self.run_config.moe.layers):
            raise ValueError(f"routes of blocks {sorted(strays)}, where no MoE layer is")
        tokens = routing.tokens
        ids_BS, whole_BS = tokens.ids_BS, tokens.ids_BS if tokens.whole_BS is None else tokens.whole_BS
        if whole_BS.shape[1] != ids_BS.shape[1] * self.sequence_parallel:
            raise ValueError(f"expected a part of each sequence, as there are {self.sequence_parallel} sequence ranks")
        first = tokens.first if cache is None else cache.sequence_len_offset
        here = slice(first, first + ids_BS.shape[1])
        positions_BS = torch.arange(here.start, here.stop, device=ids_BS.device).expand_as(ids_BS)
        documents = None
        if apart:
            start_BS = document_starts(whole_BS, document_end(self.run_config.data))
            dropout = self.config.attention_dropout if self.training else 0.0
            documents = Documents.of(start_BS, can_be_fast(ids_BS.device, self.config.kv_channels, dropout))
            if self.run_config.data.document_mask == "attention_and_positions":
                positions_BS = positions_BS - start_BS[:, here]
        return super().forward(
            ids_BS,
            positions_BS,
            documents,
            labels=labels,
            inference_context=cache,
            extra_block_kwargs={"routing": routing},
            runtime_gather_output=labels is None,
        )


def transformer_config(run: RunConfig, layers: int) -> TransformerConfig:
    """megatron-core's configuration of the backbone; every library default that needs CUDA is off."""
    m = run.model
    return TransformerConfig(
        num_layers=layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.heads,
        num_query_groups=m.kv_heads or m.heads,
        normalization="LayerNorm" if m.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        activation_func={"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}[m.activation],
        gated_linear_unit=m.activation == "swiglu",
        add_bias_linear=m.bias,
        hidden_dropout=m.dropout,
        attention_dropout=m.dropout,
        tensor_model_parallel_size=run.parallel.tensor,
        use_cpu_initialization=True,
        # Values come from ``initialize_parameters``; without a method megatron-core would not mark tensor-parallel
        # parameters as such, and gradient norms would be wrong.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
    )


def document_end(data: DataConfig) -> int | None:
    """Id that ends a document; None if a sequence is one document to the model.

    Raises ValueError if documents are to be kept apart and the id is unknown.
    """
    if data.document_mask == "none":
        return None
    if data.eos_id is None:
        raise ValueError("data.eos_id is unknown, so documents have no end: see rules.with_document_end")
    return data.eos_id


def _leave(tensor: Tensor) -> Tensor:
    """An initialisation method that does nothing."""
    return tensor


def block_specs(
    run: RunConfig, vocab_size: int, placement: LayerPlacement, experts_of: Mapping[int, MakeExperts]
) -> list[ModuleSpec]:
    """Layer specs of the whole stack: each transformer block, and the MoE layer after or inside it."""
    moe, recompute = run.moe, run.parallel.recompute
    dense = get_gpt_layer_local_spec(normalization="RMSNorm" if run.model.norm == "rmsnorm" else None)
    dense.module = DenseBlock
    dense.params = {**dense.params, "recompute": recompute, "compiled": run.parallel.compile}
    parts = dense.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    parts.self_attention.module = CachedSelfAttention
    parts.self_attention.submodules.core_attention = SdpaAttention
    if placement.sequence_group is not None:
        # A function, as megatron-core copies what it is given, and a process group cannot be copied.
        parts.self_attention.submodules.core_attention = lambda *args, **options: UlyssesAttention(
            *args, group=placement.sequence_group, **options
        )
    parts.self_attention.submodules.linear_proj = parts.mlp.submodules.linear_fc2 = RowLinear
    attention_only = copy.deepcopy(dense)
    attention_only.submodules.pre_mlp_layernorm = attention_only.submodules.mlp = IdentityOp
    attention_only.submodules.mlp_bda = IdentityFuncOp

    specs: list[ModuleSpec] = []
    for block in range(1, run.model.layers + 1):
        has_moe = block in moe.layers
        specs.append(attention_only if has_moe and moe.placement == "replace" else dense)
        if has_moe and not moe.facts.routed:
            shape = expert_shape(run.model, *shared_stack(run))
            params = {"shape": shape, "recompute": recompute, "compiled": run.parallel.compile}
            specs.append(ModuleSpec(module=DenseStack, params=params))
        elif has_moe:
            index = moe.layers.index(block)

            def build(block: int = block, index: int = index) -> MoELayer:
                return build_moe_layer(run, vocab_size, placement, block, index, experts_of.get(block, Experts))

            specs.append(ModuleSpec(module=MoEBlock, params={"build": build, "recompute": recompute}))
    return specs


def build_moe_layer(
    run: RunConfig,
    vocab_size: int,
    placement: LayerPlacement,
    block: int,
    index: int,
    make_experts: MakeExperts = Experts,
) -> MoELayer:
    """The MoE layer number ``index`` (from 0), at block ``block`` (from 1), uninitialised."""
    m, moe, follows = run.model, run.moe, block in run.moe.table_layers
    positions, eos_id = run.data.sequence_length, document_end(run.data)
    return MoELayer(
        make_router(moe, m.hidden_size, m.heads, vocab_size, positions, eos_id, follows),
        expert_shape(m, moe.ffn_hidden_size or m.ffn_hidden_size, moe.sublayers),
        placement,
        block=block,
        index=index,
        follows=follows,
        shared=expert_shape(m, *shared_stack(run)) if moe.shared_experts else None,
        capacity_factor=moe.capacity_factor,
        parts=run.parallel.dispatch_parts,
        compiled=run.parallel.compile,
        make_experts=make_experts,
    )


def expert_shape(m: ModelConfig, ffn_hidden_size: int, sublayers: int) -> ExpertShape:
    """An expert in the style of the backbone's own feed-forward layers."""
    return ExpertShape(m.hidden_size, ffn_hidden_size, sublayers, m.activation, m.norm, m.norm_epsilon, m.bias)
