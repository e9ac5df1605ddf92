"""The MoE layer, forward and backward, relative to the dense layer of equal FLOPs.

Top-1, one process, with one thread on a CPU. The layers take turns, round after round. A figure is the median over
rounds of a layer's time divided by the dense layer's time in the same round. Before a shape is timed, our layer's
output is compared with each token's expert computed alone. In stage 2 the dispatch is planned beforehand, as in
training.

Our layer follows given routes in stage 2, either uniform or as skewed as Zipf's law makes token ids, and routes by
itself in stage 1. The others route by their own gates, whose load on these random states is about uniform. BASE is
one rank of its own layout, with one expert per rank and without the exchange. DeepSpeed's einsum path needs masks of
[tokens, experts, capacity] and is left out where they are large. A layer that fails has an empty column; the reason
is below the tables.

On a GPU, stage 2 also runs in plain torch, without Triton's kernels; compiled whole (parallel.compile), in the first
two sizes; and as CUDA graphs, one of the forward and one of the backward pass, which the host starts with a single
call each. So does the dense layer. The graphs are captured with other routes than they are timed with: each call copies
hidden states, routes and plan to where the graphs read them, as a training step would have to.

The bound is the dense layer's time plus the time to read the other experts' weights in both passes and to write their
gradients, at the rate of a large copy. Any layer with that many experts has to do this if its weights are not cached.

Peak memory is what forward and backward need in addition to weights and their gradients, relative to the dense layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import markdown, medians, parser, publish, ratios, record, take_turns, timed
from benchmarks.graphed import GraphedLayer, GraphedStage
from benchmarks.memory import peak_bytes
from benchmarks.our_layer import VOCAB, Ours, PlainStage, Stage
from benchmarks.peers import BaseStyleLayer, DeepSpeedLayer, EinsumLayer, Ffn, MegatronLayer, Residual, Shape
from benchmarks.rates import copy_rate
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from stablemoe_ds.routing.routes import TokenView

CPU_SIZES = [
    (2048, 256, 8),
    (4096, 256, 8),
    (4096, 256, 32),
    (4096, 512, 8),
    (4096, 1024, 8),
    (8192, 256, 32),
    (8192, 256, 128),
    (16384, 256, 8),
    (16384, 256, 64),
]
GPU_SIZES = [(16384, 2048, 8), (8192, 1024, 16), (16384, 1024, 64), (32768, 2048, 16)]
EINSUM_TOKENS = 4096
COMPILED_ROWS = 4
"""Two sizes, with two loads each; every size is compiled by itself, which takes a while."""
WARM_UP = 2
"""Rounds until the allocators have all memory that they are going to need."""


def shapes(quick: bool, on_gpu: bool) -> list[Shape]:
    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    dtypes = ("bf16",) if on_gpu else ("fp32", "bf16")
    if quick:
        sizes = sizes[1:2]
    return [Shape(t, d, 4 * d, n, load, k) for t, d, n in sizes for load in ("uniform", "skewed") for k in dtypes]


def routes_of(shape: Shape, ids: Tensor) -> Tensor:
    """int64 [T, 1]: an id's expert; uniform spreads positions evenly whatever the id."""
    if shape.load == "uniform":
        order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(3))
        return (order % shape.experts)[:, None]
    table = torch.randint(shape.experts, (VOCAB,), generator=torch.Generator().manual_seed(4))
    return table[ids.flatten()][:, None]


def contestants(shape: Shape, device: torch.device, compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    """Makers of layers of hidden states [T, 1, d] by name, the most telling first; 'dense' is the bound."""
    torch.manual_seed(0)
    rank = torch.arange(1, VOCAB + 1).float()
    ids = torch.multinomial(1 / rank, shape.tokens, replacement=True, generator=torch.Generator().manual_seed(1))[None]
    expert_TK = routes_of(shape, ids).to(device)
    tokens = TokenView(ids.to(device), torch.ones(shape.tokens, dtype=torch.bool, device=device))
    ours = cache(partial(Ours, shape))
    found: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: Residual(Ffn(shape).to(shape.torch_dtype)),
        "stage 2": lambda: checked(Stage(ours(), tokens, expert_TK), shape, device),
        "stage 1": lambda: Stage(ours(), tokens, None),
        "BASE": lambda: BaseStyleLayer(shape),
        "megatron allgather": lambda: MegatronLayer(shape, "allgather"),
        "megatron alltoall": lambda: MegatronLayer(shape, "alltoall"),
        "deepspeed dropless": lambda: DeepSpeedLayer(shape, drop_tokens=False),
        "deepspeed capacity 2": lambda: DeepSpeedLayer(shape, capacity_factor=2.0),
    }
    if shape.tokens <= EINSUM_TOKENS and shape.hidden_size <= 512:
        found["deepspeed einsum"] = lambda: EinsumLayer(shape, drop_tokens=False)
    if device.type != "cuda":
        return found
    found["stage 2, plain torch"] = lambda: PlainStage(ours(), tokens, expert_TK)

    def as_graphs(compiled: bool) -> nn.Module:
        stage = Stage(Ours(shape, compiled=True) if compiled else ours(), tokens, expert_TK)
        return checked(GraphedStage(stage, sample(shape, device)), shape, device)

    if compiled:
        found["stage 2, compiled"] = lambda: checked(
            Stage(Ours(shape, compiled=True), tokens, expert_TK), shape, device
        )
    # The last ones, since a capture that fails may leave the device in a state that others fail in.
    found["dense, CUDA graphs"] = lambda: GraphedLayer(found["dense"](), sample(shape, device))
    found["stage 2, CUDA graphs"] = partial(as_graphs, False)
    if compiled:
        found["stage 2, compiled, CUDA graphs"] = partial(as_graphs, True)
    return found


