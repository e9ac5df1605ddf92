"""A ``tokenizer.json`` of Hugging Face as a tokenizer, through the library ``tokenizers``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Texts are encoded one at a time, by as many processes as were asked for. The library's own threads would compete with
# them, and it warns about threads after a fork. It reads this variable when it encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from stablemoe_ds.errors import UserError, one_line
from stablemoe_ds.files import open_file

EOS_NAMES = (
    "</s>",
    "<eos>",
    "<EOS>",
    "[EOS]",
    "<|eos|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)
"""What tokenizers call the token that ends a document, where nothing next to them says so."""

HOLES = 4096
"""Ids without a token that a vocabulary may have. Some released ones have dozens; thousands are damage."""


def config_path(path: Path) -> Path:
    """Where the library transformers keeps what a tokenizer.json does not say, its eos among it."""
    return path.with_name("tokenizer_config.json")


class HuggingFaceModel:
    """Ids as ``tokenizers`` gives them: without a template's special tokens, truncation, padding or dropout.

    What looks like a special token in a text is text. Where the tokenizer normalises, text does not come back as it
    was. eos is what ``tokenizer_config.json`` in the same folder calls ``eos_token``, else the one special token with
    a usual name.
    Raises UserError if the content is no tokenizer.json, or nothing says which token ends a document.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        with self._guarded("is no tokenizer.json, or damaged"):
            text = content.decode("utf-8-sig")
            parts = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True
            if getattr(self._tokenizer.model, "dropout", None) is not None:
                self._tokenizer.model.dropout = None
            vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
            added = self._tokenizer.get_added_tokens_decoder()
            for token in parts["added_tokens"]:  # the library would give it another id without an error
                if vocabulary[token["content"]] != token["id"]:
                    raise ValueError(f"added token {token['content']!r:.40} cannot have id {token['id']!r:.20}")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= len(vocabulary) + HOLES:
            raise UserError(
                f"tokenizer {path} has {len(vocabulary)} tokens but ids up to {self.vocab_size - 1}: damaged"
            )
        special = [token.content for token in added.values() if token.special]
        config = _read_config(config_path(path))
        self.eos_id = vocabulary[_eos(path, config.get("eos_token"), special, vocabulary)]
        self.pad_id = vocabulary.get(config.get("pad_token") or "", self.eos_id)
        self._silent = {self.eos_id, self.pad_id, *(vocabulary[token] for token in special)}
        by_bytes = '"ByteLevel"' in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")])
        self._bytes = _letters_of_bytes() if by_bytes else {}
        self._added = set(added)

    def encode(self, text: str) -> list[int]:
        with self._guarded("cannot encode a text"):
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        with self._guarded("cannot decode ids"):
            return self._tokenizer.decode([i for i in ids if i not in self._silent], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"<unused {token}>"
        if token not in self._added and all(letter in self._bytes for letter in piece):
            piece = bytes(self._bytes[letter] for letter in piece).decode(errors="backslashreplace")
        return piece.replace(" ", "▁")

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn whatever the library raises into a UserError; a panic of its Rust code is not an Exception."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"tokenizer {self._path} {what}: {one_line(error)[:200]}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """``eos_token`` and ``pad_token`` as plain text. Empty if there is no such file. Raises UserError."""
    try:
        with open_file(path) as file:
            found = json.load(file)
        tokens = {name: found.get(name) for name in ("eos_token", "pad_token")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; expected a JSON object") from error
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    for name, token in tokens.items():
        if token is not None and not isinstance(token, str):
            raise UserError(f"{path}: {name} is {token!r:.40}, expected a token")
    return tokens


def _eos(path: Path, named: str | None, special: list[str], vocabulary: dict[str, int]) -> str:
    """The token that ends a document. Raises UserError if that is unclear."""
    config = config_path(path)
    if named is not None:
        if named not in vocabulary:
            raise UserError(f"{config}: eos_token is {named!r:.60}, which {path} does not have")
        return named
    usual = [token for token in special if token in EOS_NAMES]
    if len(usual) == 1:
        return usual[0]
    found = f"{' and '.join(usual)} may" if usual else f"none of {', '.join(special[:8]) or 'no special tokens'} must"
    raise UserError(
        f"tokenizer {path} does not say which token ends a document ({found}): write "
        f'{{"eos_token": "..."}} into {config}'
    )


def _letters_of_bytes() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's ``bytes_to_unicode``), turned round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
