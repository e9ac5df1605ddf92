"""Builds every Triton kernel of the package for GPUs that need not be here: python -m tests.ops.build_kernels 80 90 100

The arguments are compute capabilities times ten. Prints one line a build; fails with the compiler's words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stablemoe_ds.ops import triton_rows


def calls() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Kernels, each with a type for every tensor and a value for everything that is known when it is built."""
    for number in ("*bf16", "*fp16", "*fp32"):
        rows = {"rows_ptr": number, "position_ptr": "*i64", "width": "i32"}
        for relu in (False, True):
            for absent in ("scale_ptr", "shift_ptr"):
                given = {"x_ptr": number, "scale_ptr": number, "shift_ptr": number, "out_ptr": number}
                affine = {**given, absent: None, "owner_ptr": "*i32", "width": "i32", "relu": relu, "block": 1024}
                yield triton_rows.affine_kernel, affine
        for choices in (1, 2):
            for gate in (number, None):
                summing = {**rows, "gate_ptr": gate, "out_ptr": number, "choices": choices, "block": 1024}
                yield triton_rows.weighted_sum_kernel, summing
            grads = {"grad_ptr": number, "grad_rows_ptr": number, "grad_gate_ptr": number, "gate_ptr": number}
            yield triton_rows.weighted_sum_backward_kernel, {**rows, **grads, "choices": choices, "block": 8192}
            states = {**rows, "states_ptr": number, "rows_ptr": "*fp32", "out_ptr": "*fp32"}
            yield triton_rows.dots_kernel, {**states, "choices": choices, "block": 8192}
        swiglu = {"inner_ptr": number, "out_ptr": number, "width": "i32", "block": 1024}
        yield triton_rows.swiglu_kernel, swiglu
        yield triton_rows.swiglu_backward_kernel, {**swiglu, "grad_ptr": number}


def build(kernel: Any, arguments: dict[str, Any], capability: int) -> int:
    """Bytes of the machine code."""
    types = {name: arguments[name] if isinstance(arguments[name], str) else "constexpr" for name in kernel.arg_names}
    fixed = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    built = triton.compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", capability, 32))
    return len(built.asm["cubin"])


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for kernel, arguments in calls():
            size = build(kernel, arguments, capability)
            print(f"sm_{capability} {kernel.__name__} {arguments}: {size} bytes")


if __name__ == "__main__":
    main()
