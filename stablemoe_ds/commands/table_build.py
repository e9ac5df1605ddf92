"""``stablemoe table build``: tables from a corpus, from a checkpoint or from another table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablemoe_ds.commands.named_tables import (
    check_load,
    corpus_of,
    open_table,
    pieces,
    text_if_found,
    text_of,
    tokenizer_of,
    write_table,
)
from stablemoe_ds.commands.parsing import (
    Subparsers,
    add_command,
    add_group,
    data_argument,
    json_argument,
    settle_libraries,
    tell,
)
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.tables.counted_corpus import Corpus
    from stablemoe_ds.tables.table import RoutingTable

FROM_CORPUS = {
    "random": "random experts for each id",
    "even": "the most frequent ids first, each to the expert with the fewest tokens",
    "scattered": "ids with similar neighbours on different experts",
    "cooccurrence": "ids with similar neighbours together, under a load limit",
    "crossed": "one expert of each id as in cooccurrence, the others at random",
}
RUNS_TEXT = "the run's training text"


def add_to(table: Subparsers) -> None:
    build = add_group(table, "build", "make a table from a corpus, a checkpoint or another table", "HOW")
    for name, text in FROM_CORPUS.items():
        _add_corpus_builder(build, name, text)
    _add_from_checkpoint(build)
    _add_from_table(build)


def _add_corpus_builder(build: Subparsers, name: str, text: str) -> None:
    sub = _add_builder(build, name, text, _from_corpus)
    sub.set_defaults(builder=name)
    sub.add_argument("options", nargs="*", metavar="key=value", help="options of the builder, listed below")
    _list_options(sub, name)
    data_argument(sub, required=True)
    sub.add_argument("--experts", type=int, required=True, help="experts of each MoE layer")
    sub.add_argument(
        "--layers", type=int, nargs="+", required=True, metavar="BLOCK", help="block numbers, as in moe.layers"
    )
    sub.add_argument("--top-k", type=int, default=1, help="experts of an id (default 1)")
    _seed_argument(sub)
    sub.add_argument("--tokenizer", type=Path, help="tokenizer; corpora of another one are refused")
    sub.add_argument("--vocab-size", type=int, help="number of ids of the model, if it has more than the tokenizer")


def _list_options(sub: argparse.ArgumentParser, builder: str) -> None:
    """List the builder's options at the end of its help. Only then are they imported: pydantic is slow to load."""
    without = sub.format_help

    def format_help() -> str:
        from stablemoe_ds.config.table_options import options_help

        return f"{without()}\n{options_help(builder)}\n"

    sub.format_help = format_help  # type: ignore[method-assign]


def _add_from_checkpoint(build: Subparsers) -> None:
    text = "the frozen table of a checkpoint, or the choices of its distilled router"
    frozen = _add_builder(build, "frozen", text, _frozen)
    text = "the experts to which a checkpoint's router sends each id most often"
    observed = _add_builder(build, "observed", text, _observed)
    for sub in (frozen, observed):
        sub.add_argument("checkpoint", help="checkpoint or run directory")
        sub.add_argument("--max-load", type=float, help="largest max/mean load; default: no limit")
        data_argument(sub, required=False, default=RUNS_TEXT)
    observed.add_argument("--tokens", type=int, metavar="T", help="tokens to read, from the start; default: all")


def _add_from_table(build: Subparsers) -> None:
    text = "another table, with as few tokens moved as a load limit requires"
    balanced = _add_builder(build, "balanced", text, _balanced)
    text = "another table, with ids too frequent for a load limit split by the id before them"
    split = _add_builder(build, "split", text, _split)
    text = "another table, on more or fewer experts: alike ones merged, or each split by its ids"
    resized = _add_builder(build, "resized", text, _resized)
    for sub, limit in ((balanced, None), (split, 1.1), (resized, 1.3)):
        sub.add_argument("table", help="table file, checkpoint or run directory")
        said = "largest max/mean load, where frequencies allow" + (f" (default {limit})" if limit else "")
        sub.add_argument("--max-load", type=float, default=limit, required=limit is None, help=said)
        data_argument(sub, required=False, default=f"{RUNS_TEXT}, for a checkpoint")
    split.add_argument("--heldout", nargs="+", default=[], metavar="PREFIX", help="corpora to judge the table by")
    split.add_argument("--tokenizer", type=Path, help="tokenizer, to print the ids that are split as pieces")
    resized.add_argument("--experts", type=int, required=True, help="number of experts of the new table")
    _seed_argument(resized)


