"""Suites of small runs, and the command that trains them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.training.runs import Answer, TinyData, run_file, small_run

PATIENCE = 800
"""Seconds that a suite may take on a machine with much else to do; it needs less than a minute."""
SEEDS = [1, 2]
VARIANTS = {"ours": [], "switch": ["moe.router=switch", "parallel.zero_stage=3"]}
"""One of them under another ZeRO stage, which changes nothing that is compared."""


@dataclass(frozen=True)
class TinySuite:
    """Where a suite is written, and where it goes."""

    file: Path
    output: Path

    def lines(self, label: str, seed: int, kind: str) -> list[dict[str, Any]]:
        """Lines of one kind in the history of a run."""
        text = (self.output / label / f"seed-{seed}" / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    def perplexities(self) -> dict[tuple[str, int], float]:
        """Last validation perplexity of each run of the first suite there is."""
        return {
            (label, seed): self.lines(label, seed, "valid")[-1]["perplexity"] for label in VARIANTS for seed in SEEDS
        }


def tiny_suite(data: TinyData, folder: Path, output: Path | None = None, **changes: Any) -> TinySuite:
    """Two routers and two seeds, 12 updates each. changes: keys of the suite."""
    named = {"tokenizer": data.tokenizer, "test": data.valid}
    run = small_run(data, folder / "unused", data=named, checkpoint={"every": 6, "keep": 9}, optimizer={"lr": 1e-2})
    run_file(run, folder / "base.yaml")
    output = output or folder / "out"
    suite = {"name": "tiny", "run": "base.yaml", "reference": "ours", "seeds": SEEDS, "variants": VARIANTS, **changes}
    (folder / "suite.yaml").write_text(yaml.safe_dump({**suite, "output": str(output)}, sort_keys=False))
    return TinySuite(folder / "suite.yaml", output)


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``stablemoe compare WORDS`` as a person would start it; asked to stop, if need be, and waited for in the end."""
    # Whatever an earlier test has made of this process, that one is no rank of its world.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-m", "stablemoe_ds", "compare", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # not killed, so that it stops its runs
            process.communicate()


def compare(*words: str | Path) -> Answer:
    """Its answer."""
    with started(*words) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return Answer(process.returncode, out, err)
