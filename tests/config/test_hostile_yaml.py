"""YAML made to do harm, or by accident as bad: one line that says where and why, and nothing of it is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stablemoe_ds.config import yamltext
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.textfile import LARGEST_YAML
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
    "an integer that is none": ("seed: !!int abc\n", "the tag"),
    "a tag of YAML's own": ("seed: !!int 5\n", "the tag"),
    "a merge key": ("model: {<<: {layers: 1}}\n", ":1:9: "),
    "an alias as a key": ("a: &a b\nmodel: {*a : 1}\n", ":2:9: "),
    "an alias of nothing": ("a: *b\n", ":1:4: "),
    "a date": ("name: run\nrun_dir: 2020-01-01\n", ":2:10: invalid YAML: the date 2020-01-01"),
    "a moment": ("name: 2020-01-01 10:00:00\n", "put quotes around it"),
    "infinity": ("deepspeed: {a: [1, .inf]}\n", ":1:20: "),
    "less than all": ("seed: -.INF\n", ":1:7: "),
    "no number": ("seed: .nan\n", ":1:7: "),
    "an integer of 65 bits": ("seed: 0x8000000000000000\n", ":1:7: "),
    "an integer without digits": ("seed: -_\n", ":1:7: "),
    "a control character": (
        "name: a\nrun_dir: b\x1b[31m\n",
        ":2:11: the character U+001B is not allowed",
    ),
    "an escape too large": ('name: "\\UFFFFFFFF"\n', ":1:"),
    "half a pair": ('name: "\\ud800"\n', ":1:7: "),
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


@pytest.mark.parametrize("value", ["1:30", "1e", "NaN", "=", "no", "off", "y", "1.2.3", "6e-4x", "190:20:30.15"])
def test_what_yaml_1_1_takes_for_something_else_is_text(small: Path, value: str) -> None:
    message = refusal(small, small.read_bytes(), f"optimizer.lr={value}")
    assert message == f'override optimizer.lr={value}: optimizer.lr: got "{value}": expected a number'
    small.write_bytes(b"%YAML 1.1\n---\n" + small.read_bytes())
    assert load_run(small, [f"name={value}"]).name == value, "a directive does not change the rules"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "2020-01-01", "<<"])
def test_what_yaml_1_2_takes_for_no_plain_value_is_refused(small: Path, value: str) -> None:
    message = refusal(small, small.read_bytes(), f"name={value}")
    assert message.startswith(f"override name={value}:1:1: invalid YAML: ")
    assert load_run(small, [f"name='{value}'"]).name == value


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("-7", -7), ("0x10", 16), ("0o17", 15), ("1_000", 1000), ("08", 8), ("0", 0)]
)
def test_integers_are_those_of_yaml_1_2(text: str, number: int) -> None:
    assert yamltext.parse(f"a: {text}", "here") == {"a": number}


@pytest.mark.parametrize(
    ("text", "number"), [("6e-4", 6e-4), ("1E3", 1e3), (".5", 0.5), ("-1.", -1.0), ("1_0.5e+2", 1050.0), ("08.5", 8.5)]
)
def test_numbers_with_an_exponent_need_no_point(text: str, number: float) -> None:
    assert yamltext.parse(f"a: {text}", "here") == {"a": number}


def test_mark_at_the_start_is_left_out(small: Path) -> None:
    plain = load_run(small)
    small.write_bytes(b"\xef\xbb\xbf" + small.read_bytes())
    assert load_run(small) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "cp500"])
def test_other_encodings_are_refused(small: Path, encoding: str) -> None:
    message = refusal(small, small.read_text().encode(encoding))
    assert message.startswith(f"{small}:")
    assert "save it as UTF-8" in message


def test_fifty_megabytes_are_not_read(small: Path) -> None:
    os.truncate(small, 50_000_000)
    with pytest.raises(UserError, match=f"larger than {LARGEST_YAML} bytes"):
        load_run(small)


@pytest.mark.parametrize("unit", ["a: 1\n", "{},", "[1],", "&a b,", "- x\n", "#\n", "\\x41", "'", ": ", "\r", "? a\n"])
def test_largest_file_of_anything_ends_in_a_complaint(small: Path, unit: str) -> None:
    for start in ("", "moe: {layers: [", 'name: "'):
        message = refusal(small, (start + unit * LARGEST_YAML)[: LARGEST_YAML // 4].encode())
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
