"""What is read out of a finished run of a suite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.comparison.outcome import outcome_of
from stablemoe_ds.comparison.suite import load_suite
from stablemoe_ds.run_directory.probe_records import PROBE_IDS
from stablemoe_ds.run_directory.rewind import TABLE
from stablemoe_ds.tables.table import RoutingTable
from tests.comparison.suites import compare, tiny_suite
from tests.training.runs import TinyData


@pytest.mark.slow
def test_load_counts_every_expert_of_a_token(data: TinyData, tmp_path: Path) -> None:
    variants = {"two": ["moe.router=table", "moe.table=crossed", "moe.top_k=2"]}
    suite = tiny_suite(data, tmp_path, variants=variants, reference="two", seeds=[1])
    answer = compare(suite.file)
    assert answer.code == 0, answer.err
    (run,) = load_suite(suite.file).runs
    found, table = outcome_of(run), RoutingTable.read(run.folder / TABLE)
    load_LN = table.expert_load(np.bincount(np.load(run.folder / PROBE_IDS), minlength=table.vocab_size))
    assert found.figures["load"] == pytest.approx(load_LN.max(1).mean())
    assert found.figures["load_cv"] == pytest.approx(load_LN.std(1).mean())
    assert found.curves["load"][-1][1] == found.figures["load"]
    assert (found.table, found.gate, found.figures["churn"]) == ("crossed", "one", 0)