def _add_builder(build: Subparsers, name: str, text: str, call: Any) -> argparse.ArgumentParser:
    sub = add_command(build, name, text, call)
    sub.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    json_argument(sub)
    return sub


def _seed_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=int, default=0, help="the same seed makes the same table (default 0)")


def _from_corpus(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.builders import build_table

    options = {}
    for word in arguments.options:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"option {word!r}: expected key=value")
        options[key] = value
    sources = text_of(arguments.data, None)
    corpus = corpus_of(sources, tokenizer_of(arguments.tokenizer), arguments.vocab_size)
    table = build_table(
        arguments.builder,
        options,
        corpus,
        experts=arguments.experts,
        top_k=arguments.top_k,
        blocks=arguments.layers,
        seed=arguments.seed,
    )
    return _finish(table, arguments, corpus)


def _frozen(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.evaluation.observed_routes import frozen

    checkpoint = Checkpoint.open(arguments.checkpoint)
    trained_on, note = text_if_found([], checkpoint)
    sources = text_of(arguments.data, checkpoint) if arguments.data else trained_on
    table = frozen(checkpoint, arguments.max_load, trained_on)
    corpus = corpus_of(sources, None, table.vocab_size) if sources else None
    return _finish(table, arguments, corpus, note if corpus is None else "")


def _observed(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    if arguments.tokens is not None and arguments.tokens < 1:
        raise UserError(f"--tokens: got {arguments.tokens}: expected at least 1")
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.evaluation.observed_routes import observe

    checkpoint = Checkpoint.open(arguments.checkpoint)
    sources = text_of(arguments.data, checkpoint)
    table, shares = observe(checkpoint, sources, arguments.max_load, arguments.tokens)
    said = ", ".join(f"{share:.1%}" for share in shares)
    text = f"the table reproduces {said} of the routing of {table.made['tokens']:,} tokens that was observed"
    return _finish(table, arguments, corpus_of(sources, None, table.vocab_size), text)


def _balanced(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    table, checkpoint = open_table(arguments.table)
    from stablemoe_ds.tables.derived import rebalanced_table

    corpus = corpus_of(text_of(arguments.data, checkpoint), None, table.vocab_size)
    return _finish(rebalanced_table(table, corpus, arguments.max_load), arguments, corpus)


def _split(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    table, checkpoint = open_table(arguments.table)
    from stablemoe_ds.evaluation.split_report import split_facts, split_text
    from stablemoe_ds.tables.splitting import split_table

    tokenizer = tokenizer_of(arguments.tokenizer)
    texts = {"corpus": corpus_of(text_of(arguments.data, checkpoint), tokenizer, table.vocab_size)}
    if arguments.heldout:
        texts["held-out"] = corpus_of(text_of(arguments.heldout, None), tokenizer, table.vocab_size)
        table.check_ids(texts["held-out"].tokenizer, texts["held-out"].vocab_size, "the held-out corpus")
    made = split_table(table, texts["corpus"], arguments.max_load)
    write_table(made, arguments.output)
    facts = split_facts(table, made, texts, pieces(tokenizer))
    tell(facts, f"{split_text(facts)}\nwrote {arguments.output}", arguments.json)
    return 0


def _resized(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    table, checkpoint = open_table(arguments.table)
    from stablemoe_ds.tables.resize import resized_table

    corpus = corpus_of(text_of(arguments.data, checkpoint), None, table.vocab_size)
    resized = resized_table(table, corpus, arguments.experts, arguments.max_load, arguments.seed)
    return _finish(resized, arguments, corpus)


def _finish(table: RoutingTable, arguments: argparse.Namespace, corpus: Corpus | None, text: str = "") -> int:
    """Write the table and describe it, with load and cohesion on the corpus; on the main rank only."""
    from stablemoe_ds.distributed.environment import read_launcher_environment
    from stablemoe_ds.evaluation.table_report import facts_text, measured_facts, measured_text, table_facts

    if read_launcher_environment()[0] != 0:
        return 0
    write_table(table, arguments.output)
    facts = table_facts(table)
    lines = [facts_text(facts)]
    if corpus is not None:
        facts["measured"] = measured_facts(table, corpus, str, top=0)
        lines.append(measured_text(facts["measured"], experts=False))
    lines += [text] if text else []
    tell(facts, "\n".join([*lines, f"wrote {arguments.output}"]), arguments.json)
    return 0
