"""``stablemoe table bounds``: from a corpus to loads, a picture, and complaints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.evaluation.bounds_report import EVEN_OF_ITSELF, EVEN_SPLIT
from stablemoe_ds.tables.builders import even_table, random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.cli.test_bad_input import complaint
from tests.tables.texts import slow_experts, split_at_random
from tests.training.runs import VOCAB, TinyData, command_here


@pytest.fixture
def lines(data: TinyData, tmp_path: Path) -> str:
    """A corpus with a document a line."""
    prepare([data.text], Tokenizer(data.tokenizer), tmp_path / "lines", documents="line")
    return str(tmp_path / "lines")


def test_loads_are_those_of_the_last_tenth(lines: str, tmp_path: Path) -> None:
    info = PreparedInfo.read(lines)
    kept = info.documents - round(info.documents / 10)
    border = int(info.lengths()[:kept].sum())
    made, judged = (np.bincount(part, minlength=VOCAB) for part in (info.stream()[:border], info.stream()[border:]))
    given = RoutingTable(random_table(VOCAB, 8, 2, 2, seed=3), 8, (1, 2), info.tokenizer)
    given.save(tmp_path / "mine.safetensors")

    words = ("--experts", "4", "8", "--ranks", "2", "--capacity", "1.5", "--table", str(tmp_path / "mine.safetensors"))
    found = command_here("table", "bounds", lines, *words, "--json").json
    assert found["judged_on"] == {"tokens": int(judged.sum()), "documents": info.documents - kept}
    assert [(b["experts"], b["top_k"], b["ranks"]) for b in found["bounds"]] == [(4, 1, 2), (8, 1, 2), (8, 2, 2)]
    four, _, two = found["bounds"]
    assert four["forced"] == pytest.approx(judged.max() / judged.sum() * 4)
    loads = {table["table"]: table["expert_load"] for table in four["tables"]}
    assert list(loads) == ["round-robin", "random", "even", EVEN_OF_ITSELF]
    tables = {"even": even_table(made, 4, 1, 1, 0), EVEN_OF_ITSELF: even_table(judged, 4, 1, 1, 0)}
    for name, table_LVK in tables.items():
        assert loads[name] == pytest.approx(RoutingTable(table_LVK, 4, (1,)).expert_load(judged)[0].tolist())
    for block, expected in zip((1, 2), given.expert_load(judged), strict=True):
        (mine,) = (table for table in two["tables"] if table["table"] == f"mine.safetensors, block {block}")
        assert mine["expert_load"] == pytest.approx(expected.tolist())
        assert mine["rank_load"] == pytest.approx(expected.reshape(2, 4).mean(1).tolist())
        assert mine["dropped"].keys() == {"1.5"}


def test_split_ids_are_judged_by_the_rows_that_tokens_follow(lines: str, data: TinyData, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    plain = RoutingTable(random_table(VOCAB, 32, 1, 1, seed=3), 32, (1,), Tokenizer(data.tokenizer).fingerprint)
    given = split_at_random(plain, list(range(0, VOCAB, 2)), 2)
    given.save(file)
    words = ("--heldout", data.valid, "--experts", "32", "--split", "1.2", "--table", str(file))
    (shape,) = command_here("table", "bounds", lines, *words, "--json").json["bounds"]
    loads = {table["table"]: table["expert_load"] for table in shape["tables"]}
    served_N = np.zeros(32)
    for experts in slow_experts(given, PreparedInfo.read(data.valid).stream().tolist())[0]:
        served_N[experts] += 1
    assert loads["mine.safetensors"] == pytest.approx((served_N / served_N.mean()).tolist())
    assert max(loads[EVEN_SPLIT]) < shape["least"] <= max(loads["even"])
    said = command_here("table", "bounds", lines, *words, "--plot", str(tmp_path / "load.png")).out
    assert "no table of whole ids goes below a max/mean load" in said
    unsplit = command_here("table", "bounds", lines, "--experts", "2", "--split", "1.2", "--json").json["bounds"][0]
    assert EVEN_SPLIT not in [table["table"] for table in unsplit["tables"]], "no id has to be split"


def test_another_text_a_picture_and_words(lines: str, data: TinyData, tmp_path: Path) -> None:
    words = ("table", "bounds", lines, "--heldout", data.valid, "--experts", "4", "6", "--top-k", "1", "2")
    picture = tmp_path / "load.png"
    said = command_here(*words, "--tokenizer", data.tokenizer, "--cooccurrence", "--plot", str(picture)).out
    facts = command_here(*words, "--json").json
    assert facts["judged_on"]["tokens"] == PreparedInfo.read(data.valid).tokens
    assert f"4 experts, top-1, on 4 ranks of 1: p_max N / k = {facts['bounds'][0]['forced']:.2f}" in said
    assert "6 experts, top-2, on 2 ranks of 3" in said
    assert "cooccurrence" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_judged_is_refused_in_a_line_each(lines: str, data: TinyData, tmp_path: Path) -> None:
    RoutingTable(random_table(VOCAB + 1, 4, 1, 1, seed=0), 4, (1,)).save(tmp_path / "other")
    words = ("--experts", "6", "--top-k", "7", "--ranks", "4", "--table", str(tmp_path / "other"))
    answer = command_here("table", "bounds", lines, *words)
    said = answer.err.splitlines()
    assert (answer.code, len(said)) == (2, 3)
    assert "--experts: got 6: 4 ranks hold as many experts each; nearest that works: 8" in said[0]
    assert "--top-k: got 7: an id cannot have more than the 6 experts there are; nearest that works: 6" in said[1]
    assert f"--table other: the routing table has {VOCAB + 1} ids, the corpus has {VOCAB}" in said[2]
    words = ("--experts", "0", "--capacity", "nan", "--batch-tokens", "-1", "--seed", "-1")
    assert len(command_here("table", "bounds", lines, *words).err.splitlines()) == 4
    complaint(command_here("table", "bounds", data.train), "expected at least 2")
