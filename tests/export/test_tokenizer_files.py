"""Tokenizers of exported folders give the ids that the model was trained on."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers

from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.export.tokenizer_files import write_tokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [
    "def f(x):\n    return x\n",
    "\tthree words here",
    "  two  spaces  ",
    "h\u00e9llo \u6f22\u5b57 \U0001f600",
    "a\r\nb",
    "",
]


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    write_tokenizer(tokenizer, folder, 77)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_model(tmp_path: Path, kind: Literal["unigram", "bpe"]) -> None:
    text = [LIBRARY / "textwrap.py", LIBRARY / "shlex.py"]
    ours = train_tokenizer(text, tmp_path / "tokenizer.model", 480, kind)
    theirs = exported(ours, tmp_path / "out")
    for text_of in [*TEXTS, (LIBRARY / "bisect.py").read_text()]:
        assert theirs(text_of)["input_ids"] == ours.encode(text_of)
        assert theirs.decode(ours.encode(text_of)) == text_of
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 3)
    assert (theirs.model_max_length, theirs.padding_side) == (77, "left")
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").fingerprint == ours.fingerprint


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A tokenizer.json whose template would put a token before each text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<begin>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train([str(LIBRARY / "textwrap.py")], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    "config", [None, {"eos_token": "<|endoftext|>", "add_bos_token": True, "pad_token": "<begin>"}]
)
def test_a_tokenizer_json(byte_level: Path, tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        byte_level.with_name("tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(byte_level)
    theirs = exported(ours, tmp_path / "out")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 1, ours.pad_id)
