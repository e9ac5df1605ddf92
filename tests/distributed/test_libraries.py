"""megatron-core's fused functions are compiled when they are called, and not when they are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stablemoe_ds.distributed.libraries import compiled_when_called


def test_a_function_is_compiled_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append((function, options))
        return lambda *args: ("compiled", function(*args))

    monkeypatch.setattr(torch, "compile", compiler)

    def twice(x: int) -> int:
        return 2 * x

    later = compiled_when_called(twice, dynamic=True)
    assert (asked, later.__name__) == ([], "twice")
    assert [later(3), later(4)] == [("compiled", 6), ("compiled", 8)]
    assert asked == [(twice, {"dynamic": True})]


def test_code_that_is_compiled_takes_it_in() -> None:
    later = compiled_when_called(torch.sin)

    def whole(x: torch.Tensor) -> torch.Tensor:
        return later(x) + 1

    x = torch.rand(4)
    torch.testing.assert_close(torch.compile(whole, backend="eager", fullgraph=True)(x), torch.sin(x) + 1)
