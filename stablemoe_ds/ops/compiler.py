"""``torch.compile``, loaded when something is to be compiled: it takes a second or two that most commands can save."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch

from stablemoe_ds.errors import UserError

Function = TypeVar("Function", bound=Callable[..., object])


@cache
def compile_once(function: Function) -> Function:
    """``torch.compile(function)``, one for all who ask: modules of one shape share what was compiled.

    Not to be asked for in code that is being traced.
    """
    return cast(Function, torch.compile(function))


@cache
def require_compiler() -> None:
    """Raise UserError, now and not in the first update, if ``torch.compile`` does not work on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # of the compiler, of Triton, or of torch: what it is does not matter
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"parallel.compile: torch.compile does not work on this machine ({reason}). It needs a C++ compiler "
            "(g++, or the one that CXX names), on a GPU Triton and Python's header files too; "
            "nearest that works: parallel.compile false"
        ) from error
