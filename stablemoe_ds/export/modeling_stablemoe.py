"""StableMoE language models for transformers. This file is all that an exported folder needs besides its weights.

``stablemoe export`` copies it into the folder; it imports torch and transformers only. A token's experts come from a
table of token ids (``router: table``), from a small network that sees ids only (``bigram``, ``cnn``, ``transformer``),
or from the affinity of the residual stream to one centroid an expert.

Names of tensors end in their shape: B sequences, S positions, T = B * S tokens, H positions up to now, D width, N
experts, K experts of a token, V ids, J split ids, Q rows that these have besides their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of transformers calls the key-value cache."""
NETWORKS = ("bigram", "cnn", "transformer")
"""Routers that see the ids up to a token, and nothing else."""
BY_ID = ("table", *NETWORKS)


class StableMoEConfig(PreTrainedConfig):
    """What a model looks like.

    positions: "rope" or "learned". norm: "rmsnorm" or "layernorm". activation: "swiglu", "relu" or "gelu".
    embedding_multiplier: factor on what the embedding gives. moe_blocks: the blocks (from 0) that have routed experts;
    placement: "after" the block's own feed-forward layer, or "replace" for blocks that have none.
    expert_intermediate_size, expert_sublayers: of each routed expert. shared_*: of the stack that serves every token.
    stack_*: of a dense stack in the place of routed experts; 0 sublayers: there is none.
    router: "table"; "bigram", "cnn", "transformer"; what the best experts are best at: "affinity", "softmax",
    "biased_sigmoid"; or "threshold": all experts whose softmax share reaches their threshold. network_*: of a bigram,
    cnn or transformer: its width, layers and heads, what stands before a first token ("zero" or "itself"), and the id
    that ends a document (None: a row is one document, whatever its ids).
    table_blocks: blocks (from 0) that follow a table whatever router says. split_ids: ids that take one of several rows
    of a table, by the id before them; split_rows: rows that these have besides their own.
    router_input: "raw", or "normalized" to unit root mean square. gate: factor on what an expert adds.
    """

    model_type = "stablemoe"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 32,
        intermediate_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 128,
        positions: str = "rope",
        rope_base: float = 10_000.0,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        activation: str = "swiglu",
        bias: bool = False,
        embedding_multiplier: float = 1.0,
        moe_blocks: list[int] | None = None,
        placement: str = "after",
        routed_experts: int = 0,
        experts_per_token: int = 1,
        expert_intermediate_size: int = 64,
        expert_sublayers: int = 1,
        shared_intermediate_size: int = 0,
        shared_sublayers: int = 0,
        stack_intermediate_size: int = 0,
        stack_sublayers: int = 0,
        router: str = "table",
        router_input: str = "raw",
        gate: str = "sigmoid",
        network_width: int = 32,
        network_layers: int = 1,
        network_heads: int = 1,
        network_start: str = "zero",
        network_document_end: int | None = None,
        table_blocks: list[int] | None = None,
        split_ids: int = 0,
        split_rows: int = 0,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings, self.positions, self.rope_base = max_position_embeddings, positions, rope_base
        self.norm, self.norm_eps, self.activation, self.bias = norm, norm_eps, activation, bias
        self.embedding_multiplier = embedding_multiplier
        self.moe_blocks, self.placement = moe_blocks or [], placement
        self.routed_experts, self.experts_per_token = routed_experts, experts_per_token
        self.expert_intermediate_size, self.expert_sublayers = expert_intermediate_size, expert_sublayers
        self.shared_intermediate_size, self.shared_sublayers = shared_intermediate_size, shared_sublayers
        self.stack_intermediate_size, self.stack_sublayers = stack_intermediate_size, stack_sublayers
        self.router, self.router_input, self.gate = router, router_input, gate
        self.network_width, self.network_layers, self.network_heads = network_width, network_layers, network_heads
        self.network_start, self.network_document_end = network_start, network_document_end
        self.table_blocks = table_blocks or []
        self.split_ids, self.split_rows = split_ids, split_rows
        self.use_cache, self.initializer_range = use_cache, initializer_range
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings


def make_norm(config: StableMoEConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""

    def __init__(self, config: StableMoEConfig, inner: int) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.up_proj(x)) if self.activation == "relu" else F.gelu(self.up_proj(x)))


