"""The MoE layer against the dense layer of equal FLOPs and against DeepSpeed's own, forward and backward.

    python -m benchmarks.moe_layer [--quick] [--json] [--output FILE]

All layers of a shape run in turn, round after round, in one process; what is reported is the median over rounds of
each layer's time divided by the dense layer's time in the same round, so that a machine whose speed drifts does not
decide the comparison. Before a shape is timed, our layer is checked against each token's expert computed by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablemoe_ds.libraries import settle_libraries

settle_libraries()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from stablemoe_ds.moe.experts import Experts, ExpertShape  # noqa: E402
from stablemoe_ds.moe.layer import LayerPlacement, MoELayer  # noqa: E402
from stablemoe_ds.moe.plan import plan_dispatch  # noqa: E402
from stablemoe_ds.routing.distilled import DistilledRouter  # noqa: E402
from stablemoe_ds.routing.routes import RoutingPass, TokenView  # noqa: E402
from stablemoe_ds.routing.stablemoe import StableMoERouter  # noqa: E402
from stablemoe_ds.training.groups import Groups, start_world, stop_world  # noqa: E402

VOCAB = 8192


@dataclass(frozen=True)
class Shape:
    """tokens T, width d, inner width f, experts N; load: uniform, or skewed as Zipf's law has token ids."""

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    experts: int
    load: str
    dtype: str

    @property
    def name(self) -> str:
        return f"T={self.tokens} d={self.hidden_size} N={self.experts} {self.load} {self.dtype}"


SHAPES = [
    Shape(tokens, d, 4 * d, experts, load, dtype)
    for tokens, d in ((4096, 256), (4096, 512), (8192, 256))
    for experts in (8, 32)
    for load in ("uniform", "skewed")
    for dtype in ("fp32", "bf16")
]
QUICK = [shape for shape in SHAPES if shape.tokens == 4096 and shape.hidden_size == 256 and shape.experts == 8]


class Ffn(nn.Module):
    """W2 relu(W1 LN(x)): what DeepSpeed's layer is given as an expert, and the dense bound."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.up = nn.Linear(shape.hidden_size, shape.ffn_hidden_size)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


def routes_of(shape: Shape, ids: Tensor) -> Tensor:
    """int64 [T, 1]: an id's expert; uniform spreads positions evenly whatever the id."""
    if shape.load == "uniform":
        order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(3))
        return (order % shape.experts)[:, None]
    table = torch.randint(shape.experts, (VOCAB,), generator=torch.Generator().manual_seed(4))
    return table[ids.flatten()][:, None]


def build_ours(shape: Shape, dtype: torch.dtype) -> MoELayer:
    """Our layer in one process, its second weights drawn so that experts differ and do something."""
    distilled = DistilledRouter("word", VOCAB, shape.experts, dim=50, layers=1, width=1, heads=1, positions=1)
    router = StableMoERouter(shape.hidden_size, shape.experts, 1, normalize=False, distilled=distilled)
    kind = ExpertShape(shape.hidden_size, shape.ffn_hidden_size, 1, "relu", "layernorm", 1e-5, bias=True)
    layer = MoELayer(router, kind, LayerPlacement(1, 0, None, lambda counts: counts), block=1, index=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return layer.to(dtype).train()


def check(layer: MoELayer, hidden: Tensor, expert_T: Tensor, out: Tensor) -> None:
    """Raise unless a few tokens' outputs are h + gate * expert(h), computed token by token in fp32."""
    experts: Experts = layer.experts
    sub = experts.sublayers[0]
    for t in range(0, hidden.shape[0], hidden.shape[0] // 8):
        h, e = hidden[t, 0].float(), int(expert_T[t])
        gate = torch.sigmoid(layer.router.centroids[e] @ h)
        inner = F.layer_norm(h, h.shape) * sub.norm_weight[e].float() + sub.norm_bias[e].float()
        inner = F.relu(sub.w1[e].float() @ inner + sub.b1[e].float())
        wanted = h + gate * (sub.w2[e].float() @ inner + sub.b2[e].float())
        error = (out[t, 0].float() - wanted).norm() / wanted.norm()
        if not error < 2e-2:
            raise AssertionError(f"token {t}: relative error {error:.3g}")


def contestants(shape: Shape) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from hidden states [T, 1, d] to an output of the same shape, by name; 'dense' is the bound."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[shape.dtype]
    torch.manual_seed(0)
    rank = torch.arange(1, VOCAB + 1).float()
    ids = torch.multinomial(1 / rank, shape.tokens, replacement=True, generator=torch.Generator().manual_seed(1))[None]
    expert_TK = routes_of(shape, ids)
    tokens = TokenView(ids, torch.ones(shape.tokens, dtype=torch.bool))
    ours, dense = build_ours(shape, dtype), Ffn(shape).to(dtype)
    plan = plan_dispatch(expert_TK, shape.experts, None)
    peers = {
        "deepspeed dropless": MoE(shape.hidden_size, Ffn(shape), shape.experts, drop_tokens=False, use_rts=False),
        "deepspeed capacity 2": MoE(shape.hidden_size, Ffn(shape), shape.experts, capacity_factor=2.0),
    }
    for peer in peers.values():
        peer.set_deepspeed_parallelism()
        peer.to(dtype).train()
        peer.deepspeed_moe.gate.wg.float()

    def stage1(hidden: Tensor) -> Tensor:
        out, report = ours(hidden, RoutingPass(tokens, None))
        return out + sum(report.loss_sums.values()).to(out.dtype) / shape.tokens  # type: ignore[union-attr]

    def stage2(hidden: Tensor) -> Tensor:
        return ours(hidden, RoutingPass(tokens, expert_TK[None], plans=[plan]))[0]

    def peer_of(layer: MoE) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            out, auxiliary, _ = layer(hidden)
            return hidden + out + auxiliary.to(out.dtype)

        return run

    hidden = sample(shape)
    check(ours, hidden, expert_TK[:, 0], stage2(hidden))
    named = {"dense": lambda hidden: hidden + dense(hidden), "stage 2": stage2, "stage 1": stage1}
    return {**named, **{name: peer_of(layer) for name, layer in peers.items()}}


def sample(shape: Shape) -> Tensor:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[shape.dtype]
    hidden = torch.randn(shape.tokens, 1, shape.hidden_size, generator=torch.Generator().manual_seed(2))
    return hidden.to(dtype).requires_grad_()


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Median seconds, and median ratio to the dense layer of the same round, of each contestant."""
    functions, hidden = contestants(shape), sample(shape)
    weight = torch.randn_like(hidden)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            (function(hidden) * weight).sum().backward()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    ratios = {n: [a / b for a, b in zip(values, seconds["dense"], strict=True)] for n, values in seconds.items()}
    return {
        "shape": vars(shape),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_dense": {name: statistics.median(values) for name, values in ratios.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a shape, time relative to the dense layer of equal FLOPs."""
    names = [name for name in rows[0]["ratio_to_dense"] if name != "dense"]
    lines = ["| shape | dense, ms | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        ratios = " | ".join(f"{row['ratio_to_dense'][name]:.2f}" for name in names)
        lines.append(f"| {Shape(**row['shape']).name} | {1000 * row['seconds']['dense']:.0f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Groups(start_world(), tensor=1, expert=1)
    rows = []
    for shape in QUICK if arguments.quick else SHAPES:
        rows.append(measure(shape, arguments.rounds))
        if not arguments.json:
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if arguments.json else "\n" + table(rows))
    stop_world()


if __name__ == "__main__":
    main()
