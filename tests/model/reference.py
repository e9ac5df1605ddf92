"""The model and its losses written down from the paper's equations: float64, token by token, slow on purpose.

It shares no code with the package. Weights are whole tensors under their canonical names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch

Weights = dict[str, Tensor]
Choices = dict[tuple[int, int], list[int]]
"""Experts of (sequence, position), best first; padding is absent."""
Table = dict[int, list[list[int]]]
"""Experts of each id by block, for the layers that follow a table from the first update."""


@dataclass
class SlowOutput:
    """Unweighted sums over one micro-batch, and where each token went, by MoE layer; sigmas are of learned choices."""

    loss_sum: Tensor
    distill_sum: Tensor
    choices: list[Choices]
    sigmas: list[dict[tuple[int, int], list[Tensor]]]
    logits_BSV: Tensor  # noqa: N815


class SlowModel:
    """Reads weights by name, so that they may be replaced between calls."""

    def __init__(self, run: RunConfig, weights: Weights, table: Table | None = None) -> None:
        self.run, self.w, self.table = run, weights, table or {}

    def __call__(self, batch: Batch, frozen: bool = False) -> SlowOutput:
        """``frozen``: stage 2: the distilled router's best experts for each id, and no auxiliary losses.

        Of blocks in ``table`` the experts are those of the table in both stages.
        """
        m, moe = self.run.model, self.run.moe
        zero = torch.zeros((), dtype=torch.float64)
        out = SlowOutput(zero, zero, [], [], zero)
        x = self.w["embedding.word_embeddings.weight"][batch.ids]
        if m.embedding == "scaled":
            x = x * math.sqrt(m.hidden_size)
        if m.positions == "learned":
            x = x + self.w["embedding.position_embeddings.weight"][: x.shape[1]]
        layer = 0
        for block in range(1, m.layers + 1):
            at = f"decoder.layers.{layer}."
            layer += 1
            x = x + self.attention(at + "self_attention.", self.norm(at + "input_layernorm.", x))
            if not (block in moe.layers and moe.placement == "replace"):
                x = x + self.feed_forward(at + "mlp.", self.norm(at + "pre_mlp_layernorm.", x))
            if block in moe.layers:
                x = self.moe(f"decoder.layers.{layer}.moe.", x, batch, frozen, out, self.table.get(block))
                layer += 1
        x = self.norm("decoder.final_layernorm.", x)
        vocabulary = "embedding.word_embeddings.weight" if m.tie_embeddings else "output_layer.weight"
        out.logits_BSV = x @ self.w[vocabulary].T
        for b, s in batch.scored.nonzero().tolist():
            row = out.logits_BSV[b, s]
            out.loss_sum = out.loss_sum + row.logsumexp(0) - row[batch.labels[b, s]]
        return out

    def norm(self, at: str, x: Tensor) -> Tensor:
        return _norm(x, self.run, self.w[at + "weight"], self.w.get(at + "bias"))

    def linear(self, at: str, x: Tensor) -> Tensor:
        y = x @ self.w[at + "weight"].T
        return y + self.w[at + "bias"] if at + "bias" in self.w else y

    def feed_forward(self, at: str, x: Tensor) -> Tensor:
        return self.linear(at + "linear_fc2.", _activate(self.run, self.linear(at + "linear_fc1.", x)))

    def attention(self, at: str, x: Tensor) -> Tensor:
        """One head and one query at a time. Rows of ``linear_qkv``: for each group its queries, its key, its value."""
        m = self.run.model
        groups, width = m.kv_heads or m.heads, m.hidden_size // m.heads
        per_group = m.heads // groups
        parts = self.linear(at + "linear_qkv.", x).split(width, dim=-1)
        heads = []
        for head in range(m.heads):
            base = (head // per_group) * (per_group + 2)
            q, k, v = parts[base + head % per_group], parts[base + per_group], parts[base + per_group + 1]
            if m.positions == "rope":
                q, k = self.rotate(q), self.rotate(k)
            seen = []
            for s in range(x.shape[1]):
                scores = torch.einsum("bd,bkd->bk", q[:, s], k[:, : s + 1]) / math.sqrt(width)
                seen.append(torch.einsum("bk,bkd->bd", scores.softmax(-1), v[:, : s + 1]))
            heads.append(torch.stack(seen, 1))
        return self.linear(at + "linear_proj.", torch.cat(heads, -1))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding (Su et al. 2021), pairs (i, i + width/2)."""
        half = x.shape[-1] // 2
        rates = torch.tensor([self.run.model.rope_base ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * rates
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def moe(
        self, at: str, x: Tensor, batch: Batch, frozen: bool, out: SlowOutput, followed: list[list[int]] | None
    ) -> Tensor:
        moe = self.run.moe
        centroids = self.w[at + "router.centroids"]
        if followed is None:
            distilled = (
                self.w[at + "router.distilled.features.embedding.weight"] @ self.w[at + "router.distilled.centroids"].T
            )
        choices: Choices = {}
        sigmas: dict[tuple[int, int], list[Tensor]] = {}
        rows: list[list[Tensor]] = []
        for b in range(x.shape[0]):
            rows.append([])
            for s in range(x.shape[1]):
                h = x[b, s]
                y = h
                if moe.shared_experts:
                    y = y + self.expert(at + "shared.", h, only=True) - h
                if batch.real[b, s]:
                    seen = h / (h.square().mean() + 1e-6).sqrt() if moe.router_input != "raw" else h
                    scores = centroids @ seen
                    if followed is not None:
                        best = followed[int(batch.ids[b, s])]
                    else:
                        best = order(distilled[batch.ids[b, s]] if frozen else scores)[: moe.top_k]
                    choices[b, s], sigmas[b, s] = best, [1 / (1 + torch.exp(-scores[i])) for i in best]
                    for i in best:
                        y = y + self.gate(at, i, scores[i]) * (self.expert(f"{at}experts.{i}.", h) - h)
                rows[b].append(y)
        out.choices.append(choices)
        if followed is not None:
            sigmas = {}
        if not frozen:
            out.sigmas.append(sigmas)
        if not frozen and followed is None:
            for (b, s), best in choices.items():
                for i in best:
                    row = distilled[batch.ids[b, s]]
                    out.distill_sum = out.distill_sum + (row.logsumexp(0) - row[i]) / moe.top_k
        return torch.stack([torch.stack(row) for row in rows])

    def gate(self, at: str, expert: int, score: Tensor) -> Tensor:
        """Weight of an expert: sigmoid(s) as in the paper (eq. 7), or what ``moe.gate`` says instead."""
        kind = self.run.moe.gate
        if kind == "one":
            return torch.ones_like(score)
        if kind == "learned":
            score = self.w[at + "router.gate.scale_N"][expert] * score + self.w[at + "router.gate.bias_N"][expert]
        return (2 if kind in ("doubled", "learned") else 1) / (1 + torch.exp(-score))

    def expert(self, at: str, h: Tensor, only: bool = False) -> Tensor:
        """The stack of one token. ``only``: the weights are stacked over a single expert."""
        for k in range(self.run.moe.sublayers):
            part = {
                leaf: self.w[name][0] if only else self.w[name]
                for leaf in ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
                if (name := f"{at}sublayers.{k}.{leaf}") in self.w
            }
            inner = part["w1"] @ _norm(h, self.run, part["norm_weight"], part.get("norm_bias")) + part.get("b1", 0)
            h = h + part["w2"] @ _activate(self.run, inner) + part.get("b2", 0)
        return h


def balance_sum(outputs: Sequence[SlowOutput], experts: int) -> Tensor:
    """Eq. 8 over all micro-batches of an update: n_i counts all of their tokens. Summed over layers and tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(len(outputs[0].sigmas)):
        chosen = [best for out in outputs for best in out.choices[layer].values()]
        counts = [sum(best.count(i) for best in chosen) for i in range(experts)]
        mean = sum(counts) / experts
        for out in outputs:
            for token, sigma_K in out.sigmas[layer].items():
                for i, sigma in zip(out.choices[layer][token], sigma_K, strict=True):
                    total = total + (counts[i] - mean) / mean * sigma
    return total


def order(scores: Tensor) -> list[int]:
    """Experts from best to worst, the lower index first on a tie."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _norm(x: Tensor, run: RunConfig, weight: Tensor, bias: Tensor | None) -> Tensor:
    if run.model.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + run.model.norm_epsilon).sqrt() * weight
    return x if bias is None else x + bias


def _activate(run: RunConfig, x: Tensor) -> Tensor:
    if run.model.activation == "swiglu":
        gate, value = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return gate / (1 + torch.exp(-gate)) * value
    if run.model.activation == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x.clamp_min(0)


@dataclass
class SlowStep:
    """What one update saw: mean losses, gradient norm before clipping, tokens by layer and expert."""

    loss: float
    balance: float
    distill: float
    norm: float
    counts_LN: list[list[int]]  # noqa: N815


class SlowTraining:
    """AdamW with decoupled decay of matrices, global-norm clipping and a frozen distilled router in stage 2."""

    def __init__(self, run: RunConfig, weights: Weights, table: Table | None = None) -> None:
        self.run, self.table = run, table
        self.w = {name: value.double().requires_grad_() for name, value in weights.items()}
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.w.items()}
        self.steps = 0

    def update(self, micro_batches: Sequence[Batch], frozen: bool) -> SlowStep:
        """One update from global micro-batches: all ranks' sequences together, one entry an accumulation step."""
        run, model = self.run, SlowModel(self.run, self.w, self.table)
        scored = sum(int(batch.scored.sum()) for batch in micro_batches)
        real = sum(int(batch.real.sum()) for batch in micro_batches)
        outputs = [model(batch, frozen) for batch in micro_batches]
        loss = sum(out.loss_sum for out in outputs) / scored
        balance = balance_sum(outputs, run.moe.experts) / real
        distill = sum(out.distill_sum for out in outputs) / real
        names = [name for name in self.w if not (frozen and ".distilled." in name)]
        total = loss + run.moe.balance_weight * balance + run.moe.distill_weight * distill
        grads = torch.autograd.grad(total, [self.w[name] for name in names], allow_unused=True)
        found = {name: torch.zeros_like(self.w[name]) if g is None else g for name, g in zip(names, grads, strict=True)}
        norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
        self.steps += 1
        for name, gradient in found.items():
            self._adamw(name, gradient * min(1.0, run.optimizer.clip / norm))
        counts = [
            [
                sum(best.count(i) for out in outputs for best in out.choices[layer].values())
                for i in range(run.moe.experts)
            ]
            for layer in range(len(run.moe.layers))
        ]
        return SlowStep(float(loss), float(balance), float(distill), norm, counts)

    @torch.no_grad()
    def _adamw(self, name: str, gradient: Tensor) -> None:
        o, weight = self.run.optimizer, self.w[name]
        first, second = self.moments[name]
        first.mul_(o.betas[0]).add_(gradient * (1 - o.betas[0]))
        second.mul_(o.betas[1]).add_(gradient.square() * (1 - o.betas[1]))
        lr = o.lr * (self.run.moe.distilled.lr_scale if ".distilled." in name else 1.0)
        if is_decayed(name):
            weight -= lr * o.weight_decay * weight
        mean, square = first / (1 - o.betas[0] ** self.steps), second / (1 - o.betas[1] ** self.steps)
        weight -= lr * mean / (square.sqrt() + o.eps)


def is_decayed(name: str) -> bool:
    """Matrices of embeddings, attention, feed-forward layers and experts; never norms, biases or routers."""
    return name.endswith((".weight", ".w1", ".w2")) and "norm" not in name and ".router." not in name
