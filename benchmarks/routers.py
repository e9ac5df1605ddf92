"""Routers, tables and gates on the same real text: perplexity against tokens read and against seconds.

Every recipe trains the same backbone in its own process, through ``stablemoe train``, for the same number of tokens.
The text comes in a folder of ``benchmarks.carry``; without one it is Python's standard library, which is small.
Perplexity is measured on the same validation text throughout, along the routes that the model follows at that moment.
Tables are built from the training text before the first update. Seconds are those of the updates alone, and
comparable only if a run has the device to itself. A run that is cut off at its time limit keeps the points it has
reached.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, parser, publish, record
from benchmarks.corpus import Corpus, library_text, make_corpus
from stablemoe_ds.run_directory.metrics import MetricsLog

STABLEMOE = ["moe.router=stablemoe", "stages.at_fraction=0.1", "moe.distilled.lr_scale=10"]
RECIPES: dict[str, list[str]] = {
    "stablemoe": STABLEMOE,
    "stablemoe, balance 0.03": [*STABLEMOE, "moe.balance_weight=0.03"],
    "stablemoe, gate from 1": [*STABLEMOE, "moe.gate=doubled"],
    "hash": ["moe.router=hash"],
    "hash, gate sigmoid": ["moe.router=hash", "moe.gate=sigmoid"],
    "cooccurrence": ["moe.router=table", "moe.table=cooccurrence"],
    "cooccurrence, gate sigmoid": ["moe.router=table", "moe.table=cooccurrence", "moe.gate=sigmoid"],
    "switch": ["moe.router=switch"],
    "switch, balance 0.1": ["moe.router=switch", "moe.balance_weight=0.1"],
    "dense": ["moe.router=dense_deeper", "moe.experts=1"],
}
"""Settings of each recipe, by name. The balance losses have the weights of their papers, or those that did best in
``benchmarks/results/routers``."""
POINTS = 8
"""Validations in a run."""


def unpacked(carried: Path, folder: Path) -> tuple[Corpus, Corpus]:
    """Training and validation text of a folder that ``benchmarks.carry`` has made."""
    for packed in carried.glob("*.xz"):
        with lzma.open(packed) as source, (folder / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    tokenizer = str(shutil.copy(carried / "tokenizer.model", folder))
    return Corpus(tokenizer, str(folder / "train")), Corpus(tokenizer, str(folder / "valid"))


def settings_of(run_dir: Path, seed: int, train: Corpus, valid: Corpus, tokens: int, quick: bool) -> dict[str, Any]:
    """A run: width 512, 8 blocks, 32 experts behind the fourth, or a tiny one."""
    width, layers, experts, length, step = (64, 2, 4, 64, 512) if quick else (512, 8, 32, 512, 16_384)
    steps = max(2 * POINTS, tokens // step)
    return {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "seed": seed,
        "model": {"layers": layers, "hidden_size": width, "heads": width // 64, "ffn_hidden_size": 4 * width},
        "moe": {"layers": [layers // 2], "experts": experts},
        "data": {"tokenizer": train.tokenizer, "train": train.prefix, "valid": valid.prefix, "sequence_length": length},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.98]},
        "schedule": {"steps": steps, "tokens_per_step": step, "warmup_steps": steps // 20, "min_lr_ratio": 0.1},
        "parallel": {"micro_batch": step // length},
        "precision": {"dtype": "bf16" if torch.cuda.is_available() else "fp32"},
        "checkpoint": {"resume": False, "every": steps, "keep": 1},
        "logging": {
            "every": max(1, steps // (4 * POINTS)),
            "probe_every": steps,
            "eval_every": max(1, steps // POINTS),
            "eval_tokens": 4 * step,
            "tensorboard": False,
        },
    }


def train(settings: dict[str, Any], options: list[str], seconds: float) -> str | None:
    """Train a run, no longer than this; returns what went wrong, if anything did."""
    path = Path(f"{settings['run_dir']}.yaml")
    path.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "stablemoe_ds", "train", str(path), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]


def points_of(run_dir: Path, tokens_per_step: int) -> list[dict[str, float]]:
    """Tokens read, seconds of training and perplexity at each validation, and whether it was of the whole text."""
    points, seconds, before = [], 0.0, 0
    lines = MetricsLog(run_dir / "metrics.jsonl").read()
    most = max((line["tokens"] for line in lines if line["kind"] == "valid"), default=0)
    for line in lines:
        if line["kind"] == "train":
            seconds += (line["step"] - before) * tokens_per_step / line["tokens_per_second"]
            before = line["step"]
        elif line["kind"] == "valid":
            tokens = line["step"] * tokens_per_step
            whole = line["tokens"] == most
            points.append({"tokens": tokens, "seconds": seconds, "perplexity": line["perplexity"], "whole": whole})
    return points


def tables(rows: list[dict[str, Any]]) -> str:
    """A row a validation of each run."""
    lines = [
        [row["recipe"], str(row["seed"]), f"{p['tokens'] / 1e6:.1f}", f"{p['seconds']:.0f}", f"{p['perplexity']:.2f}"]
        for row in rows
        for p in row["points"]
    ]
    failed = [f"{row['recipe']}, seed {row['seed']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n\n".join([markdown(["recipe", "seed", "million tokens", "seconds", "perplexity"], lines), *failed])


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--data", type=Path, help="folder made by benchmarks.carry")
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    options.add_argument("--seeds", type=int, nargs="+", default=[1])
    options.add_argument("--together", type=int, default=1, help="runs that share the device (default 1)")
    options.add_argument("--tokens", type=float, default=20e6, help="of each run (default 20e6)")
    options.add_argument("--seconds", type=float, default=120, help="at most, for each run (default 120)")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = compare(arguments, Path(name))
    publish(arguments, __doc__, found, tables(found["rows"]))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train every recipe from every seed; what is known is written down whenever a run ends."""
    if arguments.data:
        train_text, valid_text = unpacked(arguments.data, folder)
    else:
        train_text = valid_text = make_corpus(folder, library_text(30_000 if arguments.quick else 200_000), 512)
    tokens = 8192 if arguments.quick else int(arguments.tokens)
    found: dict[str, Any] = {"together": arguments.together, "rows": []}

    def run(recipe: str, seed: int) -> dict[str, Any]:
        run_dir = folder / f"{list(RECIPES).index(recipe)}-{seed}"
        settings = settings_of(run_dir, seed, train_text, valid_text, tokens, arguments.quick)
        failed = train(settings, [*RECIPES[recipe], *arguments.set], arguments.seconds)
        points = points_of(run_dir, settings["schedule"]["tokens_per_step"])
        return {"recipe": recipe, "seed": seed, "points": points, "failed": failed}

    with ThreadPoolExecutor(arguments.together) as pool:
        runs = [pool.submit(run, recipe, seed) for seed in arguments.seeds for recipe in arguments.recipes]
        for done in as_completed(runs):
            found["rows"].append(done.result())
            record(arguments, __doc__, found, tables(found["rows"]))
    return found


if __name__ == "__main__":
    main()
