"""Start-up: seconds until ``stablemoe --help`` has answered, and from ``stablemoe train`` to the first update.

Whole processes are started one after the other. For comparison, an interpreter that does nothing and, unless --quick,
one that only imports what every training needs: torch, DeepSpeed and megatron-core's GPT. The first update counts as
done when its line is in metrics.jsonl. The model is tiny, so that the start is what is measured. The goal for
``--help`` is 0.5 s.

Import times are those of ``python -X importtime``, added up by top-level package: seconds spent in a package's own
modules, slightly increased by the measurement itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import clock, markdown, medians, parser, publish, take_turns, timed
from benchmarks.corpus import library_text, make_corpus

STABLEMOE = ["-m", "stablemoe_ds"]
LIBRARIES = "import torch, deepspeed; from megatron.core.models.gpt import GPTModel"
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\w+)")
LONGEST = 8
"""Packages named."""
PATIENCE = 300.0
"""Seconds after which a training that has not begun is given up."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with these arguments, to its end. Raises CalledProcessError if it fails."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def write_run(folder: Path) -> Path:
    """A configuration that trains a tiny model in two stages on real text; returns its path."""
    corpus = make_corpus(folder, library_text(100_000), 400)
    settings = {
        "name": "startup",
        "run_dir": str(folder / "run"),
        "model": {"layers": 2, "hidden_size": 32, "heads": 2, "ffn_hidden_size": 64},
        "moe": {"layers": [1], "experts": 4},
        "data": {"tokenizer": corpus.tokenizer, "train": corpus.prefix, "sequence_length": 32},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 100, "tokens_per_step": 64},
        "stages": {"at_step": 50},
        "checkpoint": {"resume": False},
        "logging": {"every": 1, "tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def first_update(configuration: Path) -> float:
    """Seconds from the start of ``stablemoe train`` to its first update. Raises RuntimeError if none comes."""
    metrics = configuration.parent / "run" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, *STABLEMOE, "train", str(configuration)]
    began = clock()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
            if process.poll() or clock() - began > PATIENCE:
                process.kill()
                raise RuntimeError(f"no update within {clock() - began:.0f} s: {process.communicate()[1][-2000:]}")
            time.sleep(0.005)
        seconds = clock() - began
        process.terminate()
        process.communicate()
    return seconds


def by_package(*arguments: str) -> dict[str, float]:
    """Seconds of imports in a Python process with these arguments, by top-level package, the longest first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for own, package in IMPORT.findall(run("-X", "importtime", *arguments).stderr):
        seconds[package] += int(own) / 1e6
    longest = sorted(seconds.items(), key=lambda item: item[1], reverse=True)[:LONGEST]
    return {**dict(longest), "all": sum(seconds.values())}


def measure(folder: Path, rounds: int, quick: bool) -> dict[str, Any]:
    """Median and fastest seconds of each process, and where its imports spend them."""
    configuration = write_run(folder)
    contestants: dict[str, Callable[[], float]] = {
        "python": timed(lambda: run("-c", "")),
        "stablemoe --help": timed(lambda: run(*STABLEMOE, "--help")),
        "stablemoe train": lambda: first_update(configuration),
    }
    if not quick:
        contestants["libraries"] = timed(lambda: run("-c", LIBRARIES))
    seconds = take_turns(contestants, rounds, warm_up=0 if quick else 1)
    imports = {"stablemoe --help": by_package(*STABLEMOE, "--help")}
    if not quick:
        short = ["schedule.steps=2", "stages.at_step=1"]
        imports["stablemoe train"] = by_package(*STABLEMOE, "train", str(configuration), *short)
    return {"seconds": medians(seconds), "fastest": {name: min(s) for name, s in seconds.items()}, "imports": imports}


def tables(result: dict[str, Any]) -> str:
    times = [[name, f"{took:.2f}", f"{result['fastest'][name]:.2f}"] for name, took in result["seconds"].items()]
    shares = [
        [command, ", ".join(f"{package} {took:.2f}" for package, took in packages.items())]
        for command, packages in result["imports"].items()
    ]
    return markdown(["process", "s", "fastest, s"], times) + "\n\n" + markdown(["process", "imports, s"], shares)


def main() -> None:
    arguments = parser(__doc__, rounds=5).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.rounds, arguments.quick)
    publish(arguments, __doc__, result, tables(result))


if __name__ == "__main__":
    main()
