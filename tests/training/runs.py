"""Small real runs for the tests: their data, their configuration, and what a rank does in its own process."""

from __future__ import annotations

import io
import json
import shutil
import sysconfig
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from tests.distributed.launch import run_distributed
from tests.distributed.worker import engine_of
from tests.tiny import tiny_run

STEPS, SWITCH, VOCAB = 12, 6, 480
TIMING = ("tokens_per_second", "mfu", "seconds")


@dataclass(frozen=True)
class TinyData:
    """Prepared corpora (prefixes) and what they were made of."""

    text: Path
    tokenizer: str
    train: str
    valid: str


@cache
def tiny_data(folder: Path, vocab_size: int = VOCAB) -> TinyData:
    """A tokenizer and two corpora from modules of the standard library, made once."""
    from stablemoe_ds.data.prepare import prepare
    from stablemoe_ds.data.tokenizer import train_tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = train_tokenizer([library / "textwrap.py", library / "shlex.py"], folder / "tokenizer.model", vocab_size)
    for name, module in (("train", "textwrap.py"), ("valid", "bisect.py")):
        prepare([library / module], tokenizer, folder / name, documents="file")
    return TinyData(library / "textwrap.py", str(tokenizer.path), str(folder / "train"), str(folder / "valid"))


def small_run(data: TinyData, folder: Path, /, **sections: Any) -> RunConfig:
    """12 updates of 4 sequences of 32, stage 2 from update 6 on, one MoE layer of 4 experts, every update logged."""
    base: dict[str, dict[str, Any]] = {
        "model": {"layers": 2, "vocab_size": VOCAB},
        "moe": {"layers": [1], "experts": 4},
        "data": {"train": data.train, "valid": data.valid, "sequence_length": 32, "workers": 0},
        "schedule": {"steps": STEPS, "tokens_per_step": 128},
        "stages": {"at_step": SWITCH},
        "logging": {"every": 1, "probe_every": 3, "probe_tokens": 512, "eval_tokens": 256, "tensorboard": False},
    }
    laid = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return tiny_run(**laid, name="small", run_dir=str(folder))


def train_here(run: RunConfig, picture: bool = False) -> str:
    """What a rank does: train, and hand back what it printed.

    picture: draw the report of the run, which takes longer than its updates.
    """
    from stablemoe_ds.distributed.groups import start_world, stop_world
    from stablemoe_ds.training.trainer import train

    drawing = nullcontext() if picture else mock.patch("stablemoe_ds.evaluation.run_report.draw")
    with redirect_stdout(io.StringIO()) as out, drawing:
        train(run, start_world(timeout_minutes=3.0))
    stop_world()
    return out.getvalue()


def resave_here(run: RunConfig, source: Path) -> None:
    """What a rank does: take a checkpoint under the layout of ``run``, and write it out again."""
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.checkpoint.restore import restore

    with engine_of(run) as engine:
        checkpoint = Checkpoint.open(source)
        restore(engine, checkpoint)
        save_here(engine, checkpoint.progress, checkpoint.tokenizer, checkpoint.table())


def save_here(engine: Any, progress: Any, tokenizer: str = "", table: Any = None) -> None:
    """Save and wait. Raises what went wrong."""
    from stablemoe_ds.checkpoint.saver import Saver

    saver = Saver(engine, tokenizer, lambda saved: None)
    saver.begin(progress, table)
    saved = saver.finish()
    saver.close()
    assert saved is not None
    if saved.error:
        raise saved.error


def train_run(run: RunConfig, ranks: int = 1) -> str:
    """Train a run in fresh processes; returns what the main rank printed."""
    printed: str = run_distributed(ranks, train_here, run)[0]
    return printed


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command_here(*argv: str) -> Answer:
    """What a rank does: ``stablemoe`` with these arguments."""
    from stablemoe_ds.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as ending:
            code = ending.code
    assert isinstance(code, int)
    return Answer(code, out.getvalue(), err.getvalue())


def command(*argv: str, ranks: int = 1) -> Answer:
    """``stablemoe ARGV`` in fresh processes; the answer of the main rank."""
    answer: Answer = run_distributed(ranks, command_here, *argv)[0]
    return answer


@cache
def finished_run(data: TinyData, folder: Path) -> RunConfig:
    """A run with a tokenizer that went to its end and kept checkpoints 3 (stage 1), 6 (the switch), 9 and 12."""
    named = {"tokenizer": data.tokenizer, "test": data.valid}
    run = small_run(data, folder, data=named, checkpoint={"every": 3, "keep": 9}, optimizer={"lr": 1e-2})
    run_distributed(1, train_here, run, True)
    return run


def run_file(run: RunConfig, path: Path) -> str:
    """The run as a YAML file for the command line."""
    from stablemoe_ds.config.load import dump_run

    path.write_text(dump_run(run))
    return str(path)


def restarted(run: RunConfig, folder: Path, step: int) -> RunConfig:
    """A copy of a run's directory whose newest checkpoint is that of ``step``, as if the run had died after it."""
    shutil.copytree(run.directory, folder)
    (folder / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    return run.model_copy(update={"run_dir": str(folder)})


def checkpoint_of(run: RunConfig, step: int) -> Path:
    return Path(run.directory) / "checkpoints" / f"step-{step:06d}"


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: weights, moments and the routing table."""
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit, or that only one of the two has."""
    return [n for n in {**one, **other} if n not in one or n not in other or not torch.equal(one[n], other[n])]


def history(run: RunConfig, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` without what a clock decides."""
    lines = map(json.loads, (Path(run.directory) / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in lines if kind in (None, line["kind"])]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in kept]


def probe_records(run: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(run.directory) / "probe").glob("*.npy")}
