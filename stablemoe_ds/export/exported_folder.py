"""``stablemoe export``: a checkpoint as a folder that transformers opens without this package."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from stablemoe_ds.checkpoint.attached import open_tokenizer
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.export.folder_settings import MODELING_FILE, folder_config, model_settings, plain_class, router_of
from stablemoe_ds.export.model_card import model_card
from stablemoe_ds.export.tensor_names import exported_tensors
from stablemoe_ds.export.tokenizer_files import write_tokenizer
from stablemoe_ds.export.weight_shards import write_shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 4_000_000_000


def export(
    source: str | Path,
    output: str | Path,
    dtype: str = "fp32",
    tokenizer_file: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[dict[str, Any], str]:
    """Write the folder ``output``, whole or not at all: (facts, text). Holds one shard of the weights in memory.

    source: checkpoint or run directory. dtype: "fp32" or "bf16", of the weights; routers are fp32. tokenizer_file:
    of a checkpoint that carries none.
    Raises UserError if the checkpoint is damaged or has no such folder, and if ``output`` exists or cannot be written.
    """
    began = time.perf_counter()
    checkpoint, output = Checkpoint.open(source), Path(output)
    if output.exists():
        raise UserError(f"{output} exists already: name a folder that does not exist yet")
    router = router_of(checkpoint)
    checkpoint.check_content(moments=False)
    tokenizer = _tokenizer(checkpoint, tokenizer_file)
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        size = _write(checkpoint, router, tokenizer, part, dtype, shard_bytes)
        part.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or part}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    facts = {
        "checkpoint": str(checkpoint.path),
        "output": str(output),
        "dtype": dtype,
        "router": router,
        "tokenizer": tokenizer is not None,
        "bytes": size,
        "seconds": time.perf_counter() - began,
    }
    own_code = ", trust_remote_code=True" if (output / MODELING_FILE).exists() else ""
    text = (
        f"wrote {output}: {size:,} bytes of {dtype} weights, {facts['seconds']:.1f} s; "
        f'AutoModelForCausalLM.from_pretrained("{output}"{own_code}) opens it'
    )
    return facts, text if tokenizer is not None else f"{text}. No tokenizer: the run names none"


def _tokenizer(checkpoint: Checkpoint, given: str | None) -> Tokenizer | None:
    """None if the run was trained on ids of an unknown tokenizer."""
    if given is None and not checkpoint.tokenizer:
        return None
    return open_tokenizer(checkpoint, given)


def _write(
    checkpoint: Checkpoint, router: str | None, tokenizer: Tokenizer | None, folder: Path, dtype: str, shard_bytes: int
) -> int:
    """Fill the folder; bytes of all weights."""
    run, table = checkpoint.run, checkpoint.table()
    special_ids = _special_ids(checkpoint, tokenizer)
    settings = model_settings(run, checkpoint.vocab_size, router)
    if table is not None and table.split is not None:
        settings |= {"split_ids": len(table.split.ids_J), "split_rows": table.split.further_rows}
    _json(folder / "config.json", folder_config(settings, str(DTYPES[dtype]).removeprefix("torch."), special_ids))
    _json(folder / "generation_config.json", special_ids)
    plain = plain_class(settings) is not None
    if not plain:
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, run.data.sequence_length)
    (folder / "README.md").write_text(model_card(checkpoint, table, plain), encoding="utf-8")
    return write_shards(folder, exported_tensors(checkpoint, table, DTYPES[dtype], plain), shard_bytes)


def _special_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, int]:
    """bos is eos: in training a document begins behind the eos of the one before, and no other id stands for it."""
    eos = tokenizer.eos_id if tokenizer is not None else checkpoint.run.data.eos_id
    if eos is None:
        return {}
    return {
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_id if tokenizer is not None else eos,
    }


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
