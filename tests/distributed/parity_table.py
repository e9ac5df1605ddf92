"""Print how far every layout is from one process after 3 updates (2 of stage 1, 1 of stage 2), as Markdown.

python -m tests.distributed.parity_table
"""

from __future__ import annotations

from tests.distributed.cases import run_of, start, three_updates
from tests.distributed.launch import run_distributed
from tests.distributed.worker import Outcome, assemble, train

LAYOUTS = {
    "data 2": (2, {}),
    "expert 2": (2, {"expert": 2}),
    "expert 4": (4, {"expert": 4}),
    "tensor 2 x expert 2, 2 processes": (2, {"tensor": 2, "expert": 2}),
    "tensor 2 x expert 2, 4 processes": (4, {"tensor": 2, "expert": 2}),
    "sequence 2": (2, {"sequence": 2}),
    "sequence 4 x expert 2": (4, {"sequence": 4, "expert": 2}),
    "sequence 2 x tensor 2 x expert 2": (4, {"sequence": 2, "tensor": 2, "expert": 2}),
}


def main() -> None:
    shape = "modern"

    def outcome(world: int, **layout: int) -> list[Outcome]:
        return run_distributed(world, train, run_of(shape, **layout), start(shape), three_updates(1), 2)

    alone = outcome(1, zero=1)
    first, weights = alone[0].steps[-1], assemble([alone[0].end])
    print(f"One process: loss {first['loss']:.7f}, gradient norm {first['norm']:.7f} at the third update.\n")
    print("| layout | ZeRO | loss | gradient norm | largest difference of any parameter |\n|---|---|---|---|---|")
    for name, (world, layout) in LAYOUTS.items():
        for zero in (0, 1, 2, 3):
            ranks = outcome(world, zero=zero, **layout)
            last, end = ranks[0].steps[-1], assemble([rank.end for rank in ranks])
            worst = max(float((end[key] - weights[key]).abs().max()) for key in weights)
            print(f"| {name} | {zero} | {last['loss']:.7f} | {last['norm']:.7f} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    main()
