"""What a run costs before it starts: parameters, exactly; training FLOPs a token, by convention.

Everything is a formula over the configuration; a test elsewhere holds it to the built model.
"""

from __future__ import annotations

from dataclasses import dataclass

from stablemoe_ds.config.schema import ModelConfig, RunConfig
from stablemoe_ds.errors import UserError


@dataclass(frozen=True)
class Counts:
    """Trainable numbers of the whole model, by component.

    embedding and output: token matrices (output is 0 if tied). positions: learned ones. attention, ffn: with their
    biases. norms: of the blocks and the last one. shared_experts: what serves every token in MoE layers or their place.
    expert: all routed experts of all MoE layers, with their norms. router: the centroids that choose and gate, and
    what gates learn.
    distilled: the routers of token ids, which the switch turns into a table.
    served: of ``expert``, the top_k/N that one token meets.
    """

    embedding: int
    output: int
    positions: int
    attention: int
    ffn: int
    norms: int
    shared_experts: int
    expert: int
    router: int
    distilled: int
    served: int

    @property
    def shared(self) -> int:
        """What every token meets: all but the routed experts and the routers; the paper's "shared params"."""
        parts = (self.embedding, self.output, self.positions, self.attention, self.ffn, self.norms)
        return sum(parts) + self.shared_experts

    @property
    def active(self) -> int:
        """What one token meets, routers left out."""
        return self.shared + self.served

    @property
    def total(self) -> int:
        """Everything the optimizer holds in stage 1."""
        return self.shared + self.expert + self.router + self.distilled


def vocabulary(run: RunConfig) -> int:
    """``model.vocab_size``. Raises UserError while it is null: ``rules.with_vocabulary`` fills it in."""
    if run.model.vocab_size is None:
        raise UserError(
            "model.vocab_size: got null: the tokenizer decides it, so costs are unknown without its file "
            f"{run.data.tokenizer}; nearest that works: a number"
        )
    return run.model.vocab_size


def parameters(run: RunConfig) -> Counts:
    """Exact parameter counts. Raises UserError if the vocabulary is not known yet."""
    m, moe, vocab = run.model, run.moe, vocabulary(run)
    d, layers = m.hidden_size, len(moe.layers)
    dense_ffns = m.layers - (layers if moe.placement == "replace" else 0)
    kv_width = d // m.heads * (m.kv_heads or m.heads)
    attention = 2 * d * d + 2 * d * kv_width + m.bias * (2 * d + 2 * kv_width)
    expert_ffn = moe.ffn_hidden_size or m.ffn_hidden_size
    one_expert = moe.sublayers * (_ffn(m, expert_ffn) + _norm(m))
    width, depth = shared_stack(run)
    routed = layers if moe.facts.routed else 0
    learned, followed = len(moe.learned_layers), len(moe.fixed_layers)
    with_centroids = learned * moe.facts.routed + followed * moe.gate_facts.affinity
    embedding, positions = vocab * d, run.data.sequence_length * d if m.positions == "learned" else 0
    return Counts(
        embedding=embedding,
        output=0 if m.tie_embeddings else embedding,
        positions=positions,
        attention=m.layers * attention,
        ffn=dense_ffns * _ffn(m, m.ffn_hidden_size),
        norms=(m.layers + dense_ffns + 1) * _norm(m),
        shared_experts=layers * depth * (_ffn(m, width) + _norm(m)),
        expert=routed * moe.experts * one_expert,
        router=moe.experts * (with_centroids * d + layers * moe.gate_facts.numbers),
        distilled=learned * _distilled(run, vocab) if moe.facts.distilled else 0,
        served=routed * moe.top_k * one_expert,
    )


def shared_stack(run: RunConfig) -> tuple[int, int]:
    """(inner width, sublayers) of what serves every token in an MoE layer or its place; (0, 0) if nothing does."""
    moe = run.moe
    width = moe.ffn_hidden_size or run.model.ffn_hidden_size
    if moe.facts.layer == "deep":
        return width, moe.sublayers * moe.experts
    if moe.facts.layer == "wide":
        return width * moe.experts, moe.sublayers
    return width * moe.shared_experts, moe.sublayers if moe.shared_experts else 0


def flops_per_token(run: RunConfig, causal: bool = False) -> int:
    """Floating-point operations of one training step per token: forward, and twice that backward.

    6 for each active weight of a matrix product (output matrix counted, embedding lookup, norms, biases and routers
    not), and 12 * blocks * width * sequence for attention over the whole sequence: PaLM's convention (Chowdhery et
    al. 2022, appendix B), which does not halve for the causal mask and counts nothing that is recomputed. A sixth
    of it is the multiply-adds of a forward pass, as the paper's table has them.

    causal: count only the pairs that the causal mask leaves, (sequence + 1) / 2 a token. A kernel that skips the
    others can then reach a share of the peak of 1, but not more.
    """
    m, moe = run.model, run.moe
    d, layers = m.hidden_size, len(moe.layers)
    kv_width = d // m.heads * (m.kv_heads or m.heads)
    matrices = 3 if m.activation == "swiglu" else 2
    dense_ffns = m.layers - (layers if moe.placement == "replace" else 0)
    shared_width, shared_depth = shared_stack(run)
    expert_width = shared_width * shared_depth
    if moe.facts.routed:
        expert_width += moe.sublayers * moe.top_k * (moe.ffn_hidden_size or m.ffn_hidden_size)
    weights = m.layers * (2 * d * d + 2 * d * kv_width) + vocabulary(run) * d
    weights += matrices * d * (dense_ffns * m.ffn_hidden_size + layers * expert_width)
    pairs = 6 * (run.data.sequence_length + 1) if causal else 12 * run.data.sequence_length
    return 6 * weights + m.layers * d * pairs


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.norm == "layernorm" else 1)


def _ffn(model: ModelConfig, inner: int) -> int:
    """One feed-forward layer: W1 (gate and up for swiglu), W2 and their biases."""
    d, wide = model.hidden_size, inner * (2 if model.activation == "swiglu" else 1)
    return wide * d + inner * d + model.bias * (wide + d)


def _distilled(run: RunConfig, vocab: int) -> int:
    """One layer's router of token ids: features and centroids (``routing.distilled``)."""
    kind, dim, d = run.moe.distilled.kind, run.moe.distilled.dim, run.model.hidden_size
    if kind != "transformer":
        return vocab * dim + run.moe.experts * dim + (5 if kind == "cnn" else 0)
    block = 12 * d * d + 13 * d  # width 4d inside, biases and two layer norms, whatever the backbone has
    return (vocab + run.data.sequence_length + run.moe.experts + 2) * d + run.moe.distilled.layers * block
