"""What the benchmarks share: the command line, contestants that take turns, and how a result is written down."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stablemoe_ds.distributed.libraries import settle_libraries

settle_libraries()  # here, since every benchmark imports this file before it imports DeepSpeed

Seconds = dict[str, list[float]]
"""By contestant, one entry a round."""


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The command line that all benchmarks have. doc: of the module. rounds: how many unless told."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="the smallest sizes only")
    found.add_argument("--json", action="store_true", help="print JSON instead of tables")
    found.add_argument("--output", type=Path, help="write the JSON to this file, and the tables next to it as .md")
    found.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default %(default)s)")
    return found


def clock(device: torch.device | None = None) -> float:
    """Seconds, read when the device has done all it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(action: Callable[[], object], device: torch.device | None = None) -> Callable[[], float]:
    """A contestant that does this and returns how many seconds it took."""

    def run() -> float:
        began = clock(device)
        action()
        return clock(device) - began

    return run


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Seconds:
    """Call all contestants in turn, round after round, so that a machine whose speed drifts is the same to all.

    Each returns the seconds that count. The first ``warm_up`` rounds, in which caches fill, are thrown away.
    """
    seconds: Seconds = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, contestant in contestants.items():
            took = contestant()
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """The median of each contestant."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Seconds, to: str) -> dict[str, float]:
    """Median over rounds of each contestant's time over that of ``to`` in the same round."""
    pairs = {name: zip(values, seconds[to], strict=True) for name, values in seconds.items()}
    return {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def publish(arguments: argparse.Namespace, doc: str | None, result: dict[str, Any], tables: str) -> None:
    """Print the result, and :func:`record` it."""
    result = record(arguments, doc, result, tables)
    print(json.dumps(result) if arguments.json else tables, flush=True)


def record(arguments: argparse.Namespace, doc: str | None, result: dict[str, Any], tables: str) -> dict[str, Any]:
    """Write what is known so far to ``--output`` as JSON and as Markdown, so that a benchmark may be cut off.

    doc: of the module: a title, and paragraphs that say what the tables show. Returns what was written.
    """
    result = {"machine": machine(), "rounds": arguments.rounds, "quick": arguments.quick, **result}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(_page(arguments, inspect.cleandoc(doc or ""), result, tables))
    return result


def _page(arguments: argparse.Namespace, doc: str, result: dict[str, Any], tables: str) -> str:
    title, *text = doc.split("\n\n")
    module = sys.modules["__main__"].__spec__
    command = f"    python -m {module.name if module else ''}{_options(arguments)}"
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    paragraphs = [f"# {title.rstrip('.')}", command, *text, f"Measured on: {facts}."]
    return "\n\n".join([*paragraphs, tables]) + "\n"


def _options(arguments: argparse.Namespace) -> str:
    """What decides the figures, as it is typed; paths, which are of one machine, are left out."""
    typed = ""
    for name, value in vars(arguments).items():
        if name == "json" or not value or isinstance(value, Path):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        typed += "".join([f" --{name}", *(f" {shlex.quote(str(part))}" for part in values)])
    return typed
