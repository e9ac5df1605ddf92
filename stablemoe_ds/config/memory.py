"""Memory of one rank, by ZeRO stage. Weights, gradients and optimizer are counted; activations are an estimate."""

from __future__ import annotations

from dataclasses import dataclass

from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.costs import parameters, shared_stack, vocabulary
from stablemoe_ds.config.schema import RunConfig


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. ``activations`` is an estimate and leaves out library workspaces and buckets.

    host: what is in host memory instead (``parallel.offload``).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """Without what is in host memory."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(run: RunConfig, plan: BatchPlan, world_size: int) -> dict[int, Memory]:
    """What a rank holds in training under ZeRO stages 0, 1, 2 and 3.

    Dense parameters are cut over tensor ranks and sharded over data and sequence ranks; routed experts are spread over
    expert-parallel ranks, or replicated, and sharded over the copies of each expert. fp32 masters and Adam's two
    moments take 12 bytes a parameter (8 where the weights are the masters). Gradients accumulate in fp32, and those of
    the backward pass are let go one by one. As it reduces them, DeepSpeed makes a second copy of this rank's share,
    except in bf16: ZeRO 1 reduces in place there, and ZeRO 2 in half precision adds to the share itself. ZeRO 3 keeps a
    share of the weights besides the masters and gathers a module's when it is due: the largest one's weights and their
    gradients are whole for that time. Small models stay gathered longer, up to DeepSpeed's prefetch bucket.
    """
    counts, tensor = parameters(run), run.parallel.tensor
    cut = counts.embedding + counts.output + counts.attention + counts.ffn
    dense = -(-cut // tensor) + counts.total - counts.expert - cut
    spread, replicated = held_experts(run)
    dense_shard = -(-dense // plan.weight_copies)
    expert_shard = -(-spread * run.parallel.expert // world_size) - (-replicated // world_size)
    held, shard = dense + spread + replicated, dense_shard + expert_shard
    dtype, activations = run.precision.dtype, activation_bytes(run, plan)
    half = dtype != "fp32"
    weights = (2 if half else 4) * held
    return {
        0: Memory(weights, 4 * held, (12 if half else 8) * held, activations),
        1: Memory(weights, 4 * held + (0 if dtype == "bf16" else 4 * shard), 12 * shard, activations),
        2: Memory(weights, (4 if half else 8) * shard, 12 * shard, activations),
        3: _sharded(run, shard, largest_module(run), activations),
    }


def _sharded(run: RunConfig, shard: int, gathered: int, activations: int) -> Memory:
    """Under ZeRO 3, with what is offloaded."""
    size, offload = 4 if run.precision.dtype == "fp32" else 2, run.parallel.offload
    weights = size * shard
    if offload is None:
        return Memory(weights + size * gathered, 8 * shard + 4 * gathered, 12 * shard, activations)
    on_device = 0 if offload == "all" else weights
    gradients = (size + 4) * gathered  # of one module, and in fp32 on their way to host memory
    return Memory(on_device + size * gathered, gradients, 0, activations, 20 * shard + weights - on_device)


def held_experts(run: RunConfig) -> tuple[int, int]:
    """Parameters of the experts of a rank: of those spread over the ranks, and of those that every rank has.

    Each rank has room for as many of the former as the fullest. A run that learns its table has the latter only once
    it is continued after the switch, and needs less until then.
    """
    ranks = run.parallel.expert
    replicated = run.parallel.replicated_experts if ranks > 1 else 0
    of_one = parameters(run).expert // run.moe.experts
    return of_one * -(-(run.moe.experts - replicated) // ranks), of_one * replicated


def largest_module(run: RunConfig) -> int:
    """Parameters of this rank's largest module that ZeRO 3 gathers at once: an MoE layer, a token matrix or another."""
    counts, m, layers = parameters(run), run.model, len(run.moe.layers)
    tensor = run.parallel.tensor
    cut = (counts.embedding, counts.attention // m.layers, counts.ffn // m.layers)
    found = max(-(-part // tensor) for part in cut)
    if not layers:
        return found
    whole = counts.shared_experts + counts.router
    distilled = counts.distilled // max(1, len(run.moe.learned_layers))
    return max(found, (sum(held_experts(run)) + whole) // layers + distilled)


def activation_bytes(run: RunConfig, plan: BatchPlan) -> int:
    """Roughly what is kept for the backward pass of one micro-batch, with experts evenly loaded.

    Counts the inputs of norms, matrix products and nonlinearities, and logits, which their gradient is written over;
    attention keeps no score matrix (``scaled_dot_product_attention``).
    """
    m, moe, tensor = run.model, run.moe, run.parallel.tensor
    d, size = m.hidden_size, 4 if run.precision.dtype == "fp32" else 2
    tokens = plan.micro_batch * run.data.sequence_length // plan.sequence
    kv_width = d // m.heads * (m.kv_heads or m.heads)
    widths = 3 if m.activation == "swiglu" else 2
    layers = len(moe.layers)
    replaced = layers if moe.placement == "replace" else 0
    attention = 2 * d + (2 * d + 2 * kv_width) // tensor
    ffn = 2 * d + widths * m.ffn_hidden_size // tensor
    shared_width, shared_depth = shared_stack(run)
    experts = shared_depth * (3 * d + widths * shared_width)
    if moe.facts.routed:
        experts += moe.top_k * moe.sublayers * (3 * d + widths * (moe.ffn_hidden_size or m.ffn_hidden_size))
    experts //= tensor
    if run.parallel.recompute:
        kept = (m.layers + layers) * d + max(attention + ffn, experts if layers else 0)
    else:
        kept = m.layers * attention + (m.layers - replaced) * ffn + layers * experts
    return tokens * size * (kept + vocabulary(run) // tensor)
