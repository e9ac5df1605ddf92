"""``stablemoe table``: from a corpus, a run or a table to a table, and what is said of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.cli import main
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.table_corpus import text_digest
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import RoutingTable
from tests.cli.test_bad_input import complaint
from tests.training.runs import VOCAB, TinyData, checkpoint_of, command, command_here


def build(how: str, output: Path, *words: str) -> Any:
    """In a process of its own where a model is built: this one may have process groups already."""
    run = command if how in ("frozen", "observed") else command_here
    return run("table", "build", how, *words, "--output", str(output), "--json").json


def without_version(table: RoutingTable) -> dict[str, Any]:
    return {name: value for name, value in table.made.items() if name != "version"}


@pytest.fixture
def table(data: TinyData, tmp_path: Path) -> Path:
    path = tmp_path / "table.safetensors"
    build("cooccurrence", path, "dims=16", "--data", data.train, "--experts", "4", "--layers", "1")
    return path


@pytest.mark.parametrize("how", ["random", "even", "scattered", "cooccurrence"])
def test_from_a_corpus(how: str, data: TinyData, tmp_path: Path) -> None:
    path = tmp_path / "made" / "table.safetensors"
    words = ("--data", data.train, "--experts", "4", "--layers", "1", "3", "--top-k", "2", "--seed", "5")
    facts = build(how, path, *words)
    table = RoutingTable.read(path)
    assert (facts["sha256"], facts["made"]["builder"], facts["made"]["seed"]) == (table.sha256, how, 5)
    assert (table.blocks, table.vocab_size, table.top_k, table.experts) == ((1, 3), VOCAB, 2, 4)
    assert [layer["block"] for layer in facts["measured"]] == [1, 3]
    said = command_here("table", "build", how, *words, "--output", str(path)).out
    assert f"max/mean load {facts['measured'][0]['max_load']:.2f}" in said
    assert f"Cohesion {facts['measured'][0]['cohesion']:.3f}" in said
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_options_are_taken(table: Path, data: TinyData, tmp_path: Path) -> None:
    assert RoutingTable.read(table).made["options"]["dims"] == 16
    facts = build(
        "even", tmp_path / "large", "--data", data.train, "--experts", "4", "--layers", "1", "--vocab-size", "512"
    )
    assert facts["vocab_size"] == 512


def test_show(table: Path, data: TinyData) -> None:
    bare = command_here("table", "show", str(table), "--json").json
    assert "measured" not in bare
    words = ("table", "show", str(table), "--data", data.valid, "--tokenizer", data.tokenizer, "--top", "3")
    (layer,) = command_here(*words, "--json").json["measured"]
    assert len(layer["experts"]) == 4
    assert all(len(expert["pieces"]) <= 3 for expert in layer["experts"])
    assert layer["max_load"] == pytest.approx(max(expert["load"] for expert in layer["experts"]))
    said = command_here(*words).out
    assert "builder cooccurrence, options (window 1, sides both" in said
    commonest = max((piece for expert in layer["experts"] for piece in expert["pieces"]), key=lambda p: p["count"])
    assert commonest["piece"] in said


def test_show_of_a_run_takes_its_text(finished: RunConfig) -> None:
    (layer,) = command_here("table", "show", finished.directory, "--json").json["measured"]
    (reported,) = command_here("routing", "report", finished.directory, "--json").json["layers"]
    assert layer["max_load"] == pytest.approx(reported["max_load"])
    assert layer["experts"] == reported["experts"]


def test_diff(table: Path, data: TinyData, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    names = np.array([2, 0, 3, 1], np.int32)
    mine = RoutingTable.read(table)
    RoutingTable(names[mine.expert_LVK], 4, mine.blocks, mine.tokenizer).save(other)
    assert "0.0% of ids at another expert" in command_here("table", "diff", str(table), str(other)).out
    build("random", other, "--data", data.train, "--experts", "4", "--layers", "1")
    facts = command_here("table", "diff", str(table), str(other), "--data", data.valid, "--json").json
    (layer,) = facts["layers"]
    assert 0 < layer["ids_moved"] < 0.75
    assert 0 < layer["tokens_moved"] < 0.75
    assert facts["one"] == {
        "sha256": mine.sha256,
        "layers": 1,
        "vocab_size": VOCAB,
        "top_k": 1,
        "experts": 4,
        "builder": "cooccurrence",
    }
    assert layer["cohesion"][0] > layer["cohesion"][1]
    said = command_here(
        "table", "diff", str(table), str(other), "--data", data.valid, "--tokenizer", data.tokenizer, "--top", "2"
    ).out
    heaviest = layer["moved"][0]
    assert [moved["moved"] for moved in layer["moved"]] == sorted((m["moved"] for m in layer["moved"]), reverse=True)
    assert len(layer["moved"]) == 12
    assert RoutingTable.read(table).expert_LVK[0, heaviest["id"]].tolist() == heaviest["experts"][0]
    assert re.search(
        rf"{re.escape(Tokenizer(data.tokenizer).piece(heaviest['id']))} +{heaviest['count']:,} +100%", said
    )
    assert "have a counterpart" not in said
    assert f"{layer['ids_moved']:.1%} of ids and {layer['tokens_moved']:.1%} of tokens at another expert" in said


def test_diff_of_other_sizes_and_of_a_run(finished: RunConfig, data: TinyData, table: Path, tmp_path: Path) -> None:
    """Sizes are named; a run's own text and tokenizer are taken."""
    large = tmp_path / "large"
    build("resized", large, str(table), "--data", data.train, "--experts", "6")
    said = command_here("table", "diff", str(large), str(table)).out
    assert re.search(r"one +resized +[0-9a-f]{12} +1 +\d+ +1 +6\nother +cooccurrence", said)
    assert "No more than 4 of the 6 experts have a counterpart: the ids of the others count as moved" in said
    random = tmp_path / "random"
    build("random", random, "--data", data.train, "--experts", "4", "--layers", "2")
    (layer,) = command_here("table", "diff", str(random), finished.directory, "--json").json["layers"]
    (shown,) = command_here("table", "show", finished.directory, "--json").json["measured"]
    assert layer["load"][1] == pytest.approx(shown["max_load"])
    assert not layer["moved"][0]["piece"].isdigit()


