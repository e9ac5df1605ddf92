"""What is done to rows, written out row by row: plain torch, and Triton's kernels.

Where torch sees no GPU the kernels run in Triton's interpreter, if Triton is there: make test-kernels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablemoe_ds.ops import rows as plain
from stablemoe_ds.ops.rows import KERNEL_TYPES, RowOps, ops_for, plain_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not here: make test-kernels")
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
WAYS = ["plain", "triton"] if TRITON else ["plain"]
TYPED_WAYS = [(way, dtype) for way in WAYS for dtype in CLOSE if way == "plain" or dtype in KERNEL_TYPES]
OpsOfType = tuple[RowOps, torch.dtype]
WIDTHS = [1, 8, 48, 1500]
"""The last takes two blocks of a kernel, the second of which is not full."""


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(params=WAYS)
def ops(request: pytest.FixtureRequest) -> RowOps:
    return chosen(request.param)


@pytest.fixture(params=TYPED_WAYS, ids=lambda typed: "-".join(map(str, typed)))
def of_type(request: pytest.FixtureRequest) -> OpsOfType:
    way, dtype = request.param
    return chosen(way), dtype


def chosen(way: str) -> RowOps:
    if way == "plain":
        return plain
    from stablemoe_ds.ops import triton_rows

    return triton_rows


def some(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(DEVICE, dtype)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """wanted: in fp64."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= CLOSE[got.dtype] * wanted.norm()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("given", ["scale", "shift", "both", "neither"])
def test_affine(of_type: OpsOfType, given: str, relu: bool, width: int) -> None:
    ops, dtype = of_type
    x = some(7, width, dtype=dtype)
    scale = some(4, width, dtype=dtype, seed=1) if given in ("scale", "both") else None
    shift = some(4, width, dtype=dtype, seed=2) if given in ("shift", "both") else None
    owners = [0, 0, 1, 3, 3, 3, 3]
    got = ops.affine(x, scale, shift, torch.tensor(owners, dtype=torch.int32, device=DEVICE), relu)
    rows = []
    for row, e in zip(x.double(), owners, strict=True):
        moved = row * (1 if scale is None else scale[e].double()) + (0 if shift is None else shift[e].double())
        rows.append(moved.clamp_min(0) if relu else moved)
    assert got.dtype == dtype
    assert_close(got, torch.stack(rows))


CHOICES = {
    "one choice": [[2], [0], [1]],
    "one choice, one unserved": [[1], [-1], [0]],
    "two choices": [[4, 0], [1, 5], [3, 2]],
    "two choices, some unserved": [[-1, 0], [1, -1], [-1, -1]],
    "nobody served": [[-1], [-1]],
    "no token": [],
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("tokens", [0, 5])
def test_dots(of_type: OpsOfType, tokens: int, choices: int, width: int) -> None:
    ops, dtype = of_type
    states, rows = some(width, tokens, dtype=dtype).t(), some(4, width, dtype=torch.float32, seed=1)
    position_TK = torch.arange(tokens * choices, device=DEVICE).view(tokens, choices) % 4
    got = ops.dots(states, rows, position_TK)
    assert got.dtype == torch.float32
    wanted = torch.einsum("td,tkd->tk", states.double(), rows.double()[position_TK])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6 * width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize("positions", CHOICES.values(), ids=CHOICES)
def test_weighted_sum(of_type: OpsOfType, positions: list[list[int]], gated: bool, width: int) -> None:
    ops, dtype = of_type
    rows, gate, position_TK, _ = summands(positions, width, dtype)
    got = ops.weighted_sum(rows, gate if gated else None, position_TK)
    wanted = rows.new_zeros(len(positions), width, dtype=torch.float64)
    for t, choices in enumerate(positions):
        for k, a in enumerate(choices):
            if a >= 0:
                wanted[t] += rows[a].double() * (gate[t, k].double() if gated else 1)
    assert got.dtype == dtype
    assert_close(got, wanted)


def test_a_sum_can_be_of_another_type_and_of_rows_that_several_share(ops: RowOps) -> None:
    rows, gate = some(2, 40, dtype=torch.float32), some(3, 2, dtype=torch.float32, seed=1)
    position_TK = torch.tensor([[0, 1], [1, 1], [0, -1]], device=DEVICE)
    got = ops.weighted_sum(rows, gate, position_TK, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    kept = gate.double() * (position_TK >= 0)
    assert_close(got, (rows.double()[position_TK] * kept[..., None]).sum(1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("positions", CHOICES.values(), ids=CHOICES)
def test_weighted_sum_backward(of_type: OpsOfType, positions: list[list[int]], width: int) -> None:
    ops, dtype = of_type
    rows, gate, position_TK, order_A = summands(positions, width, dtype)
    grad = some(width, len(positions), dtype=dtype, seed=3).t()  # not contiguous, as gradients may be
    grad_rows, grad_gate = ops.weighted_sum_backward(grad, rows, gate, order_A, position_TK)
    wanted_rows, wanted_gate = torch.zeros_like(rows, dtype=torch.float64), torch.zeros_like(gate, dtype=torch.float64)
    for t, choices in enumerate(positions):
        for k, a in enumerate(choices):
            if a >= 0:
                wanted_rows[a] = grad[t].double() * gate[t, k].double()
                wanted_gate[t, k] = grad[t].double() @ rows[a].double()
    assert_close(grad_rows, wanted_rows)
    # A product of two long rows may cancel: what it was summed from says how exact it can be.
    assert grad_gate.dtype == dtype
    error = (grad_gate.double() - wanted_gate).abs().max() if positions else 0
    assert error <= 4 * CLOSE[dtype] * width**0.5


def summands(positions: list[list[int]], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [A, D], gates [T, K], position_TK, order_A."""
    choices = len(positions[0]) if positions else 1
    position_TK = torch.tensor(positions, dtype=torch.int64).view(-1, choices)
    flat = position_TK.flatten().tolist()
    order = [flat.index(a) for a in range(sum(a >= 0 for a in flat))]
    rows = some(len(order), width, dtype=dtype)
    gate = some(len(positions), choices, dtype=dtype, seed=1)
    return rows, gate, position_TK.to(DEVICE), torch.tensor(order, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 5])
def test_swiglu(of_type: OpsOfType, rows: int, width: int) -> None:
    ops, dtype = of_type
    inner, grad = some(rows, 2 * width, dtype=dtype), some(rows, width, dtype=dtype, seed=1)
    exact = inner.double().clone().requires_grad_()
    wanted = F.silu(exact[:, :width]) * exact[:, width:]
    wanted.backward(grad.double())
    got = ops.swiglu(inner)
    assert got.dtype == dtype
    assert_close(got, wanted)
    assert_close(ops.swiglu_backward(grad.clone(), inner), exact.grad)


@pytest.mark.skipif(DEVICE == "cuda", reason="of a machine without a GPU")
def test_kernels_are_for_the_gpu() -> None:
    assert ops_for(torch.ones(2, 2)) is plain


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_gpu_gets_kernels_unless_plain_torch_is_asked_for() -> None:
    rows = torch.ones(2, 2, device=DEVICE)
    assert ops_for(rows) is not plain
    assert ops_for(rows.double()) is plain
    with plain_torch():
        assert ops_for(rows) is plain
    assert ops_for(rows) is not plain


@needs_triton
@pytest.mark.slow
def test_kernels_can_be_built_for_gpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter is content with much that a compiler is not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = [sys.executable, "-m", "tests.ops.build_kernels", "80", "90", "100"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"sm_80", "sm_90", "sm_100"}