class Sublayer(nn.Module):
    """What a feed-forward layer adds to the residual stream: its norm comes first."""

    def __init__(self, config: StableMoEConfig, inner: int) -> None:
        super().__init__()
        self.norm, self.mlp = make_norm(config), FeedForward(config, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class ResidualStack(nn.ModuleList):
    """What sublayers, one after another, add to the residual stream: an expert is one of these."""

    def __init__(self, config: StableMoEConfig, inner: int, sublayers: int) -> None:
        super().__init__(Sublayer(config, inner) for _ in range(sublayers))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self
        added = first(x)
        for sublayer in others:
            added = added + sublayer(x + added)
        return added


class SeenIds(NamedTuple):
    """Token ids int64 [B, H], of which the last S are those of this call; where in H the document of each begins.

    H is S, and the beginnings are None, for a model that looks at no id but a token's own. row_BS: the row of a table
    that each token of this call follows, where ids are split; None: the one of its id.
    """

    ids_BH: Tensor  # noqa: N815
    start_BH: Tensor | None = None  # noqa: N815
    row_BS: Tensor | None = None  # noqa: N815


class SplitIds(nn.Module):
    """Which row of a table each token follows, where some ids have several: the id before it decides.

    ids: int32 [J]. rows: int32 [J, V], the row of each of them behind each id. share: int32 [Q], how much each further
    row is used, in millionths of its id; kept for ``stablemoe checkpoint convert``.
    """

    ids: Tensor
    rows: Tensor
    share: Tensor

    def __init__(self, config: StableMoEConfig) -> None:
        super().__init__()
        shapes = {
            "ids": [config.split_ids],
            "rows": [config.split_ids, config.vocab_size],
            "share": [config.split_rows],
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, -1, dtype=torch.int32))

    def forward(self, seen: SeenIds) -> Tensor:
        """int64 [B, H]."""
        ids_BH, start_BH = seen.ids_BH, seen.start_BH
        assert start_BH is not None
        place_V = torch.full([self.rows.shape[1]], -1, device=ids_BH.device)
        place_V[self.ids.long()] = torch.arange(len(self.ids), device=ids_BH.device)
        place_BH, before_BH = place_V[ids_BH], F.pad(ids_BH, (1, 0))[:, :-1]
        has_rows = (place_BH >= 0) & (start_BH < torch.arange(ids_BH.shape[1], device=ids_BH.device))
        row_BH = torch.where(has_rows, self.rows[place_BH, before_BH].long(), ids_BH)
        if (row_BH < 0).any():
            raise ValueError("the weights contain no rows of split ids: model.split.rows holds -1")
        return row_BH


class IdNetwork(nn.Module):
    """Scores experts by the ids up to a token (StableMoE, section 3.2). Its weights stay as they were frozen."""

    def __init__(self, config: StableMoEConfig) -> None:
        super().__init__()
        width = config.network_width
        self.kind, self.heads, self.own_start = config.router, config.network_heads, config.network_start == "itself"
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.centroids = nn.Parameter(torch.zeros(config.routed_experts, width))
        if self.kind == "cnn":
            self.taps = nn.Parameter(torch.zeros(5))
        if self.kind == "transformer":
            self.positions = nn.Embedding(config.max_position_embeddings, width)
            layer = nn.TransformerEncoderLayer(width, self.heads, 4 * width, 0.0, batch_first=True, norm_first=True)
            norm = nn.LayerNorm(width)
            self.encoder = nn.TransformerEncoder(layer, config.network_layers, norm, enable_nested_tensor=False)

    @torch.no_grad()
    def forward(self, seen: SeenIds) -> Tensor:
        """fp32 [B, H, N]."""
        ids_BH, start_BH = seen.ids_BH, seen.start_BH
        assert start_BH is not None
        with torch.autocast(ids_BH.device.type, enabled=False):
            word = self.embedding(ids_BH)
            inside_BH = torch.arange(ids_BH.shape[1], device=ids_BH.device) - start_BH
            if self.kind == "bigram":
                before = _earlier(word, inside_BH, 1)
                if self.own_start:
                    before = torch.where(inside_BH[..., None] == 0, word, before)
                features = (word + before) / 2
            elif self.kind == "cnn":
                back = range(len(self.taps) - 1, -1, -1)
                earlier = torch.stack([_earlier(word, inside_BH, steps) for steps in back])
                features = torch.einsum("k,kbhd->bhd", self.taps, earlier)
            else:
                features = self._read(word * word.shape[-1] ** 0.5 + self.positions(inside_BH), start_BH)
            return F.linear(features.float(), self.centroids.float())

    def _read(self, x: Tensor, start_BH: Tensor) -> Tensor:
        """Each token sees those of its document up to itself."""
        at_H = torch.arange(x.shape[1], device=x.device)
        sees = (at_H >= start_BH[..., None]) & (at_H <= at_H[:, None])
        return self.encoder(x, mask=~sees.repeat_interleave(self.heads, dim=0))


