"""In what two runs differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import TinyData, small_run

DATA = TinyData(Path("text"), "tokenizer.model", "train", "valid")


def test_differences_leave_out_what_changes_nothing():
    one = small_run(DATA, Path("a"))
    two = small_run(DATA, Path("b"), logging={"every": 7}, checkpoint={"every": 3}, data={"workers": 1})
    assert list(differences(one, two.model_copy(update={"name": "other"}))) == []
    unknown = one.model_copy(update={"model": one.model.model_copy(update={"vocab_size": None})})
    assert list(differences(unknown, one)) == [], "the tokenizer fills it in"
    switches = [small_run(DATA, Path("a"), moe={"router": r}, stages={"at_step": 3}) for r in ("switch", "stablemoe")]
    later = [run.model_copy(update={"stages": run.stages.model_copy(update={"at_step": 4})}) for run in switches]
    found = [[key for key, _, _ in differences(*pair)] for pair in zip(switches, later, strict=True)]
    assert found == [[], ["stages.at_step"]], "routers of one stage do not look at it"
    seen = [
        [small_run(DATA, Path("a"), moe={"router": r, "router_input": i}) for i in ("raw", "normalized")]
        for r in ("hash", "switch")
    ]
    found = [[key for key, _, _ in differences(*pair)] for pair in seen]
    assert found == [[], ["moe.router_input"]], "a table with a gate of 1 has no centroids to meet it"
    biases = [
        [small_run(DATA, Path("a"), moe={"router": r, "bias_step": step}) for step in (0.1, 0.2)]
        for r in ("switch", "topk")
    ]
    found = [[key for key, _, _ in differences(*pair)] for pair in biases]
    assert found == [[], ["moe.bias_step"]], "only topk has a bias"
    other: RunConfig = small_run(DATA, Path("a"), optimizer={"lr": 0.5})
    assert list(differences(one, other)) == [("optimizer.lr", 1e-3, 0.5)]


def long_list(*changed: int) -> list[str]:
    return [f"corpora/part-{n:04d}" + "x" * (n in changed) for n in range(500)]


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        (1, 2, ("1", "2")),
        ("a", None, ('"a"', "null")),
        ("4", 4, ('"4"', "4")),
        ([1, 2], [1, 3], ("[1, 2]", "[1, 3]")),
        (
            "x" * 500 + "1" + "y" * 500,
            "x" * 500 + "2" + "y" * 500,
            (f"...{'x' * 16}1{'y' * 16}...", f"...{'x' * 16}2{'y' * 16}..."),
        ),
        ("x" * 500, "x" * 500 + "z", (f'...{"x" * 16}"', f'...{"x" * 16}z"')),
        ("x" * 500, None, ('"' + "x" * 59 + "...", "null")),
        ("é" * 70, "e\u0301" * 70, ('"\\u00e9', '"e\\u0301')),
        ("a\u200b", "a", ('"a\\u200b"', '"a"')),
        ("x" * 90 + "\n", "x" * 90 + " ", ("\\n", ' "')),
    ],
)
def test_of_long_values_the_part_that_differs_is_shown(one: object, other: object, shown: tuple[str, str]) -> None:
    found = show_both(one, other)
    for text, expected in zip(found, shown, strict=True):
        assert expected in text
        assert text.isprintable()
        assert len(text) <= 66
    assert found[0] != found[1]


@given(st.text(), st.text(), st.text(max_size=5), st.text(max_size=5), st.integers(0, 200))
def test_values_that_differ_never_look_alike(before: str, behind: str, one: str, other: str, times: int) -> None:
    ours, theirs = before * times + one + behind * times, before * times + other + behind * times
    assume(ours != theirs)
    found = show_both(ours, theirs)
    assert found[0] != found[1]
    assert all(len(text) < 700 and text.isprintable() for text in found)


def test_a_list_of_many_corpora_that_differs_in_one() -> None:
    without, with_it = show_both(long_list(), long_list(250))
    assert "part-0250x" in with_it
    assert 'part-0250"' in without
