"""A run directory that is set back holds what it held then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.probe_records import RecordFolder
from stablemoe_ds.run_directory.rewind import METRICS, PROBE, TABLE, WANDB_ID, rewind
from stablemoe_ds.tables.table import RoutingTable


def table_of(expert: int) -> RoutingTable:
    return RoutingTable(np.full((1, 8, 1), expert, dtype=np.int32), 4, (1,))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """As a run of 4 updates leaves it that has frozen its routing after the second."""
    for step in range(1, 5):
        MetricsLog(tmp_path / METRICS).append("train", step, loss=1.0)
        RecordFolder(tmp_path / PROBE).append(step, np.zeros((1, 4), dtype=np.int16))
    table_of(3).save(tmp_path / TABLE)
    (tmp_path / "report.json").write_text(json.dumps({"steps": 4}))
    (tmp_path / "report.png").touch()
    (tmp_path / WANDB_ID).write_text("abc\n")
    return tmp_path


def steps(run_dir: Path) -> tuple[list[int], list[int]]:
    return [line["step"] for line in MetricsLog(run_dir / METRICS).read()], RecordFolder(run_dir / PROBE).steps()


def left(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()} - {METRICS, PROBE}


def test_back_into_stage_2(run_dir: Path) -> None:
    rewind(run_dir, 3, table_of(2))
    assert steps(run_dir) == ([1, 2, 3], [1, 2, 3])
    assert left(run_dir) == {TABLE, WANDB_ID}, "the report was one of all four updates"
    assert RoutingTable.read(run_dir / TABLE).sha256 == table_of(2).sha256, "of the checkpoint, not of what came after"


def test_back_into_stage_1(run_dir: Path) -> None:
    rewind(run_dir, 1, None)
    assert steps(run_dir) == ([1], [1])
    assert left(run_dir) == {WANDB_ID}, "nothing is frozen yet"


def test_nothing_is_lost_where_a_finished_run_goes_on(run_dir: Path) -> None:
    rewind(run_dir, 4, table_of(3))
    assert steps(run_dir) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert left(run_dir) == {TABLE, WANDB_ID, "report.json", "report.png"}


def test_a_run_that_begins_has_nothing_of_the_one_before_it(run_dir: Path) -> None:
    rewind(run_dir, None, None)
    assert steps(run_dir) == ([], [])
    assert left(run_dir) == set()


def test_an_empty_directory(tmp_path: Path) -> None:
    rewind(tmp_path, None, None)
    assert list(tmp_path.iterdir()) == []
