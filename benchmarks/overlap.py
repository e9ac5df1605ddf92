"""An MoE layer over several ranks in stage 2: what it saves to compute while tokens travel.

Forward and backward of one layer with a shared expert, whose routed experts are spread over the ranks. All variants
take turns. "in turn" waits for every exchange where it begins. "overlapped" is what runs do: the shared expert
computes while tokens travel, and so it is for the gradients in the backward pass. "2 parts" and "4 parts" cut the
tokens into parts, so that one part travels while experts compute on another (parallel.dispatch_parts). Ratios are
relative to "in turn" in the same round, on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.common import markdown, medians, parser, publish, ratios, take_turns, timed
from benchmarks.ranks import on_ranks
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.moe.dispatch import Arriving, return_tokens, send_tokens
from stablemoe_ds.moe.experts import ExpertShape
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.plan import plan_dispatch
from stablemoe_ds.moe.routing_pass import RoutingPass
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.routing.stablemoe import StableMoERouter

EXPERTS = 8
SIZES = [(2048, 256), (4096, 512)]
GPU_SIZES = [(16384, 2048)]


def at_once(carry: Callable[..., Arriving], *args: Any) -> Arriving:
    """Wait for an exchange where it begins."""
    return Arriving(carry(*args).wait())


def build(groups: Groups, width: int, dtype: torch.dtype, parts: int) -> MoELayer:
    torch.manual_seed(0)
    expert = ExpertShape(width, 4 * width, 1, "relu", "layernorm", 1e-5, bias=True)
    router = StableMoERouter(width, EXPERTS, 1, normalize=False)
    layer = MoELayer(router, expert, groups.placement, block=1, index=0, shared=expert, parts=parts)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.set_deepspeed_parallelism()
    return layer.to(groups.world.device, dtype).train()


def contestants(groups: Groups, tokens: int, width: int) -> dict[str, Callable[[], float]]:
    device = groups.world.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(groups.world.rank)
    expert_TK = torch.randint(EXPERTS, (tokens, 1), generator=random).to(device)
    hidden = torch.randn(tokens, 1, width, generator=random).to(device, dtype).requires_grad_()
    view = TokenView(torch.zeros(1, tokens, dtype=torch.int64, device=device), torch.ones(tokens, device=device) > 0)
    outputs: list[torch.Tensor] = []

    def way(parts: int, waiting: bool) -> Callable[[], float]:
        layer = build(groups, width, dtype, parts)
        plans = {layer.block: plan_dispatch(expert_TK, EXPERTS, layer.expert_group, parts)}

        def go() -> torch.Tensor:
            out, _ = layer(hidden, RoutingPass(view, {layer.block: expert_TK}, plans=plans))
            out.sum().backward()
            return out.detach()

        def run() -> float:
            layer.zero_grad(set_to_none=True)
            hidden.grad = None
            dist.barrier()
            if not waiting:
                return timed(go, device)()
            with (
                mock.patch("stablemoe_ds.moe.layer.send_tokens", partial(at_once, send_tokens)),
                mock.patch("stablemoe_ds.moe.layer.return_tokens", partial(at_once, return_tokens)),
            ):
                return timed(go, device)()

        outputs.append(go())
        return run

    found = {"in turn": way(1, True), "overlapped": way(1, False), "2 parts": way(2, False), "4 parts": way(4, False)}
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=2e-2, atol=2e-2)
    return found


def measure(groups: Groups, sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """A row a size."""
    rows = []
    for tokens, width in sizes:
        seconds = take_turns(contestants(groups, tokens, width), rounds)
        row = {"processes": groups.world.size, "tokens": tokens, "hidden_size": width}
        rows.append({**row, "seconds": medians(seconds), "ratio": ratios(seconds, "in turn")})
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["ratio"])
    lines = []
    for row in rows:
        first = [str(row[key]) for key in ("processes", "tokens", "hidden_size")]
        lines.append(
            [*first, f"{1000 * row['seconds']['in turn']:.1f}", *(f"{row['ratio'][n]:.2f}" for n in names[1:])]
        )
    return markdown(["processes", "tokens a rank", "d", "in turn, ms", *names[1:]], lines)


def main() -> None:
    arguments = parser(__doc__, rounds=15).parse_args()
    gpus = torch.cuda.device_count()
    sizes = GPU_SIZES if gpus else SIZES[:1] if arguments.quick else SIZES
    rows = on_ranks(gpus or 2, measure, sizes, arguments.rounds)
    publish(arguments, __doc__, {"rows": rows}, tables(rows))


if __name__ == "__main__":
    main()
