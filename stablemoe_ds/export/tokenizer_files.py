"""A tokenizer as files that ``AutoTokenizer`` of transformers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

from stablemoe_ds.data.huggingface_model import config_path
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError, one_line


def write_tokenizer(tokenizer: Tokenizer, folder: Path, sequence_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; of a sentencepiece model its own file, too.

    What a template would add to each text (a bos, say) is left out, as training never saw it: the eos that ends a
    document also stands before one. Raises UserError for a tokenizer that transformers cannot convert.
    """
    own_config: dict[str, Any] = {}
    if tokenizer.is_json:
        content = json.loads(tokenizer.path.read_text(encoding="utf-8-sig"))
        if config_path(tokenizer.path).exists():
            own_config = json.loads(config_path(tokenizer.path).read_text(encoding="utf-8"))
    else:
        content = _converted(tokenizer)
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    if (content.get("post_processor") or {}).get("type") != "ByteLevel":
        content["post_processor"] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    eos, pad = library.id_to_token(tokenizer.eos_id), library.id_to_token(tokenizer.pad_id)
    for name in ("auto_map", "add_bos_token", "add_eos_token"):
        own_config.pop(name, None)
    config = {
        "model_max_length": sequence_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **own_config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": pad if pad is not None else eos,
    }
    _write(folder / "tokenizer.json", content)
    _write(folder / "tokenizer_config.json", config)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _converted(tokenizer: Tokenizer) -> dict[str, Any]:
    """A sentencepiece model as the content of a tokenizer.json."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            "a sentencepiece tokenizer is exported by transformers, which is not installed: "
            "pip install 'stablemoe_ds[export]'"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(tokenizer.path, Path(folder, "tokenizer.model"))
        try:
            found = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # whatever the library raises, it is about this file
            raise UserError(f"transformers cannot convert tokenizer {tokenizer.path}: {one_line(error)}") from error
    content: dict[str, Any] = json.loads(found.backend_tokenizer.to_str())
    return content
