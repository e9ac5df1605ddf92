"""A tokenizer.json of Hugging Face in the place of a sentencepiece model. The library alone is the reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from tests.data.hostile import STRANGE, complaint, refused_when_damaged

TEXT = "def area(width, height):\n\tif width < 0:\n        return None\n\n" * 20 + "the route of a token, été 中\n" * 30
EOS = "<|endoftext|>"


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's: every byte has a token."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=353, special_tokens=special, initial_alphabet=alphabet)
    )
    return made


def byte_fallback(special: list[str]) -> tokenizers.Tokenizer:
    """As Llama's: pieces with a sign for the space, and bytes for what has no piece."""
    pieces = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz\n"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(special)
    return made


def word_piece(special: list[str]) -> tokenizers.Tokenizer:
    """As BERT's: lower case, no accents, unknown words."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *special]))
    return made


MAKERS = {"byte level": byte_level, "byte fallback": byte_fallback, "word piece": word_piece}
EXACT = [name for name in MAKERS if name != "word piece"]


@pytest.fixture(scope="module", params=MAKERS)
def plain(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return MAKERS[request.param]([EOS])


def write(folder: Path, made: tokenizers.Tokenizer, config: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def test_ids_are_those_of_the_library(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, plain)
    tokenizer = Tokenizer(path)
    assert tokenizer.encode(TEXT) == plain.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.vocab_size == plain.get_vocab_size()
    assert tokenizer.eos_id == tokenizer.pad_id == plain.token_to_id(EOS)
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("one token"), tokenizer.eos_id]).strip() == "one token"


@pytest.fixture(scope="module", params=EXACT)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write(tmp_path_factory.mktemp("exact"), MAKERS[request.param]([EOS])))


@given(text=st.text() | st.text(f"\0\r\n\t \u2028\ufeff\u0301\ufffd\U0010ffff{EOS}"))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(exact: Tokenizer, text: str) -> None:
    ids = exact.encode(text)
    assert exact.decode(ids) == text
    assert all(0 <= i < exact.vocab_size and i != exact.eos_id for i in ids)


@pytest.mark.parametrize("name", EXACT)
def test_a_special_token_in_a_text_is_text(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(write(tmp_path, MAKERS[name]([EOS, "<pad>"])))
    text = f"a {EOS}<pad> b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_file_wants_of_every_encoding_is_not_done(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Templates, truncation, padding and dropout belong to fine-tuning; in a corpus they would be damage."""
    wanted = Tokenizer(write(tmp_path / "plain", plain)).encode(TEXT)
    changed = tokenizers.Tokenizer.from_str(plain.to_str())
    eos = (EOS, changed.token_to_id(EOS))
    changed.post_processor = processors.TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[eos])
    changed.enable_truncation(7)
    changed.enable_padding(length=5000)
    if isinstance(changed.model, models.BPE):
        changed.model.dropout = 0.9
    assert Tokenizer(write(tmp_path / "changed", changed)).encode(TEXT) == wanted


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_corpus(tmp_path: Path, name: str, workers: int) -> None:
    """Also of a tokenizer that normalises: words, characters and bytes are those of the text."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "ÀÉ ＡＢ\u00ad ☃\n")
    tokenizer = Tokenizer(write(tmp_path, MAKERS[name]([EOS])))
    info = prepare([text], tokenizer, tmp_path / "out", workers, "line")
    lines = [line for line in text.read_text().split("\n") if line.strip()]
    assert info == PreparedInfo.read(tmp_path / "out", tokenizer)
    assert (info.documents, info.words) == (len(lines), sum(len(line.split()) for line in lines))
    assert info.characters == sum(map(len, lines))
    assert info.stream().tolist() == [i for line in lines for i in (*tokenizer.encode(line), tokenizer.eos_id)]


def test_added_tokens_beyond_the_vocabulary_and_ids_without_a_token(tmp_path: Path) -> None:
    made = byte_level([EOS])
    made.add_tokens([AddedToken("routed", special=False)])
    parts = json.loads(made.to_str())
    parts["model"]["vocab"]["far"] = 400
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parts))
    assert "added token 'routed' cannot have id" in (complaint(lambda: Tokenizer(path), "tokenizer.json") or "")
    parts["added_tokens"][-1]["id"] += 1
    path.write_text(json.dumps(parts))
    tokenizer = Tokenizer(path)
    (added,) = tokenizer.encode("routed")
    assert (tokenizer.vocab_size, added) == (401, parts["added_tokens"][-1]["id"])
    assert [tokenizer.piece(i) for i in (added, 399, 400)] == ["routed", "<unused 399>", "far"]
    assert tokenizer.decode([added, 399]) == "routed"
    parts["model"]["vocab"]["far"] = 4_000_000_000
    path.write_text(json.dumps(parts))
    assert "ids up to 4000000000" in (complaint(lambda: Tokenizer(path), "tokenizer.json") or "")


def test_pieces_can_be_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_level([EOS])))
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    assert all(piece and piece.isprintable() for piece in pieces)
    assert {"▁", "\\n", "\\t", "a", "\\xe9", EOS} <= set(pieces)
    assert "▁width" in [tokenizer.piece(i) for i in tokenizer.encode("if width")]


@pytest.mark.parametrize(
    ("special", "config", "eos"),
    [
        ([EOS, "<pad>"], None, EOS),
        (["<s>", "</s>"], None, "</s>"),
        (["<s>", "</s>", EOS], {"eos_token": "</s>"}, "</s>"),
        (["[CLS]", "[SEP]"], {"eos_token": {"content": "[SEP]", "lstrip": False}}, "[SEP]"),
        ([EOS, "<end>"], {"eos_token": "<end>", "pad_token": None}, "<end>"),
        ([EOS], {"model_max_length": 9}, EOS),
    ],
)
def test_which_token_ends_a_document(tmp_path: Path, special: list[str], config: object, eos: str) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_level(special), config))
    assert tokenizer.piece(tokenizer.eos_id) == eos
    names = [path.name for path in tokenizer.files]
    assert names == ["tokenizer.json"] + ["tokenizer_config.json"] * (config is not None)


@pytest.mark.parametrize(
    ("special", "config", "said"),
    [
        ([], None, "does not say which token ends a document"),
        (["[CLS]", "[SEP]"], None, "none of [CLS], [SEP]"),
        (["</s>", EOS], None, "</s> and <|endoftext|> may"),
        ([EOS], {"eos_token": "</s>"}, "eos_token is '</s>', which"),
        ([EOS], {"eos_token": 7}, "eos_token is 7"),
        ([EOS], [1], "expected a JSON object"),
    ],
)
def test_nothing_says_which_token_ends_a_document(
    tmp_path: Path, special: list[str], config: object, said: str
) -> None:
    path = write(tmp_path, byte_level(special), config)
    assert said in (complaint(lambda: Tokenizer(path), str(tmp_path)) or "")
    assert "tokenizer_config.json" in (complaint(lambda: Tokenizer(path), str(tmp_path)) or "")


def test_pad_token_of_the_configuration(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_level([EOS, "<pad>"]), {"pad_token": "<pad>"}))
    assert tokenizer.piece(tokenizer.pad_id) == "<pad>"
    assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode("a")]) == "a"


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b'{"model": {}}', b'{"eos_token": "a"}', b"[1]", b"{\xff}", b"{" * 9000, b'{"a":' * 9000]
)
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert complaint(lambda: Tokenizer(path), "tokenizer.json")


@pytest.mark.parametrize("spoil", STRANGE)
def test_configuration_that_is_no_file(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = write(tmp_path, byte_level([EOS]), {})
    spoil(tmp_path / "tokenizer_config.json")
    if spoil.__name__ == "missing":
        assert Tokenizer(path).files == [path]
    else:
        assert complaint(lambda: Tokenizer(path), "tokenizer_config.json")


def test_text_that_it_cannot_encode(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, EOS: 1}))
    made.add_special_tokens([EOS])
    tokenizer = Tokenizer(write(tmp_path, made))
    assert tokenizer.encode("a") == [0]
    assert "cannot encode" in (complaint(lambda: tokenizer.encode("b"), "tokenizer.json") or "")
    with pytest.raises(UserError, match="at character 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_file_neither_crashes_nor_fails_later(tmp_path: Path, name: str) -> None:
    assert 100 < refused_when_damaged(write(tmp_path, MAKERS[name]([EOS])), cut_every=8) < 400
