"""Generation: tokens per second along frozen routes, with and without the key-value cache, compared with a dense model.

Prompts of 32 ids are continued by 64 ids (8 with --quick), in one call of evaluation/generate.py, at batch 1 and 16,
greedily. Without the cache the whole text is read again for each id. That is the reference, and both have to give the
same ids before anything is timed. The dense model has a feed-forward layer of equal FLOPs in place of the experts.
One process, random weights, in fp32; in bf16 on a GPU, wider and deeper, where the cache may change a late id.

On a GPU a second table has the first and a later call at lengths that nothing has been computed at before: with the
kernels of attention that generation allows, and with all of torch's, of which cuDNN's works out a plan for each length.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.common import markdown, medians, parser, publish, ratios, record, take_turns, timed
from benchmarks.contestants import drawn_on
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.source import LEARNED, RouteSource

BATCHES = (1, 16)
PROMPT = 32
PLANNED, LENGTHS = 16, {"without cuDNN": 128, "with cuDNN": 160}
"""New ids of a call of the second table, and the length of its prompt."""
DENSE, CACHED, ANEW = "dense", "stage 2", "stage 2, no cache"


def model_of(router: str, quick: bool, groups: Groups) -> StableMoEGPT:
    """A model with random weights; router dense_deeper with one expert is the dense one of equal FLOPs."""
    on_gpu = groups.world.device.type == "cuda"
    width, layers = (64, 2) if quick else (1024, 12) if on_gpu else (256, 4)
    run = RunConfig.model_validate(
        {
            "model": {
                "layers": layers,
                "hidden_size": width,
                "heads": 4,
                "ffn_hidden_size": 4 * width,
                "vocab_size": 4096,
            },
            "moe": {"router": router, "layers": [layers // 2, layers], "experts": 8 if ROUTERS[router].routed else 1},
            "data": {"sequence_length": 256},
            "optimizer": {"lr": 1e-3},
            "schedule": {"steps": 1, "tokens_per_step": 256},
        }
    )
    model = (
        StableMoEGPT(run, 4096, groups.placement)
        .to(groups.world.device, torch.bfloat16 if on_gpu else torch.float32)
        .eval()
    )
    random = torch.Generator(groups.world.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # experts start as nothing, and a model of nothing repeats itself
                parameter.normal_(std=0.05, generator=random)
    for layer in model.moe_layers:
        layer.set_deepspeed_parallelism()
    return model


def routes_of(model: StableMoEGPT) -> RouteSource:
    """What it follows in stage 2."""
    return freeze(model.distilled_routers, model.run_config.moe.top_k, tuple(model.run_config.moe.layers))


def measure(batch: int, tokens: int, ours: StableMoEGPT, dense: StableMoEGPT, rounds: int) -> dict[str, Any]:
    """Median seconds and tokens a second of each. On a CPU raises AssertionError if the cache changes an id."""
    device = next(ours.parameters()).device
    ids = torch.randint(4096, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    routes = routes_of(ours)
    calls = {
        DENSE: partial(generate, dense, ids, LEARNED, max_new_tokens=tokens),
        CACHED: partial(generate, ours, ids, routes, max_new_tokens=tokens),
        ANEW: partial(generate, ours, ids, routes, max_new_tokens=tokens, use_cache=False),
    }
    if device.type == "cpu" and calls[CACHED]() != calls[ANEW]():  # in bf16 scores are often equal
        raise AssertionError("with the cache the model writes something else than without")
    seconds = take_turns({name: timed(call, device) for name, call in calls.items()}, rounds)
    middle = medians(seconds)
    return {
        "batch": batch,
        "new_tokens": tokens,
        "seconds": middle,
        "tokens_per_second": {name: batch * tokens / took for name, took in middle.items()},
        "ratio_to_dense": ratios(seconds, DENSE),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A row a batch size: tokens/s of all sequences together, and time relative to the dense model."""
    body = []
    for row in rows:
        speeds = [f"{row['tokens_per_second'][name]:,.0f}" for name in (DENSE, CACHED, ANEW)]
        body.append([str(row["batch"]), *speeds, *(f"{row['ratio_to_dense'][name]:.2f}" for name in (CACHED, ANEW))])
    head = ["batch", *(f"{name}, tokens/s" for name in (DENSE, CACHED, ANEW))]
    return markdown([*head, f"{CACHED} / dense", f"{ANEW} / dense"], body)


def measure_plans(model: StableMoEGPT) -> dict[str, dict[str, float]]:
    """Milliseconds an id, in the first call and in the next, by what attention may use."""
    found, device = {}, next(model.parameters()).device
    for name, length in LENGTHS.items():
        ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(1)).tolist()
        call = timed(partial(generate, model, ids, routes_of(model), max_new_tokens=PLANNED), device)
        allowed = mock.patch("stablemoe_ds.model.attention.kernels_for", return_value=nullcontext())
        with allowed if name == "with cuDNN" else nullcontext():
            found[name] = {which: 1000 * call() / PLANNED for which in ("first", "next")}
    return found


def table_of_plans(plans: dict[str, dict[str, float]]) -> str:
    body = [[name, f"{ms['first']:.1f}", f"{ms['next']:.1f}"] for name, ms in plans.items()]
    return "\n\n" + markdown(["attention", "first call, ms an id", "next call, ms an id"], body) if plans else ""


def main() -> None:
    arguments = parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(1)
    groups = Groups(start_world(), tensor=1, expert=1)
    tokens = 8 if arguments.quick else 64
    with drawn_on(groups.world.device):
        ours, dense = (model_of(router, arguments.quick, groups) for router in ("stablemoe", "dense_deeper"))
    found: dict[str, Any] = {"rows": [], "plans": {}}
    for batch in BATCHES:
        found["rows"].append(measure(batch, tokens, ours, dense, arguments.rounds))
        record(arguments, __doc__, found, table(found["rows"]))
    if groups.world.device.type == "cuda":
        found["plans"] = measure_plans(ours)
    publish(arguments, __doc__, found, table(found["rows"]) + table_of_plans(found["plans"]))
    stop_world()


if __name__ == "__main__":
    main()
