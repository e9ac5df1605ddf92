"""The history of a run survives odd values, kills and resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.metrics import MetricsLog, plain


def test_reads_back_what_was_appended(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert log.read() == []
    log.append("train", 1, loss=2.5, load=[1.5, 2.0])
    log.append("switch", 2, table_sha256="ab", agreement=np.float32(0.5))
    assert log.read() == [
        {"step": 1, "kind": "train", "loss": 2.5, "load": [1.5, 2.0]},
        {"step": 2, "kind": "switch", "table_sha256": "ab", "agreement": 0.5},
    ]


def test_resume_cuts_back_and_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(3)
    for step in range(1, 6):
        log.append("train", step, loss=float(step))
    log.truncate_after(3)
    log.append("train", 4, loss=0.0)
    assert [(line["step"], line["loss"]) for line in log.read()] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_a_last_line_is_left_out_and_gone_after_resume(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("train", 1, loss=1.0)
    with log.path.open("a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert [line["step"] for line in log.read()] == [1]
    log.truncate_after(1)
    log.append("train", 2, loss=2.0)
    assert [line["step"] for line in log.read()] == [1, 2]


@pytest.mark.parametrize("bad", ["{]", "[1]", '{"step": 1}', '{"kind": "train", "step": null}'])
def test_any_other_damage_is_named(tmp_path, bad):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text(f'{{"step": 1, "kind": "train"}}\n{bad}\n')
    with pytest.raises(UserError, match="line 2"):
        log.read()


def test_every_line_is_strict_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("train", 1, loss=math.nan, grad_norm=np.float64("inf"), load=np.array([1.0, np.nan]))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["load"]) == (None, None, [1.0, None])


def test_plain_reaches_into_everything():
    value = {1: (np.int64(3), [np.array([[1, 2]])]), "text": "x", "flag": True, "none": None}
    assert plain(value) == {"1": [3, [[[1, 2]]]], "text": "x", "flag": True, "none": None}
