"""Routers on the same real text: perplexity against tokens read and against seconds.

Every recipe trains the same backbone in a process of its own, through ``stablemoe train``, for as many tokens, on text
that comes as a folder of ``benchmarks.carry``; without one, on Python's standard library, which is small. Perplexity is
of the same validation text throughout, along the routes of the moment. Seconds are those of the updates alone. A run
that is cut off at its limit has the points it came to.
"""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, parser, publish, record
from benchmarks.corpus import Corpus, library_text, make_corpus
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.run_directory.metrics import MetricsLog

RECIPES: dict[str, list[str]] = {
    "hash": ["moe.router=hash"],
    "stablemoe": ["moe.router=stablemoe", "stages.at_fraction=0.1", "moe.distilled.lr_scale=10"],
    "table": ["moe.router=table"],
}
"""Settings of each recipe, by name; one whose router does not exist is left out."""
POINTS = 8
"""Validations in a run."""


def unpacked(carried: Path, folder: Path) -> tuple[Corpus, Corpus]:
    """Training and validation text of a folder that ``benchmarks.carry`` has made."""
    for packed in carried.glob("*.xz"):
        with lzma.open(packed) as source, (folder / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    tokenizer = str(shutil.copy(carried / "tokenizer.model", folder))
    return Corpus(tokenizer, str(folder / "train")), Corpus(tokenizer, str(folder / "valid"))


def settings_of(name: str, train: Corpus, valid: Corpus, folder: Path, tokens: int, quick: bool) -> dict[str, Any]:
    """A run of one recipe: width 512, 8 blocks, 32 experts behind the fourth, or a tiny one."""
    width, layers, experts, length, step = (64, 2, 4, 64, 512) if quick else (512, 8, 32, 512, 65_536)
    steps = max(2 * POINTS, tokens // step)
    return {
        "name": name,
        "run_dir": str(folder / name),
        "model": {"layers": layers, "hidden_size": width, "heads": width // 64, "ffn_hidden_size": 4 * width},
        "moe": {"layers": [layers // 2], "experts": experts},
        "data": {"tokenizer": train.tokenizer, "train": train.prefix, "valid": valid.prefix, "sequence_length": length},
        "optimizer": {"lr": 6e-4},
        "schedule": {"steps": steps, "tokens_per_step": step, "warmup_steps": steps // 20, "min_lr_ratio": 0.1},
        "precision": {"dtype": "bf16" if torch.cuda.is_available() else "fp32"},
        "checkpoint": {"resume": False, "every": steps, "keep": 1},
        "logging": {
            "every": max(1, steps // (4 * POINTS)),
            "eval_every": max(1, steps // POINTS),
            "eval_tokens": 4 * step,
            "tensorboard": False,
        },
    }


def train(settings: dict[str, Any], options: list[str], seconds: float) -> str | None:
    """Train a run, no longer than this; returns what went wrong, if anything did."""
    path = Path(settings["run_dir"]).parent / f"{settings['name']}.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "stablemoe_ds", "train", str(path), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]


def points_of(run_dir: Path, tokens_per_step: int) -> list[dict[str, float]]:
    """Tokens read, seconds of training and perplexity at each validation."""
    points, seconds, before = [], 0.0, 0
    for line in MetricsLog(run_dir / "metrics.jsonl").read():
        if line["kind"] == "train":
            seconds += (line["step"] - before) * tokens_per_step / line["tokens_per_second"]
            before = line["step"]
        elif line["kind"] == "valid":
            tokens = line["step"] * tokens_per_step
            points.append({"tokens": tokens, "seconds": seconds, "perplexity": line["perplexity"]})
    return points


def tables(rows: list[dict[str, Any]]) -> str:
    """A row a validation of each recipe."""
    lines = [
        [row["recipe"], f"{p['tokens'] / 1e6:.1f}", f"{p['seconds']:.0f}", f"{p['perplexity']:.2f}"]
        for row in rows
        for p in row["points"]
    ]
    failed = [f"{row['recipe']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n\n".join([markdown(["router", "million tokens", "seconds", "perplexity"], lines), *failed])


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--data", type=Path, help="folder made by benchmarks.carry")
    options.add_argument("--tokens", type=float, default=40e6, help="of each recipe (default 40e6)")
    options.add_argument("--seconds", type=float, default=120, help="at most, for each recipe (default 120)")
    arguments = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data:
            train_text, valid_text = unpacked(arguments.data, folder)
        else:
            train_text = valid_text = make_corpus(folder, library_text(200_000), 512)
        tokens = 8192 if arguments.quick else int(arguments.tokens)
        for recipe, changes in RECIPES.items():
            if recipe not in ROUTERS:
                continue
            settings = settings_of(recipe, train_text, valid_text, folder, tokens, arguments.quick)
            failed = train(settings, changes, arguments.seconds)
            points = points_of(folder / recipe, settings["schedule"]["tokens_per_step"])
            rows.append({"recipe": recipe, "points": points, "failed": failed})
            record(arguments, __doc__, {"rows": rows}, tables(rows))
    publish(arguments, __doc__, {"rows": rows}, tables(rows))


if __name__ == "__main__":
    main()