def _earlier(word: Tensor, inside_BH: Tensor, steps: int) -> Tensor:
    """The vector of the id so many steps before each, zeros where its document has none: [B, H, width]."""
    moved = F.pad(word, (0, 0, steps, 0))[:, : word.shape[1]]
    return moved * (inside_BH >= steps)[..., None]


class Router(nn.Module):
    """Which experts serve a token, and with what factor. All arithmetic is fp32, as in training.

    table: int32 [V, K], experts by token id; [V + Q, K] where ids are split. network: scores by the ids up to a token.
    centroids: [N, D]. bias: [N], joins the choice but not the gate. threshold: [N], the softmax share from which an
    expert takes a token.
    """

    table: Tensor
    bias: Tensor
    threshold: Tensor

    def __init__(self, config: StableMoEConfig, kind: str) -> None:
        """kind: as ``router`` in the configuration."""
        super().__init__()
        self.config, self.kind, experts = config, kind, config.routed_experts
        if kind in NETWORKS:
            self.network = IdNetwork(config)
        if kind == "table":
            shape = (config.vocab_size + config.split_rows, config.experts_per_token)
            self.register_buffer("table", torch.full(shape, -1, dtype=torch.int32))
        if kind not in BY_ID or config.gate != "one":
            self.centroids = nn.Parameter(torch.zeros(experts, config.hidden_size))
        if kind == "biased_sigmoid":
            self.register_buffer("bias", torch.zeros(experts))
        if kind == "threshold":
            self.register_buffer("threshold", torch.full((experts,), 1 / experts))
        if config.gate == "learned":
            self.gate_scale, self.gate_bias = nn.Parameter(torch.ones(experts)), nn.Parameter(torch.zeros(experts))

    def forward(self, x_TD: Tensor, seen: SeenIds | None) -> tuple[Tensor, Tensor]:
        """Residual stream and token ids -> experts int64 [T, K], gates fp32 [T, K]."""
        expert_TK = self._by_id(seen, len(x_TD)) if seen is not None and self.kind in BY_ID else None
        if expert_TK is not None and self.config.gate == "one":
            return expert_TK, torch.ones(expert_TK.shape, device=x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.config.router_input == "normalized":
                x_TD = F.rms_norm(x_TD, x_TD.shape[-1:], eps=1e-6)
            scores_TN = F.linear(x_TD, self.centroids.float())
        if expert_TK is None:
            expert_TK = self._best(scores_TN.detach())
        return expert_TK, self._gate(scores_TN, expert_TK)

    def _by_id(self, seen: SeenIds, tokens: int) -> Tensor:
        """int64 [T, K], of the last T tokens."""
        if self.kind == "table":
            row_BS = seen.ids_BH if seen.row_BS is None else seen.row_BS
            return self.table[row_BS.flatten()].long()
        new = tokens // len(seen.ids_BH)
        return self._best(self.network(seen)[:, -new:].flatten(0, 1))

    def _best(self, scores_TN: Tensor) -> Tensor:
        """int64 [T, K]; of equals the lowest. With thresholds [T, N], -1 where an expert does not take the token."""
        if self.kind == "threshold":
            takes_TN = scores_TN.softmax(-1) >= self.threshold.float()
            return torch.where(takes_TN, torch.arange(takes_TN.shape[1], device=takes_TN.device), -1)
        if self.kind == "softmax":
            scores_TN = scores_TN.softmax(-1)
        elif self.kind == "biased_sigmoid":
            scores_TN = scores_TN.sigmoid() + self.bias.float()
        best = scores_TN.sort(dim=-1, descending=True, stable=True)
        return best.indices[:, : self.config.experts_per_token]

    def _gate(self, scores_TN: Tensor, expert_TK: Tensor) -> Tensor:
        # -1 is no expert, or in a table that was not loaded an error, which is reported where experts are called.
        kind, affinity_TK = self.config.gate, scores_TN.gather(1, expert_TK.clamp_min(0))
        if kind == "one":
            return torch.ones_like(affinity_TK)
        if kind == "softmax":
            return scores_TN.softmax(-1).gather(1, expert_TK.clamp_min(0))
        if kind == "learned":
            scale_N, bias_N = self.gate_scale.float(), self.gate_bias.float()
            return 2 * torch.sigmoid(scale_N[expert_TK] * affinity_TK + bias_N[expert_TK])
        gate_TK = torch.sigmoid(affinity_TK)
        if kind == "normalized" and expert_TK.shape[1] > 1:
            return gate_TK / (gate_TK.sum(1, keepdim=True) + 1e-20)
        return 2 * gate_TK if kind == "doubled" else gate_TK


class RoutedExperts(nn.Module):
    """sum_k gate_k * (what expert k adds) + what the shared stack adds (StableMoE, Dai et al. 2022, eq. 7)."""

    def __init__(self, config: StableMoEConfig, router: str) -> None:
        super().__init__()
        self.router = Router(config, router)
        # Not called "experts": servers replace a list of that name by fused feed-forward layers, which have no norm.
        self.routed = nn.ModuleList(
            ResidualStack(config, config.expert_intermediate_size, config.expert_sublayers)
            for _ in range(config.routed_experts)
        )
        self.shared = None
        if config.shared_sublayers:
            self.shared = ResidualStack(config, config.shared_intermediate_size, config.shared_sublayers)

    def forward(self, x_BSD: Tensor, seen: SeenIds | None) -> Tensor:
        x_TD = x_BSD.flatten(0, -2)
        expert_TK, gate_TK = self.router(x_TD, seen)
        added_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in expert_TK.unique().tolist():
            if expert < 0:
                if self.router.kind == "threshold":
                    continue
                raise ValueError("the weights contain no routing table: a router.table holds -1")
            token_R, choice_R = (expert_TK == expert).nonzero(as_tuple=True)
            rows_RD = self.routed[expert](x_TD[token_R]).float() * gate_TK[token_R, choice_R, None]
            added_TD.index_add_(0, token_R, rows_RD)
        added_TD = added_TD.to(x_TD.dtype)
        if self.shared is not None:
            added_TD = added_TD + self.shared(x_TD)
        return added_TD.view_as(x_BSD)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out: ``attn_implementation="eager"``. [B, heads, S, d] thrice -> [B, S, heads, d], weights."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * kwargs["scaling"]
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of pairs (i, i + d/2). x: [B, heads, S, d]; cos, sin: [B, 1, S, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, config: StableMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=config.bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        attention_mask: Any,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]. attention_mask: as the kind of attention in use takes it. rotary: cos and sin."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (part(x).view(heads).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, plain_attention)
        seen, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(seen.reshape(*x.shape[:-1], -1).contiguous())


class Block(GradientCheckpointingLayer):
    """Attention, the block's own feed-forward layer, and routed experts or a dense stack behind or instead of it."""

    def __init__(self, config: StableMoEConfig, layer_idx: int) -> None:
        super().__init__()
        extra = layer_idx in config.moe_blocks
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer_idx)
        own = not extra or config.placement == "after"
        self.feed_forward = Sublayer(config, config.intermediate_size) if own else None
        router = "table" if layer_idx in config.table_blocks else config.router
        self.moe = RoutedExperts(config, router) if extra and config.routed_experts else None
        self.stack = None
        if extra and config.stack_sublayers:
            self.stack = ResidualStack(config, config.stack_intermediate_size, config.stack_sublayers)

    def forward(
        self,
        x: Tensor,
        seen: SeenIds | None,
        attention_mask: Any = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Residual stream [B, S, D] and token ids -> the stream behind this block."""
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, rotary, cache, **kwargs)
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        if self.moe is not None:
            x = x + self.moe(x, seen)
        if self.stack is not None:
            x = x + self.stack(x)
        return x


class StableMoEPreTrainedModel(PreTrainedModel):
    """What transformers has to know of these models."""

    config_class = StableMoEConfig
    config: StableMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    # All that routers have but their tables, which would be made fp32, too.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "router.network",
        "router.centroids",
        "router.bias",
        "router.threshold",
        "router.gate_scale",
        "router.gate_bias",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            start = {"table": -1, "bias": 0, "threshold": 0, "gate_scale": 1, "gate_bias": 0}
            for name, value in start.items():
                if name in module._buffers or name in module._parameters:
                    nn.init.constant_(getattr(module, name), value)
            if "centroids" in module._parameters:
                nn.init.normal_(module.centroids, std=self.config.initializer_range)
        if isinstance(module, SplitIds):
            for buffer in module.buffers():
                nn.init.constant_(buffer, -1)


class StableMoEModel(StableMoEPreTrainedModel):
    """From token ids to the last hidden state."""

    def __init__(self, config: StableMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.split = SplitIds(config) if config.split_ids else None
        self.layers = nn.ModuleList(Block(config, number) for number in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: [B, S]; routes by id need them, also where ``inputs_embeds`` replace the embeddings.

        attention_mask: [B, past + S], 0 at padding, on either side. cache, past_key_values: two names of one thing.
        """
        by_id = self.config.router in BY_ID or self.config.table_blocks
        if input_ids is None and self.config.routed_experts and by_id:
            raise ValueError("experts are looked up by token id: pass input_ids, also together with inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = self._positions(embeds, attention_mask, past)
        mask = causal_mask(self.config, embeds, attention_mask, cache, position_ids, past)
        x = embeds * self.config.embedding_multiplier
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        rotary = self._rotary(x, position_ids) if self.config.positions == "rope" else None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        ids = None if input_ids is None else self._seen(input_ids, attention_mask, cache, past)
        states: tuple[Tensor, ...] = ()
        for block in self.layers:
            states = (*states, x) if output_hidden_states else ()  # not kept unless they are asked for
            x = block(x, ids, attention_mask=mask, rotary=rotary, cache=cache, position_ids=position_ids, **kwargs)
        x = self.norm(x)
        hidden = (*states, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE: cache})

    def _seen(self, ids_BS: Tensor, attention_mask: Any, cache: Any, past: int) -> SeenIds:
        """The ids up to now, which the cache remembers as it does keys and values, and where their documents begin."""
        if not self.config.routed_experts or (self.config.router not in NETWORKS and self.split is None):
            return SeenIds(ids_BS)
        new = ids_BS.shape[1]
        if cache is not None:
            last = self.config.num_hidden_layers
            cache.layers.extend(DynamicLayer() for _ in range(last + 1 - len(cache.layers)))
            if cache.layers[last].get_seq_length() != past:
                raise ValueError("the cache holds tokens whose ids this model has not seen: begin with a new one")
            column = ids_BS[:, None, :, None]
            ids_BS = cache.layers[last].update(column, column)[0][:, 0, :, 0]
        begins_BH = torch.zeros_like(ids_BS, dtype=torch.bool)
        if self.config.network_document_end is not None:
            begins_BH[:, 1:] = ids_BS[:, :-1] == self.config.network_document_end
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            real_BH = attention_mask.bool()
            begins_BH[:, 1:] |= real_BH[:, 1:] & ~real_BH[:, :-1]
        at_H = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        seen = SeenIds(ids_BS, torch.where(begins_BH, at_H, 0).cummax(1).values)
        return seen if self.split is None else seen._replace(row_BS=self.split(seen)[:, -new:])

    def _positions(self, embeds: Tensor, attention_mask: Any, past: int) -> Tensor:
        """int64 [B or 1, S]: counted from the first token that is no padding."""
        new = embeds.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            counted = attention_mask.long().cumsum(-1) - 1
            return counted.clamp_min(0)[:, past : past + new]
        return torch.arange(past, past + new, device=embeds.device)[None]

    def _rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, 1, S, d], computed in fp32."""
        exponent = torch.arange(0, self.config.head_dim, 2, device=x.device, dtype=torch.float32)
        rate = self.config.rope_base ** (-exponent / self.config.head_dim)
        angle = position_ids[:, None, :, None].float() * rate
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def causal_mask(
    config: StableMoEConfig, embeds: Tensor, attention_mask: Any, cache: Any, position_ids: Tensor, past: int
) -> Any:
    """transformers' own mask for the kind of attention in use; its arguments have had several names."""
    known = {
        "config": config,
        "inputs_embeds": embeds,
        "input_embeds": embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "past_key_values": cache,
        "position_ids": position_ids,
        "cache_position": torch.arange(past, past + embeds.shape[1], device=embeds.device),
    }
    wanted = signature(create_causal_mask).parameters
    return create_causal_mask(**{name: value for name, value in known.items() if name in wanted})


class StableMoEForCausalLM(StableMoEPreTrainedModel, GenerationMixin):
    """The language model: scores of the next id."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StableMoEConfig) -> None:
        super().__init__(config)
        self.model = StableMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments as in :meth:`StableMoEModel.forward`. labels: [B, S], ids as they stand; -100: not scored."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)}
        )
