"""Experiment trackers: TensorBoard and, if asked for, Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError


class Tracker(Protocol):
    """Takes numbers by name."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Events under ``<run_dir>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run. Raises UserError if the package is not installed."""

    def __init__(self, project: str, run: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb_project is set but wandb is not installed: pip install stablemoe_ds[wandb]"
            ) from error
        self._run: Any = wandb.init(project=project, name=run.name, config=run.model_dump(mode="json"), resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def make_trackers(run: RunConfig, active: bool) -> list[Tracker]:
    """The trackers a run asks for; none on ranks other than the main one."""
    trackers: list[Tracker] = []
    if active and run.logging.tensorboard:
        trackers.append(TensorBoardTracker(Path(run.directory) / "tensorboard"))
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