def test_frozen(finished: RunConfig, tmp_path: Path) -> None:
    """Of stage 2 its table; of stage 1 what a switch would freeze: other vectors, so another table."""
    kept = RoutingTable.read(Path(finished.directory) / "routing_table.safetensors")
    text = text_digest(finished.data.train)
    origin = {"run": finished.directory, "router": "stablemoe", "corpus": text}
    assert origin | {"builder": "frozen", "step": 6} == without_version(kept)
    late = build("frozen", tmp_path / "two", finished.directory)
    assert late["sha256"] == kept.sha256
    assert RoutingTable.read(tmp_path / "two").made == kept.made
    (shown,) = command_here("table", "show", finished.directory, "--json").json["measured"]
    assert late["measured"][0]["max_load"] == pytest.approx(shown["max_load"])
    assert late["measured"][0]["cohesion"] == pytest.approx(shown["cohesion"])
    early = build("frozen", tmp_path / "one", str(checkpoint_of(finished, 3)))
    assert early["sha256"] != kept.sha256
    assert origin | {"builder": "frozen", "step": 3} == without_version(RoutingTable.read(tmp_path / "one"))
    limited = build("frozen", tmp_path / "limited", finished.directory, "--max-load", "1.3")
    (layer,) = command_here(
        "table", "show", str(tmp_path / "limited"), "--data", *(s.path for s in finished.data.train), "--json"
    ).json["measured"]
    assert limited["made"]["options"] == {"max_load": 1.3}
    assert layer["max_load"] <= max(1.3, layer["least_load"]) + 1e-9


def test_observed(finished: RunConfig, data: TinyData, tmp_path: Path) -> None:
    """In stage 2 the table itself, wherever an id occurs; in stage 1 what the learned router does, most of the time."""
    words = ("--data", data.train)
    again = build("observed", tmp_path / "two", finished.directory, *words)
    assert again["made"]["explained"] == [1.0]
    origin = {"run": finished.directory, "router": "stablemoe", "step": 12, "stage": 2}
    assert origin | {"corpus": text_digest([Source(path=data.train)])} == {
        name: again["made"][name] for name in (*origin, "corpus")
    }
    assert again["measured"][0]["max_load"] > 1
    assert again["measured"][0]["cohesion"] > 0
    few = build("observed", tmp_path / "few", finished.directory, *words, "--tokens", "100")
    assert (few["made"]["tokens"], few["made"]["explained"]) == (100, [1.0])
    assert again["made"]["tokens"] > 1000
    diff = command_here("table", "diff", str(tmp_path / "two"), finished.directory, *words, "--json").json
    assert diff["layers"][0]["tokens_moved"] < 1e-3, "the last id of a text is followed by nothing, so it is not read"
    early = command("table", "build", "observed", str(checkpoint_of(finished, 3)), "--output", str(tmp_path / "one"))
    (share,) = RoutingTable.read(tmp_path / "one").made["explained"]
    assert 0.25 < share < 1
    assert f"the table reproduces {share:.1%} of the routing of" in early.out


