"""Compiled transformer blocks: the same figures, names and checkpoints as without, and a word where it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import TableRouting, freeze
from tests.compiler import needs_compiler
from tests.tiny import VOCAB
from tests.training.runs import checkpoint_of, history, run_file, small_run, tensors_of, tiny_data, train_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}


@pytest.fixture(scope="module", autouse=True)
def own_compilations() -> Iterator[None]:
    """Nothing of what is compiled here is left to, or counted by, other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def some_batch() -> Batch:
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
    real = torch.ones(2, 16, dtype=torch.bool)
    real[0, 12:] = False
    return Batch(ids[:, :-1], ids[:, 1:], real, real)


def table_of(model: StableMoEGPT) -> TableRouting:
    run = model.run_config
    routing = freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))
    assert isinstance(routing, TableRouting)
    return routing


def trained(model: StableMoEGPT, stage: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch, auxiliary losses among it, and every gradient by name."""
    batch = some_batch()
    out = model.train()(batch, table_of(model)(batch.ids) if stage == 2 else {})
    loss = out.loss_sum
    for name in ("balance", "distill"):
        auxiliary = out.auxiliary_sum(name)
        loss = loss if auxiliary is None else loss + auxiliary
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compiled_graphs() -> int:
    """Graphs compiled since the module began. None may have been cut: a block is one graph."""
    assert not counters["graph_break"]
    graphs: int = counters["stats"]["unique_graphs"]
    return graphs


@needs_compiler
@pytest.mark.parametrize("model", [{}, PAPER], ids=["modern", "paper"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", [1, 2], ids=["stage 1", "stage 2"])
def test_loss_and_gradients_are_those_of_eager(build: Any, stage: int, recompute: bool, model: dict[str, Any]) -> None:
    eager, compiled = (
        trained(build(model=model, parallel={"compile": way, "recompute": recompute}), stage) for way in (False, True)
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert compiled_graphs() > 0, "a model that ran as it is proves nothing"


@needs_compiler
def test_all_blocks_share_what_is_compiled(build: Any) -> None:
    model = build(parallel={"compile": True}, model={"layers": 6, "hidden_size": 48})
    before = compiled_graphs()
    trained(model, 1)
    assert compiled_graphs() == before + 1


@needs_compiler
@pytest.mark.parametrize("model", [{}, PAPER], ids=["modern", "paper"])
def test_experts_that_are_served_at_once_share_one_graph_for_all_routes(
    build: Any, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with the kernel; a CPU has torch's slow way to compute the same, compiled in bf16 alone.

    Blocks are compiled in bf16, too: the loss is that of all of it.
    """
    monkeypatch.setattr("stablemoe_ds.moe.experts.can_group", lambda *_: True)
    moe = {"layers": [1, 2], "sublayers": 2}
    exact, eager, compiled = (build(model=model, moe=moe, parallel={"compile": way}) for way in (False, False, True))
    eager.bfloat16()
    compiled.bfloat16()
    torch._dynamo.reset()  # blocks of this shape may have been compiled before
    before = compiled_graphs()
    (loss, grads), (other_loss, others) = trained(compiled, 2), trained(eager, 2)
    torch.testing.assert_close(loss, other_loss, rtol=1e-2, atol=0)
    for name, grad in trained(exact, 2)[
        1
    ].items():  # about as near to fp32 as eager is: where relu has its kink, rounding decides
        ours, theirs = ((way[name].float() - grad).norm() for way in (grads, others))
        assert ours <= 3 * theirs + 0.05 * grad.norm() + 1e-4, name
    trained(compiled, 1)  # along other routes
    assert compiled_graphs() == before + 2, "one for the blocks, one for the experts"


@needs_compiler
def test_names_evaluation_and_generation_are_those_of_eager(build: Any) -> None:
    eager, compiled = (build(parallel={"compile": way}).eval() for way in (False, True))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    before, batch, routing = compiled_graphs(), some_batch(), table_of(eager)
    with torch.no_grad():
        losses = [model(batch, routing(batch.ids)).loss_BS for model in (compiled, eager)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    evaluated = compiled_graphs()
    assert evaluated == before + 1
    words = [generate(model, [[5, 9, 2], [7]], routing, max_new_tokens=8) for model in (compiled, eager)]
    assert words[0] == words[1]
    assert compiled_graphs() == evaluated, "with a cache nothing is compiled"


@needs_compiler
@pytest.mark.distributed
def test_two_processes_train_the_same_and_their_checkpoint_goes_on_without(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    layout: dict[str, Any] = {"expert": 2}
    save = {"schedule": {"steps": 6}, "stages": {"at_step": 3}, "checkpoint": {"every": 4, "keep": 9}}
    eager = small_run(data, tmp_path / "eager", parallel=layout, **save)
    compiled = small_run(data, tmp_path / "compiled", parallel=layout | {"compile": True}, **save)
    for run in (eager, compiled):
        train_run(run, ranks=2)
    losses = [[line["loss"] for line in history(run, "train")] for run in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    ends = [tensors_of(checkpoint_of(run, 6)) for run in (compiled, eager)]
    assert ends[0].keys() == ends[1].keys()

    shutil.rmtree(checkpoint_of(compiled, 6))
    (checkpoint_of(compiled, 4).parent / "latest").write_text("step-000004")
    said = train_run(compiled.model_copy(update={"parallel": eager.parallel}), ranks=2)
    assert "continuing after update 4" in said
    assert [line["loss"] for line in history(compiled, "train")] == pytest.approx(losses[0], abs=1e-5)


def test_without_a_compiler_the_run_does_not_begin(tmp_path: Path) -> None:
    run = small_run(tiny_data(tmp_path / "data"), tmp_path / "run", parallel={"compile": True})
    command = [sys.executable, "-m", "stablemoe_ds", "train", run_file(run, tmp_path / "run.yaml")]
    bare = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    answer = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    (line,) = [line for line in answer.stderr.splitlines() if "parallel.compile" in line]
    assert "No working C++ compiler" in line
    assert "nearest that works: parallel.compile false" in line
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "run").exists()