def checked(layer: Stage | GraphedStage, shape: Shape, device: torch.device) -> nn.Module:
    """A layer whose outputs were held against each token's expert computed by itself. Raises AssertionError."""
    hidden, stage = sample(shape, device), layer if isinstance(layer, Stage) else layer.stage
    assert stage.expert_TK is not None
    stage.ours.check(hidden, stage.expert_TK[:, 0], layer.to(device)(hidden))
    return layer


def working(
    makers: dict[str, Callable[[], nn.Module]], device: torch.device, step: Callable[[nn.Module], None]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that were made and have made a step, and of the others why they have not. Raises what "dense" raises."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        try:
            with device:  # start values are drawn there: on one CPU thread those of large layers take a minute
                layer = make()
            layer = layer.to(device).train()
            step(layer)
        except Exception as error:
            if name == "dense":
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            print(f"{name}: {reasons[name]}", file=sys.stderr, flush=True)
            continue
        layers[name] = layer
        layer.zero_grad(set_to_none=True)
    return layers, reasons


def sample(shape: Shape, device: torch.device) -> Tensor:
    hidden = torch.randn(shape.tokens, 1, shape.hidden_size, generator=torch.Generator().manual_seed(2), device="cpu")
    return hidden.to(device, shape.torch_dtype).requires_grad_()


def weight_bytes(shape: Shape) -> int:
    """What experts beyond the first cannot but move: weights read twice, gradients written."""
    weights = 2 * shape.hidden_size * shape.ffn_hidden_size * (shape.experts - 1)
    return 3 * weights * shape.torch_dtype.itemsize


def measure(
    shape: Shape,
    rounds: int,
    device: torch.device,
    bytes_per_second: float,
    compiled: bool,
    chosen: Collection[str] | None = None,
) -> dict[str, Any]:
    """Median seconds, median ratio to the dense layer of the same round, and peak memory, of each contestant.

    bytes_per_second: of a copy, for the bound. compiled: whether stage 2 is compiled, too. chosen: names of
    contestants besides "dense"; None: all.
    """
    torch.compiler.reset()  # of another shape nothing is taken over: sizes would be variables of the compiled code
    hidden = sample(shape, device)
    weight = torch.randn_like(hidden)

    def step(layer: nn.Module) -> None:
        (layer(hidden) * weight).sum().backward()

    def turn(layer: nn.Module) -> float:
        took = timed(partial(step, layer), device)()
        layer.zero_grad(set_to_none=True)  # gradients of all layers at once may not fit
        hidden.grad = None
        return took

    makers = contestants(shape, device, compiled)
    makers = {name: make for name, make in makers.items() if chosen is None or name in {"dense", *chosen}}
    layers, reasons = working(makers, device, step)
    seconds = take_turns({name: partial(turn, layer) for name, layer in layers.items()}, rounds, WARM_UP)
    memory = {}
    for name, layer in layers.items():
        if isinstance(layer, GraphedLayer):
            continue  # its memory is set aside when it is captured
        memory[name] = peak_bytes(partial(step, layer), [*layer.parameters(), hidden], device)
        layer.zero_grad(set_to_none=True)
    return {
        "shape": vars(shape),
        "seconds": medians(seconds),
        "ratio_to_dense": ratios(seconds, "dense"),
        "bound_to_dense": 1 + weight_bytes(shape) / bytes_per_second / medians(seconds)["dense"],
        "peak_bytes": memory,
        "peak_to_dense": {name: size / memory["dense"] for name, size in memory.items()},
        "failed": reasons,
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Time, then memory, relative to the dense layer; a row a shape. What failed has no figure, but a reason below."""
    every = [name for row in rows for name in (*row["ratio_to_dense"], *row["failed"])]
    names = [name for name in dict.fromkeys(every) if name != "dense"]
    head = ["T", "d", "N", "load", "dtype"]

    def lines(key: str, facts: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
        found = []
        for row in rows:
            shape = [str(row["shape"][k]) for k in ("tokens", "hidden_size", "experts", "load", "dtype")]
            found.append([*shape, *facts(row), *(f"{row[key][n]:.2f}" if n in row[key] else "" for n in names)])
        return found

    time = lines("ratio_to_dense", lambda r: [f"{1000 * r['seconds']['dense']:.1f}", f"{r['bound_to_dense']:.2f}"])
    memory = lines("peak_to_dense", lambda r: [f"{r['peak_bytes']['dense'] / 2**20:.0f}"])
    parts = ["Time:", markdown([*head, "dense, ms", "bound", *names], time)]
    parts += ["Peak memory:", markdown([*head, "dense, MiB", *names], memory)]
    reasons = {name: reason for row in rows for name, reason in row["failed"].items()}
    parts += [f"{name} failed: {reason}" for name, reason in reasons.items()]
    return "\n\n".join(parts)


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument(
        "--layers", nargs="+", metavar="NAME", help="columns of the tables, besides dense; default: all"
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)
    world = start_world()
    Groups(world, tensor=1, expert=1)
    rows: list[dict[str, Any]] = []
    rate, on_gpu = copy_rate(world.device), world.device.type == "cuda"
    for shape in shapes(arguments.quick, on_gpu):
        compiled = on_gpu and shape.load == "uniform" and len(rows) < COMPILED_ROWS
        rows.append(measure(shape, arguments.rounds, world.device, rate, compiled, arguments.layers))
        print(tables(rows[-1:]).splitlines()[4], file=sys.stderr, flush=True)
        record(arguments, __doc__, {"rows": rows}, tables(rows))
    publish(arguments, __doc__, {"rows": rows}, tables(rows))
    stop_world()


if __name__ == "__main__":
    main()
