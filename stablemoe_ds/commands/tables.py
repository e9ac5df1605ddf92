"""``stablemoe table``: make, inspect and compare routing tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablemoe_ds.commands import table_bounds, table_distil, table_exchange, table_simulate
from stablemoe_ds.commands.named_tables import check_load, open_table, write_table
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, json_argument, settle_libraries, tell
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import Source
    from stablemoe_ds.data.tokenizer import Tokenizer
    from stablemoe_ds.tables.counted_corpus import Corpus
    from stablemoe_ds.tables.table import RoutingTable

FROM_CORPUS = {
    "random": "random experts for each id",
    "even": "the most frequent ids first, each to the expert with the fewest tokens",
    "scattered": "ids with similar neighbours on different experts",
    "cooccurrence": "ids with similar neighbours together, under a load limit",
}


def add_to(commands: Subparsers) -> None:
    members = "build|show|diff|bounds|distil|export|import|simulate"
    table = add_group(commands, "table", "routing tables: which experts serve which id", members)
    build = add_group(table, "build", "make a table from a corpus, a checkpoint or another table", "HOW")
    for name, text in FROM_CORPUS.items():
        _add_corpus_builder(build, name, text)
    frozen = _add_builder(
        build, "frozen", "the frozen table of a checkpoint, or the choices of its distilled router", _frozen
    )
    frozen.add_argument("checkpoint", help="checkpoint or run directory")
    observed = _add_builder(
        build,
        "observed",
        "the experts to which a checkpoint's router sends each id most often",
        _observed,
    )
    observed.add_argument("checkpoint", help="checkpoint or run directory")
    _data_argument(observed, required=False, default="the run's training text")
    for sub in (frozen, observed):
        sub.add_argument("--max-load", type=float, help="largest max/mean load; default: no limit")
    balanced = _add_builder(
        build, "balanced", "another table, with as few tokens moved as a load limit requires", _balanced
    )
    balanced.add_argument("table", help="table file, checkpoint or run directory")
    balanced.add_argument("--max-load", type=float, required=True, help="largest max/mean load")
    _data_argument(balanced, required=True)
    split = _add_builder(
        build, "split", "another table, with ids too frequent for a load limit split by the id before them", _split
    )
    split.add_argument("table", help="table file, checkpoint or run directory")
    split.add_argument("--max-load", type=float, default=1.1, help="largest max/mean load (default 1.1)")
    split.add_argument("--heldout", nargs="+", default=[], metavar="PREFIX", help="corpora to judge the table by")
    split.add_argument("--tokenizer", type=Path, help="tokenizer, to print the ids that are split as pieces")
    _data_argument(split, required=True)
    resized = _add_builder(build, "resized", "another table, with a multiple or a fraction of its experts", _resized)
    resized.add_argument("table", help="table file, checkpoint or run directory")
    resized.add_argument("--experts", type=int, required=True, help="number of experts of the new table")

    show = add_command(table, "show", "show a table: how it was made, load, cohesion, the pieces of each expert", _show)
    show.add_argument("table", help="table file, checkpoint or run directory")
    _data_argument(show, required=False, default="the run's training text, for a checkpoint")
    show.add_argument("--tokenizer", type=Path, help="tokenizer, to print ids as pieces; default: a checkpoint's own")
    show.add_argument("--top", type=int, default=12, help="pieces of each expert (default 12)")
    json_argument(show)
    diff = add_command(table, "diff", "compare two tables, after the best matching of their experts", _diff)
    for name in ("one", "other"):
        diff.add_argument(name, help="table file, checkpoint or run directory")
    _data_argument(diff, required=False, default="none: ids are compared, not tokens")
    json_argument(diff)
    table_bounds.add_to(table)
    table_distil.add_to(table)
    table_exchange.add_to(table)
    table_simulate.add_to(table)


def _add_corpus_builder(build: Subparsers, name: str, text: str) -> None:
    sub = _add_builder(build, name, text, _from_corpus)
    sub.set_defaults(builder=name)
    sub.add_argument("options", nargs="*", metavar="key=value", help="options of the builder, listed below")
    _list_options(sub, name)
    _data_argument(sub, required=True)
    sub.add_argument("--experts", type=int, required=True, help="experts of each MoE layer")
    sub.add_argument(
        "--layers", type=int, nargs="+", required=True, metavar="BLOCK", help="block numbers, as in moe.layers"
    )
    sub.add_argument("--top-k", type=int, default=1, help="experts of an id (default 1)")
    sub.add_argument("--seed", type=int, default=0, help="the same seed makes the same table (default 0)")
    sub.add_argument("--tokenizer", type=Path, help="tokenizer; corpora of another one are refused")
    sub.add_argument("--vocab-size", type=int, help="number of ids of the model, if it has more than the tokenizer")


def _list_options(sub: argparse.ArgumentParser, builder: str) -> None:
    """List the builder's options at the end of its help. Only then are they imported: pydantic is slow to load."""
    without = sub.format_help

    def format_help() -> str:
        from stablemoe_ds.config.table_options import options_help

        return f"{without()}\n{options_help(builder)}\n"

    sub.format_help = format_help  # type: ignore[method-assign]


