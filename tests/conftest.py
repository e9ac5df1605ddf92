"""What the whole suite shares: the CPU, one thread, and process groups of a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["DS_ACCELERATOR"] == "cpu":  # DS_ACCELERATOR=cuda pytest -m gpu: the tests that need a GPU
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

with suppress(ImportError):  # the tests that need a GPU do without it
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples every time; --hypothesis-profile default draws others

if TYPE_CHECKING:
    import torch

    from stablemoe_ds.config.schema import RunConfig
    from stablemoe_ds.distributed.groups import Groups
    from tests.training.runs import TinyData


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test computes, and where tensors are made that it does not ask elsewhere: the CPU, then the GPU."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; where there is one: DS_ACCELERATOR=cuda python -m pytest -m gpu")
    with torch.device(request.param) as here:
        yield here


@pytest.fixture(scope="session")
def world_groups() -> Iterator[Groups]:
    """megatron-core's and DeepSpeed's groups in this process alone; whatever builds a model needs them."""
    from stablemoe_ds.distributed.groups import Groups, start_world, stop_world

    world = start_world()
    # Programs that a test starts must not take themselves for ranks of this run. LOCAL_RANK stays: DeepSpeed's
    # engine reads it.
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    yield Groups(world, 1, 1)
    stop_world()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """A tokenizer and corpora for runs of seconds."""
    from tests.training.runs import tiny_data

    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.fixture(scope="session")
def finished(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over both stages that has come to its end."""
    from tests.training.runs import finished_run

    return finished_run(data, tmp_path_factory.getbasetemp() / "finished")
