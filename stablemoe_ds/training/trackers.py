"""Experiment trackers: TensorBoard and, if asked for, Weights & Biases."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.rewind import WANDB_ID


class Tracker(Protocol):
    """Takes numbers by name."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Events in a folder, ``<run_dir>/tensorboard``."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: updates that the run goes on after; events that were written for later ones are void from now on."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run, the same one as long as ``<run_dir>/wandb_id`` is there to name it.

    W&B takes no values for a step before the last one it has: of updates that are made once more after a run was set
    back, it keeps the first values.
    """

    def __init__(self, project: str, run: RunConfig) -> None:
        """Raises UserError if the package is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb_project is set but wandb is not installed: pip install stablemoe_ds[wandb]"
            ) from error
        folder = Path(run.directory)
        self._run: Any = wandb.init(
            project=project,
            name=run.name,
            id=_kept_id(folder / WANDB_ID),
            resume="allow",
            config=run.model_dump(mode="json"),
            allow_val_change=True,  # a run may go on under other settings
            dir=str(folder),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _kept_id(file: Path) -> str:
    """The id in this file, which is written if it is not there."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        fresh = secrets.token_hex(4)
        file.write_text(f"{fresh}\n", encoding="utf-8")
        return fresh


def make_trackers(run: RunConfig, active: bool, step: int) -> list[Tracker]:
    """The trackers of a run that goes on after ``step`` updates; none on ranks other than the main one."""
    trackers: list[Tracker] = []
    if active and run.logging.tensorboard:
        trackers.append(TensorBoardTracker(Path(run.directory) / "tensorboard", step))
    if active and run.logging.wandb_project:
        trackers.append(WandbTracker(run.logging.wandb_project, run))
    return trackers


def scalars(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a metrics line by tracker name; a list becomes one number an entry."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat.update({f"{prefix}/{name}/{i}": float(item) for i, item in enumerate(value)})
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}/{name}"] = float(value)
    return flat
