"""README.md of an exported folder: what the model is, what it was trained on, how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stablemoe_ds.checkpoint.attached import TOKEN_COUNTS, token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.tables.table import RoutingTable

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, stablemoe]
# license: to be filled in before this model is published
---

# {name}

{kind} trained with stablemoe_ds and exported from step {step:,}.

**License:** to be filled in.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{own_code})
tokenizer = AutoTokenizer.from_pretrained("."{own_code})
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)[0]))
```

{needs}
A text has at most {length:,} tokens. No token is put before a text; the id that ends a document also begins one.

## What the run was

{facts}
"""


OWN_CODE = "`trust_remote_code` is for `modeling_stablemoe.py` in this folder, which needs torch and transformers only."
NO_CODE = "transformers itself has the code of this model."


def model_card(checkpoint: Checkpoint, table: RoutingTable | None, plain: bool = False) -> str:
    """The text of README.md; plain: a class of transformers computes the model.

    Figures that the checkpoint and its run directory do not have are left out."""
    run = checkpoint.run
    rows = [*_training(checkpoint), *_perplexity(checkpoint), *_routing(checkpoint, table)]
    return TEMPLATE.format(
        name=run.name,
        kind="A language model with Mixture-of-Experts layers," if run.moe.facts.routed else "A dense language model,",
        step=checkpoint.progress.step,
        length=run.data.sequence_length,
        own_code="" if plain else ", trust_remote_code=True",
        needs=NO_CODE if plain else OWN_CODE,
        facts="\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
    )


def _training(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    run, progress = checkpoint.run, checkpoint.progress
    rows = [("updates", f"{progress.step:,} of {run.schedule.steps:,}")]
    if progress.position.tokens:
        rows.append(("tokens read", f"{progress.position.tokens:,}"))
    for content, source in progress.position.sources.items():
        read = f"{source.tokens:,} tokens, {source.total:,} read"
        rows.append((f"corpus {Path(source.path).name}", f"{read}; fingerprint `{content}`"))
    if checkpoint.tokenizer:
        rows.append(("tokenizer", f"{checkpoint.vocab_size:,} ids; sha256 `{checkpoint.tokenizer}`"))
    return [*rows, ("precision", run.precision.dtype)]


def _perplexity(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What the run measured of this very checkpoint, if its history is there."""
    if checkpoint.run_directory is None:
        return []
    history = MetricsLog(checkpoint.run_directory / "metrics.jsonl").read()
    texts = {"valid": "validation", "test": "test"}
    here = [line for line in history if line["step"] == checkpoint.progress.step and line["kind"] in texts]
    newest: dict[str, dict[str, Any]] = {line["kind"]: line for line in here if line.get("perplexity") is not None}
    return [
        (f"perplexity, {texts[kind]} text", f"{line['perplexity']:.4f} a token" + _over(line))
        for kind, line in newest.items()
    ]


def _over(line: dict[str, Any]) -> str:
    return f", over {line['tokens']:,} tokens" if line.get("tokens") else ""


def _routing(checkpoint: Checkpoint, table: RoutingTable | None) -> list[tuple[str, str]]:
    moe = checkpoint.run.moe
    if not moe.facts.routed:
        return []
    served = f"{moe.top_k} of {moe.experts}" + (f", and {moe.shared_experts} shared" if moe.shared_experts else "")
    rows = [
        ("router", f"{moe.router}, stage {checkpoint.progress.stage}"),
        ("gate", moe.gate_name),
        ("experts of a token", f"{served}, at blocks {', '.join(map(str, moe.layers))}"),
    ]
    if table is None:
        network = f"by a frozen {moe.distilled.kind} network of token ids"
        return [*rows, ("routing", network if checkpoint.progress.stage == 2 else "learned, from hidden states")]
    partial = f" at blocks {', '.join(map(str, table.blocks))}, learned in the others"
    what = "by token id" + (partial if len(table.blocks) < len(moe.layers) else "")
    rows.append(("routing table", f"{what}; sha256 `{table.sha256}`"))
    if table.made.get("builder"):
        rows.append(("table made by", str(table.made["builder"])))
    if TOKEN_COUNTS in checkpoint.files:
        loads = table.expert_load(token_counts_of(checkpoint)).max(axis=1)
        text = ", ".join(f"{load:.2f}" for load in loads)
        rows.append(("max/mean load of the experts on the training text, by layer", text))
    return rows
