"""What the commands of these tests are given."""

from __future__ import annotations

import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import TinyData, finished_run, tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.fixture(scope="session")
def finished(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return finished_run(data, tmp_path_factory.getbasetemp() / "finished")
