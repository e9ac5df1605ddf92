"""What a checkpoint is, and whether it is sound: facts for a script, and the same as text."""

from __future__ import annotations

import time
from math import prod
from typing import Any

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.text_table import aligned

Answer = tuple[dict[str, Any], str]
"""Facts for a script, and the same as text."""


def show(path: str) -> Answer:
    """What a checkpoint is. Raises UserError as :meth:`Checkpoint.open` does."""
    checkpoint = Checkpoint.open(path)
    run, progress, table = checkpoint.run, checkpoint.progress, checkpoint.table()
    parallel, moe = run.parallel, run.moe
    facts: dict[str, Any] = {
        "path": str(checkpoint.path),
        "name": run.name,
        "step": progress.step,
        "steps": run.schedule.steps,
        "stage": progress.stage,
        "samples": progress.samples,
        "tokens": progress.position.tokens or None,
        "optimizer_steps": checkpoint.optimizer_steps,
        "router": moe.router,
        "gate": moe.gate_name if moe.facts.routed else None,
        "moe_layers": len(moe.layers),
        "table_layers": moe.table_layers,
        "experts": moe.experts if moe.layers else 0,
        "parameters": sum(prod(checkpoint.shape(tensor)) for tensor in checkpoint.tensors),
        "tensors": len(checkpoint.tensors),
        "table": table.sha256 if table else None,
        "vocab_size": checkpoint.vocab_size,
        "tokenizer": checkpoint.tokenizer or None,
        "written_with": f"tensor {parallel.tensor}, expert {parallel.expert}, "
        f"{f'sequence {parallel.sequence}, ' if parallel.sequence > 1 else ''}ZeRO {parallel.zero_stage}, "
        f"{run.precision.dtype}",
        "files": checkpoint.manifest["files"],
        "bytes": sum(checkpoint.manifest["files"].values()),
    }
    listed = [
        [name, f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in facts.items()
        if name != "files"
    ]
    files = [[f"  {size:,}", name] for name, size in facts["files"].items()]
    return facts, f"{aligned(listed)}\n{aligned(files, right={0})}"


def verify(path: str) -> Answer:
    """Read every byte and check it against the manifest. Raises UserError that names what is damaged."""
    began = time.perf_counter()
    checkpoint = Checkpoint.open(path)
    checkpoint.check_content()
    size, seconds = sum(checkpoint.manifest["files"].values()), time.perf_counter() - began
    hashed = len(checkpoint.manifest.get("sha256", {}))
    facts = {
        "path": str(checkpoint.path),
        "step": checkpoint.progress.step,
        "files": len(checkpoint.files),
        "hashed": hashed,
        "bytes": size,
        "seconds": seconds,
    }
    text = (
        f"{checkpoint.path} is sound: {hashed} of {len(checkpoint.files)} files hashed, {size:,} bytes, {seconds:.2f} s"
    )
    return facts, text
