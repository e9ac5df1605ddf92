"""How long an update waits for a checkpoint: our saver, blocking and in the background, and torch.save.

One process, an engine with ZeRO 1. All variants take turns, round after round, over the same 12 bytes per parameter.
Figures are medians over rounds.

    raw copy     each tensor copied once into existing host memory: the least that an update can wait for
    background   what our saver makes the update wait for; a thread writes, flushes, reads back, compares and hashes
    blocking     our saver, waited for until it is done
    torch.save   the same tensors, flushed to the disk, without any check
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import clock, markdown, medians, parser, publish, ratios, take_turns
from stablemoe_ds.checkpoint.fp32_state import MOMENTS, WEIGHT, Fp32State
from stablemoe_ds.checkpoint.reader import Progress
from stablemoe_ds.checkpoint.saver import Saved, Saver
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.run_directory.checkpoint_files import flush
from stablemoe_ds.training.engine import Engine

SIZES = {"small": (128, 4, 8), "large": (256, 6, 8)}
"""Hidden size, blocks, experts."""


def run_of(name: str, folder: Path) -> RunConfig:
    """A model of this size with an MoE layer behind every second block."""
    hidden, layers, experts = SIZES[name]
    return RunConfig.model_validate(
        {
            "name": name,
            "run_dir": str(folder / name),
            "model": {
                "layers": layers,
                "hidden_size": hidden,
                "heads": 8,
                "ffn_hidden_size": 4 * hidden,
                "vocab_size": 8192,
            },
            "moe": {"layers": list(range(2, layers + 1, 2)), "experts": experts},
            "data": {"sequence_length": 128},
            "optimizer": {"lr": 1e-3},
            "schedule": {"steps": 100, "tokens_per_step": 128},
            "checkpoint": {"keep": 1},
        }
    )


def build(run: RunConfig, groups: Groups) -> Engine:
    engine = Engine(run, batch_plan(run, 1), groups, StableMoEGPT(run, run.model.vocab_size or 0, groups.placement))
    Fp32State(engine.deepspeed).prepare(engine.model.parameters(), 1)
    return engine


class Ways:
    """The four ways to bring the state of an engine to safety. Each returns the seconds an update waits for it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        fp32, keys = Fp32State(engine.deepspeed), (WEIGHT, *MOMENTS)
        named = list(engine.model.named_parameters())
        self.live = {f"{name}/{key}": fp32.view(p, key) for name, p in named for key in keys}
        self.bytes = sum(value.nbytes for value in self.live.values())
        self._host: dict[str, Tensor] = {}
        self._file, self._device, self._step = folder / "torch.pt", engine.groups.world.device, 0
        self._saver = Saver(engine, "", self._refuse_failure)

    def raw_copy(self) -> float:
        for name, value in self.live.items():
            if name not in self._host:
                self._host[name] = torch.empty(value.shape, pin_memory=value.is_cuda)
        began = self._now()
        for name, value in self.live.items():
            self._host[name].copy_(value, non_blocking=True)
        return self._now() - began

    def background(self) -> float:
        began = self._now()
        self._step += 1
        self._saver.begin(Progress(self._step), None)
        waited = self._now() - began
        self._saver.finish()
        return waited

    def blocking(self) -> float:
        began = self._now()
        self.background()
        return self._now() - began

    def torch_save(self) -> float:
        began = self._now()
        torch.save(self.live, self._file)
        flush(self._file)
        return self._now() - began

    def _now(self) -> float:
        return clock(self._device)

    @staticmethod
    def _refuse_failure(saved: Saved) -> None:
        if saved.error is not None:
            raise saved.error


def measure(name: str, groups: Groups, folder: Path, rounds: int) -> dict[str, Any]:
    """Median seconds of each way, and the ratio of waiting in the background to the raw copy, round by round."""
    ways = Ways(build(run_of(name, folder), groups), folder)
    named: dict[str, Callable[[], float]] = {
        "raw copy": ways.raw_copy,
        "background": ways.background,
        "blocking": ways.blocking,
        "torch.save": ways.torch_save,
    }
    seconds = take_turns(named, rounds)
    return {
        "size": name,
        "bytes": ways.bytes,
        "seconds": medians(seconds),
        "fastest": {way: min(values) for way, values in seconds.items()},
        "background_to_raw_copy": ratios(seconds, "raw copy")["background"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["seconds"])
    body = []
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in names]
        body.append([row["size"], f"{row['bytes'] / 1e6:.0f}", *times, f"{row['background_to_raw_copy']:.2f}"])
    return markdown(["model", "MB", *(f"{name}, ms" for name in names), "background / raw copy"], body)


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    groups = Groups(start_world(), tensor=1, expert=1)
    names = ["small"] if arguments.quick else list(SIZES)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(name, groups, Path(folder), arguments.rounds) for name in names]
    publish(arguments, __doc__, {"rows": rows}, table(rows))
    stop_world()


if __name__ == "__main__":
    main()
