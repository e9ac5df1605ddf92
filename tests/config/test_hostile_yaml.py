"""YAML made to do harm, or by accident as bad: one line that says where and why, and nothing of it is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stablemoe_ds.config.load import LARGEST_FILE, load_run
from stablemoe_ds.errors import UserError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "a billion laughs": (LAUGHS, ":2:8: "),
    "itself": ("model: &model\n  layers: *model\n", "aliases"),
    "merged into itself": ("a: &a {b: 1}\nmodel: {<<: *a}\n", "aliases"),
    "a command": ("name: !!python/object/apply:os.system [touch PATH]\n", "the tag"),
    "a class": ("model: !!python/object:builtins.object {}\n", "the tag"),
    "a module": ("name: !!python/name:os.system\n", "the tag"),
    "a tag over two lines": ("name: !a%0Ab x\n", "the tag !a\\nb"),
    "a tag that is long": (f"name: !{'a' * 9000} x\n", "the tag !aaa"),
    "a key that is long": (f"{'a' * 900}: 1\n" * 2, ":2:1: "),
    "a key of two lines": ('"a\\nb": 1\n"a\\nb": 2\n', "'a\\nb' is there twice"),
    "nested blocks": ("- " * 5000, "deeper than"),
    "nested maps": ("{a: " * 5000, "deeper than"),
    "nested by indentation": ("".join(" " * n + "a:\n" for n in range(300)), "deeper than"),
    "tabs": ("model:\n\tlayers: 1\n", "cannot start any token"),
    "two documents": ("a: 1\n---\nb: 2\n", "single document"),
    "a number as a key": ("model: {1: 2}\n", "must be a name"),
    "nothing as a key": ("model: {null: 2}\n", "must be a name"),
    "a list as a key": ("model: {[1]: 2}\n", "must be a name"),
    "an integer of a megabit": (f"seed: {'9' * 100_000}\n", "out of range"),
    "an integer that is none": ("seed: !!int abc\n", "invalid literal"),
    "an endless number": ("optimizer: {lr: 1e400}\n", "out of range"),
}


def refusal(path: Path, content: bytes, *overrides: str) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_run(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_one_line(tmp_path: Path, name: str) -> None:
    text, said = REFUSED[name]
    path, trace = tmp_path / "run.yaml", tmp_path / "trace"
    message = refusal(path, text.replace("PATH", str(trace)).encode())
    assert message.startswith(str(path))
    assert said in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300
    assert not trace.exists(), "it was executed"


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "2020-01-01", "1:30", "0x10", "010", "1e", "NaN", "=", "<<"]
)
def test_what_yaml_takes_for_a_number_or_a_date_is_text_here(small: Path, value: str) -> None:
    message = refusal(small, small.read_bytes(), f"optimizer.lr={value}")
    assert message == f'override optimizer.lr={value}: optimizer.lr: got "{value}": expected a number'


def test_mark_at_the_start_is_left_out(small: Path) -> None:
    plain = load_run(small)
    small.write_bytes(b"\xef\xbb\xbf" + small.read_bytes())
    assert load_run(small) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "cp500"])
def test_other_encodings_are_refused(small: Path, encoding: str) -> None:
    assert refusal(small, small.read_text().encode(encoding)).startswith(f"{small}: ")


def test_fifty_megabytes_are_not_read(small: Path) -> None:
    os.truncate(small, 50_000_000)
    with pytest.raises(UserError, match=f"larger than {LARGEST_FILE} bytes"):
        load_run(small)


@pytest.mark.parametrize("unit", ["a: 1\n", "{},", "[1],", "&a b,", "- x\n", "#\n", "\\x41", "'", ": ", "\r", "? a\n"])
def test_largest_file_of_anything_ends_in_a_complaint(small: Path, unit: str) -> None:
    for start in ("", "moe: {layers: [", 'name: "'):
        message = refusal(small, (start + unit * LARGEST_FILE)[: LARGEST_FILE // 4].encode())
        assert all(len(line) < 800 for line in message.splitlines())


def test_path_and_overrides_cannot_forge_lines(tmp_path: Path) -> None:
    folder = tmp_path / "a\nmodel.heads: fine \udcff"
    folder.mkdir()
    message = refusal(folder / "run.yaml", b"seed: 1\nseed: 2\n")
    assert message.isprintable()
    assert "a\\nmodel.heads: fine \\udcff/run.yaml:2:1: " in message


def test_override_that_is_nested_without_end(small: Path) -> None:
    assert "expected key.sub=value" in refusal(small, small.read_bytes(), ".".join(["deepspeed"] * 50_000) + "=1")
    assert "nested deeper than" in refusal(small, small.read_bytes(), "deepspeed=" + "[" * 5_000)