def _add_builder(build: Subparsers, name: str, text: str, call: Any) -> argparse.ArgumentParser:
    sub = add_command(build, name, text, call)
    sub.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    json_argument(sub)
    return sub


def _data_argument(parser: argparse.ArgumentParser, required: bool, default: str = "") -> None:
    text = "prepared corpora (paths without extension), in equal parts" + (f"; default: {default}" if default else "")
    parser.add_argument("--data", nargs="+", required=required, default=[], metavar="PREFIX", help=text)


def _from_corpus(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.builders import build_table

    options = {}
    for word in arguments.options:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"option {word!r}: expected key=value")
        options[key] = value
    corpus = _corpus(arguments.data, _tokenizer(arguments.tokenizer), arguments.vocab_size)
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
    settle_libraries()
    from stablemoe_ds.evaluation.observed_routes import frozen

    return _finish(frozen(arguments.checkpoint, arguments.max_load), arguments)


def _observed(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    settle_libraries()
    from stablemoe_ds.evaluation.observed_routes import observe

    table, shares = observe(arguments.checkpoint, arguments.data, arguments.max_load)
    said = ", ".join(f"{share:.1%}" for share in shares)
    return _finish(table, arguments, text=f"the table reproduces {said} of the routing that was observed")


def _balanced(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.resize import rebalanced_table

    check_load(arguments.max_load)
    table, _ = open_table(arguments.table)
    corpus = _corpus(arguments.data, None, table.vocab_size)
    return _finish(rebalanced_table(table, corpus, arguments.max_load), arguments, corpus)


def _split(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.split_report import split_facts, split_text
    from stablemoe_ds.tables.splitting import split_table

    check_load(arguments.max_load)
    table, _ = open_table(arguments.table)
    tokenizer = _tokenizer(arguments.tokenizer)
    texts = {"corpus": _corpus(arguments.data, tokenizer, table.vocab_size)}
    if arguments.heldout:
        texts["held-out"] = _corpus(arguments.heldout, tokenizer, table.vocab_size)
        table.check_ids(texts["held-out"].tokenizer, texts["held-out"].vocab_size, "the held-out corpus")
    made = split_table(table, texts["corpus"], arguments.max_load)
    write_table(made, arguments.output)
    facts = split_facts(table, made, texts, _pieces(tokenizer))
    tell(facts, f"{split_text(facts)}\nwrote {arguments.output}", arguments.json)
    return 0


def _resized(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.resize import resized_table

    table, _ = open_table(arguments.table)
    return _finish(resized_table(table, arguments.experts), arguments)


def _finish(table: RoutingTable, arguments: argparse.Namespace, corpus: Corpus | None = None, text: str = "") -> int:
    """Write the table and describe it, with load and cohesion if there is a corpus."""
    from stablemoe_ds.evaluation.table_report import facts_text, measured_facts, measured_text, table_facts

    write_table(table, arguments.output)
    facts = table_facts(table)
    lines = [facts_text(facts)]
    if corpus is not None:
        facts["measured"] = measured_facts(table, corpus, str, top=0)
        lines.append(measured_text(facts["measured"], experts=False))
    lines += [text] if text else []
    tell(facts, "\n".join([*lines, f"wrote {arguments.output}"]), arguments.json)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.table_report import facts_text, measured_facts, measured_text, table_facts

    table, checkpoint = open_table(arguments.table)
    facts = table_facts(table)
    text = facts_text(facts)
    sources, tokenizer = arguments.data, _tokenizer(arguments.tokenizer)
    if checkpoint is not None:
        from stablemoe_ds.checkpoint.attached import find_corpora, open_tokenizer

        try:
            tokenizer = tokenizer or open_tokenizer(checkpoint)
            sources = sources or find_corpora(checkpoint, checkpoint.run.data.train)
        except UserError as error:  # a copy of a checkpoint, where its run's text is not
            text += f"\nnot measured by the run's text: {error}"
    if sources:
        corpus = _corpus(sources, tokenizer, table.vocab_size)
        facts["measured"] = measured_facts(table, corpus, _pieces(tokenizer), arguments.top)
        text += "\n" + measured_text(facts["measured"])
    tell(facts, text, arguments.json)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.table_report import difference_facts, difference_text

    (one, _), (other, _) = open_table(arguments.one), open_table(arguments.other)
    corpus = _corpus(arguments.data, None, one.vocab_size) if arguments.data else None
    layers = difference_facts(one, other, corpus)
    tell({"one": one.sha256, "other": other.sha256, "layers": layers}, difference_text(layers), arguments.json)
    return 0


def _corpus(data: Sequence[str | Source], tokenizer: Tokenizer | None, vocab_size: int | None) -> Corpus:
    from stablemoe_ds.config.schema import Source
    from stablemoe_ds.data.table_corpus import table_corpus

    sources = [Source(path=item) if isinstance(item, str) else item for item in data]
    return table_corpus(sources, tokenizer, vocab_size)


def _tokenizer(path: str | Path | None) -> Tokenizer | None:
    from stablemoe_ds.data.tokenizer import Tokenizer

    return Tokenizer(path) if path else None


def _pieces(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """Ids in readable form; as numbers without a tokenizer, and where a model has more ids than that."""
    return lambda index: tokenizer.piece(index) if tokenizer and index < tokenizer.vocab_size else str(index)
