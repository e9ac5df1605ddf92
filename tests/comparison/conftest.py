"""A small suite that has been trained once, through the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison.suites import TinySuite, compare, tiny_suite
from tests.training.runs import TinyData, tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.fixture(scope="session")
def compared(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TinySuite:
    """Two variants with two seeds, finished and reported, checkpoints of updates 6 and 12 kept. Leave it as it is."""
    suite = tiny_suite(data, tmp_path_factory.mktemp("suite"))
    answer = compare(suite.file, "--jobs", "2")
    assert answer.code == 0, answer.out + answer.err
    Path(suite.output / "said.txt").write_text(answer.out)
    return suite
