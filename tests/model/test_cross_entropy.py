"""Cross entropy a block of rows at a time, against torch's in float64: value, gradient, memory, a cut vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_bytes
from stablemoe_ds.model import cross_entropy as module
from stablemoe_ds.model.cross_entropy import cross_entropy
from tests.distributed.launch import run_distributed

TOKENS, VOCAB = 37, 96


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, some of them large; targets, the first and last id among them; what the losses are weighted with."""
    random = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(TOKENS, VOCAB, generator=random) * 3
    logits_TV[3] += 200
    logits_TV[4, 5] = 90
    target_T = torch.randint(VOCAB, (TOKENS,), generator=random)
    target_T[:2] = torch.tensor([0, VOCAB - 1])
    weight_T = torch.randn(TOKENS, generator=random)
    weight_T[6] = 0.0
    return logits_TV.to(dtype), target_T, weight_T


def expected(logits_TV: Tensor, target_T: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their weighted sum, in float64."""
    leaf = logits_TV.double().requires_grad_()
    loss_T = F.cross_entropy(leaf, target_T, reduction="none")
    (loss_T * weight_T).sum().backward()
    assert leaf.grad is not None
    return loss_T.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_it_is_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: float, rows: int) -> None:
    monkeypatch.setattr(module, "BLOCK", rows * VOCAB)
    logits_TV, target_T, weight_T = inputs(dtype)
    wanted_T, wanted_TV = expected(logits_TV, target_T, weight_T)
    leaf = logits_TV.clone().requires_grad_()
    loss_T = cross_entropy(leaf * 1, target_T)
    (loss_T * weight_T).sum().backward()
    assert leaf.grad is not None
    assert (loss_T.dtype, leaf.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss_T.double(), wanted_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), wanted_TV, rtol=error, atol=error)


def test_one_block_is_fp32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64 * 1024)
    leaf = torch.randn(2048, 1024).bfloat16().requires_grad_()
    target_T = torch.zeros(2048, dtype=torch.int64)

    def step() -> None:
        cross_entropy(leaf * 1, target_T).sum().backward()

    logits, block = leaf.nbytes, 4 * 64 * 1024
    assert logits <= peak_bytes(step, [leaf], torch.device("cpu")) <= logits + 4 * block


def test_a_second_backward_pass_is_refused() -> None:
    logits_TV, target_T, _ = inputs(torch.float32)
    loss = cross_entropy(logits_TV.requires_grad_() * 1, target_T).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been here before"):
        loss.backward()


def on_a_part(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of this rank's part of the logits."""
    import torch.distributed as dist

    from stablemoe_ds.distributed.groups import start_world, stop_world

    world = start_world(1.0)
    logits_TV, target_T, weight_T = inputs(dtype)
    leaf = logits_TV.chunk(world.size, 1)[world.rank].clone().requires_grad_()
    loss_T = cross_entropy(leaf * 1, target_T, dist.group.WORLD)
    (loss_T * weight_T).sum().backward()
    assert leaf.grad is not None
    stop_world()
    return loss_T.detach(), leaf.grad


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_a_vocabulary_over_two_ranks(dtype: torch.dtype, error: float) -> None:
    wanted_T, wanted_TV = expected(*inputs(dtype))
    ranks = run_distributed(2, on_a_part, dtype)
    for loss_T, _ in ranks:
        torch.testing.assert_close(loss_T.double(), wanted_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, part in ranks], 1).double(), wanted_TV, rtol=error, atol=error)