@pytest.mark.distributed
def test_observed_by_two_processes(finished: RunConfig, tmp_path: Path) -> None:
    tables = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}"
        words = ("table", "build", "observed", str(checkpoint_of(finished, 3)), "--output", str(path))
        assert command(*words, ranks=ranks).code == 0
        tables.append(RoutingTable.read(path))
    assert tables[0].sha256 == tables[1].sha256
    assert tables[0].made == tables[1].made


def test_from_another_table(table: Path, data: TinyData, tmp_path: Path) -> None:
    facts = build("balanced", tmp_path / "even", str(table), "--data", data.train, "--max-load", "1.05")
    (layer,) = facts["measured"]
    assert layer["max_load"] <= max(1.05, layer["least_load"]) + 1e-9
    assert facts["made"]["table"]["sha256"] == RoutingTable.read(table).sha256
    facts = build("resized", tmp_path / "large", str(table), "--data", data.train, "--experts", "12")
    (layer,) = facts["measured"]
    assert facts["experts"] == 12
    assert layer["max_load"] <= max(1.3, layer["least_load"]) + 1e-9
    assert layer["cohesion"] > layer["cohesion_random"]


CORPUS = ("--experts", "4", "--layers", "1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("build", "even", "--data", "/nowhere/text", *CORPUS), r"no prepared corpus at /nowhere/text"),
        (("build", "even", "dims", "--data", "{train}", *CORPUS), r"option 'dims': expected key=value"),
        (("build", "even", "dims=3", "--data", "{train}", *CORPUS), r"unknown option dims"),
        (("build", "cooccurrence", "dims=x", "--data", "{train}", *CORPUS), r"dims: got 'x'"),
        (("build", "even", "--data", "{train}", *CORPUS, "--tokenizer", "{other}"), r"was made by tokenizer"),
        (("build", "balanced", "{table}", "--data", "{train}", "--max-load", "0.5"), r"--max-load: got 0.5"),
        (
            ("build", "resized", "{table}", "--data", "{train}", "--experts", "0"),
            r"--experts: got 0: expected at least 1",
        ),
        (("build", "resized", "{table}", "--experts", "7"), r"--data: got none: expected prepared corpora"),
        (("build", "frozen", "{table}"), r"no checkpoint at"),
        (("show", "{train}.bin"), r"is not a routing table"),
        (("show", "{table}", "--data", "{train}", "--tokenizer", "{other}"), r"was made by tokenizer"),
        (("diff", "{table}", "/nowhere/table"), r"nothing at /nowhere/table: expected a table file, a checkpoint or"),
        (("show", "{table}", "--top", "-3"), r"--top: got -3: expected at least 0"),
        (("diff", "{table}", "{table}", "--top", "-1"), r"--top: got -1"),
        (("build", "observed", "{table}", "--tokens", "0"), r"--tokens: got 0: expected at least 1"),
        (
            ("build", "even", "--data", "{train}", "--experts", "0", "--layers", "1"),
            r"experts are 0, expected 1 or more",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(words: tuple[str, ...], expected: str, data: TinyData, table: Path, tmp_path: Path) -> None:
    other = train_tokenizer([data.text], tmp_path / "other.model", 400)
    known = {"train": data.train, "table": str(table), "other": str(other.path)}
    output = ("--output", str(tmp_path / "out")) if words[0] == "build" else ()
    complaint(command_here("table", *(word.format(**known) for word in words), *output), expected)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(table: Path, data: TinyData) -> None:
    words = ("table", "build", "even", "--data", data.train, *CORPUS, "--output", f"{table}/below")
    complaint(command_here(*words), r"cannot write routing table .*below")


def test_a_checkpoint_without_a_table_says_how_to_make_one(finished: RunConfig) -> None:
    answer = command_here("table", "show", str(checkpoint_of(finished, 3)))
    complaint(answer, r"has no routing table: it is of stage 1; 'stablemoe table build frozen' or 'observed' makes one")


def test_a_checkpoint_whose_text_is_gone_is_shown_unmeasured(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise UserError("no prepared corpus /nowhere/train")

    monkeypatch.setattr("stablemoe_ds.checkpoint.attached.find_corpora", gone)
    answer = command_here("table", "show", finished.directory)
    assert answer.code == 0
    assert "not measured by the run's text: no prepared corpus /nowhere/train" in answer.out


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_export_and_wherever_a_table_is_named(table: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "exported" / "model.safetensors"
    words = ("--format", "deepseek-v4", "--dtype", dtype, "--output", str(path))
    assert f"wrote {path}" in command_here("table", "export", str(table), *words).out
    mine, other = (command_here("table", "show", str(one), "--json").json for one in (table, path))
    assert mine == other
    assert "0.0% of ids at another expert" in command_here("table", "diff", str(table), str(path)).out
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("form", ["deepseek-v4", "megatron", "npz"])
def test_export_and_import_give_the_table_back(table: Path, tmp_path: Path, form: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert command_here("table", "export", str(table), "--format", form, "--output", str(there)).code == 0
    assert f"wrote {back}" in command_here("table", "import", str(there), "--output", str(back)).out
    before, after = RoutingTable.read(table), RoutingTable.read(back)
    assert (after.sha256, after.tokenizer, after.made) == (before.sha256, before.tokenizer, before.made)


def test_import_says_what_a_file_of_others_leaves_open(data: TinyData, tmp_path: Path) -> None:
    vocab = Tokenizer(data.tokenizer).vocab_size
    np.savez(tmp_path / "other.npz", table=np.random.default_rng(1).integers(1, 4, (2, vocab, 1)))
    words = ("table", "import", str(tmp_path / "other.npz"), "--output", str(tmp_path / "ours"))
    more = ("--experts", "8", "--layers", "2", "5", "--tokenizer", data.tokenizer)
    assert command_here(*words, *more).code == 0
    read = RoutingTable.read(tmp_path / "ours")
    assert (read.experts, read.blocks, read.tokenizer) == (8, (2, 5), Tokenizer(data.tokenizer).fingerprint)
    complaint(command_here(*words, "--layers", "5"), r"got \[5\]: expected 2 blocks")
    assert "expected 0 to 2" in command_here(*words, "--experts", "3").err
    np.savez(tmp_path / "other.npz", table=np.ones((2, 5, 1), int))
    complaint(command_here(*words, "--tokenizer", data.tokenizer), "it is of another tokenizer")


def test_export_of_what_readers_refuse_leaves_nothing(tmp_path: Path) -> None:
    RoutingTable(np.zeros((1, 5, 1), np.int32), 4, (1,)).save(tmp_path / "zeros")
    words = ("--format", "deepseek-v4", "--output", str(tmp_path / "out"))
    complaint(command_here("table", "export", str(tmp_path / "zeros"), *words), "all zeros")
    assert [item.name for item in tmp_path.iterdir()] == ["zeros"]


def test_split(data: TinyData, tmp_path: Path) -> None:
    even, path = tmp_path / "even.safetensors", tmp_path / "split.safetensors"
    build("even", even, "--data", data.train, "--experts", "32", "--layers", "1", "3")
    words = (str(even), "--data", data.train, "--heldout", data.valid, "--max-load", "1.2")
    facts = build("split", path, *words)
    table = RoutingTable.read(path)
    assert table.split is not None
    assert facts["split"]["ids"] == table.split.ids_J.tolist() == sorted(one["id"] for one in facts["split_ids"])
    assert facts["made"]["table"]["sha256"] == RoutingTable.read(even).sha256
    for text in facts["loads"]:
        assert text["before"] >= text["before_bound"] > text["after"] >= text["after_bound"]
    shown = command_here("table", "show", str(path), "--data", data.valid, "--json").json
    assert max(layer["max_load"] for layer in shown["measured"]) == pytest.approx(facts["loads"][1]["after"])
    said = command_here("table", "show", str(path), "--data", data.valid).out
    assert f"{len(table.split.ids_J)} ids follow one of {facts['split']['rows']} rows, by the id before them" in said
    assert "without split ids, no table goes below" in said
    said = command_here("table", "build", "split", *words, "--tokenizer", data.tokenizer, "--output", str(path)).out
    assert f"wrote {path}" in said
    (compared, _) = command_here("table", "diff", str(even), str(path), "--data", data.valid, "--json").json["layers"]
    assert compared["load"] == pytest.approx([facts["loads"][1][which] for which in ("before", "after")], rel=0.2)
    assert 0 < compared["tokens_moved"] < 1
    refused = command_here("table", "export", str(path), "--format", "deepseek-v4", "--output", str(tmp_path / "out"))
    complaint(refused, "by the id before them, for which deepseek-v4 has no place")
    assert not (tmp_path / "out").exists()


def test_help_of_a_builder_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for builder, listed in (("cooccurrence", "  window=1 "), ("random", "The builder random has no options.")):
        with pytest.raises(SystemExit):
            main(["table", "build", builder, "--help"])
        assert listed in capsys.readouterr().out
