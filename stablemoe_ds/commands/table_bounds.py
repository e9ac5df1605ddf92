"""``stablemoe table bounds``: how balanced a table of ids can be, and how balanced tables are on unseen text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.commands.named_tables import check_load, open_table
from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument, tell
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.data.tokenizer import Tokenizer
    from stablemoe_ds.evaluation.bounds_report import Question
    from stablemoe_ds.tables.counted_corpus import Corpus


def add_to(table: Subparsers) -> None:
    bounds = add_command(table, "bounds", "the best possible load of tables, and their load on held-out text", _bounds)
    bounds.add_argument("corpus", help="prepared corpus (path without extension) to make tables from")
    bounds.add_argument(
        "--heldout", metavar="PREFIX", help="prepared corpus to judge on; default: the last tenth of the corpus"
    )
    bounds.add_argument(
        "--table", nargs="+", default=[], metavar="T", help="also judge these: table file, checkpoint or run directory"
    )
    bounds.add_argument("--experts", nargs="+", type=int, default=[16, 64, 256], metavar="N", help="default 16 64 256")
    bounds.add_argument("--top-k", nargs="+", type=int, default=[1], metavar="K", help="experts of an id (default 1)")
    bounds.add_argument("--ranks", type=int, metavar="R", help="ranks that share the experts (default 8, or fewer)")
    bounds.add_argument(
        "--replicated-experts",
        type=int,
        default=0,
        metavar="N",
        help="experts that every rank has, where experts are placed by load (default 0)",
    )
    bounds.add_argument(
        "--capacity", nargs="+", type=float, default=[1.0, 1.25, 2.0], metavar="C", help="factors; default 1 1.25 2"
    )
    bounds.add_argument(
        "--batch-tokens", type=int, default=32768, metavar="T", help="tokens of one dispatch, for drops (default 32768)"
    )
    bounds.add_argument(
        "--cooccurrence", action="store_true", help="also judge cooccurrence tables, which takes minutes"
    )
    bounds.add_argument(
        "--split", type=float, metavar="L", help="also judge an even table whose ids above this load are split"
    )
    bounds.add_argument("--seed", type=int, default=0, help="seed of random choices (default 0)")
    bounds.add_argument("--tokenizer", type=Path, help="tokenizer, to print ids as pieces")
    bounds.add_argument("--plot", type=Path, metavar="FILE.png", help="plot load against bound")
    json_argument(bounds)


def _bounds(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.tokenizer import Tokenizer
    from stablemoe_ds.evaluation.bounds_report import bounds_facts, bounds_text, judge
    from stablemoe_ds.progress_bar import progress_bar

    question = _question(arguments)
    tokenizer = Tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    text, held_out = _texts(arguments, tokenizer)
    with progress_bar("tables", len(question.all_shapes())) as done:
        judged = judge(question, text, held_out, done)
    if arguments.plot:
        from stablemoe_ds.evaluation.bounds_picture import draw_bounds

        draw_bounds(judged, held_out.token_counts, arguments.plot)
    said = bounds_text(question, text, held_out, judged, tokenizer.piece if tokenizer else str)
    tell(bounds_facts(question, text, held_out, judged), said, arguments.json)
    return 0


def _question(arguments: argparse.Namespace) -> Question:
    """The question that the arguments ask. Raises UserError, a line for each number that is out of range."""
    from stablemoe_ds.evaluation.bounds_report import Question

    numbers = {"--experts": arguments.experts, "--top-k": arguments.top_k, "--batch-tokens": [arguments.batch_tokens]}
    numbers["--ranks"] = [] if arguments.ranks is None else [arguments.ranks]
    problems = [f"{name}: got {n}: expected at least 1" for name, given in numbers.items() for n in given if n < 1]
    problems += [
        f"--capacity: got {c}: expected a number above 0" for c in arguments.capacity if not 0 < c < float("inf")
    ]
    check_load(arguments.split, "--split")
    problems += [
        f"{name}: got {n}: expected at least 0"
        for name, n in (("--seed", arguments.seed), ("--replicated-experts", arguments.replicated_experts))
        if n < 0
    ]
    if problems:
        raise UserError("\n".join(problems))
    return Question(
        shapes=[(experts, top_k) for experts in arguments.experts for top_k in arguments.top_k],
        named=[(Path(path).name, open_table(path)[0]) for path in arguments.table],
        builders=["random", "even", *(["cooccurrence"] if arguments.cooccurrence else [])],
        ranks=arguments.ranks,
        replicated=arguments.replicated_experts,
        capacities=arguments.capacity,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        split=arguments.split,
    )


def _texts(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[Corpus, Corpus]:
    """The text to build tables from and the text to judge them by, with the same ids."""
    from stablemoe_ds.config.schema import Source
    from stablemoe_ds.data.table_corpus import table_corpus
    from stablemoe_ds.tables.held_out import split_documents

    text = table_corpus([Source(path=arguments.corpus)], tokenizer)
    if arguments.heldout is None:
        return split_documents(text)
    held_out = table_corpus([Source(path=arguments.heldout)], tokenizer)
    if (held_out.tokenizer, held_out.vocab_size) != (text.tokenizer, text.vocab_size):
        raise UserError(
            f"--heldout: {arguments.heldout} is of tokenizer {held_out.tokenizer[:12]} with {held_out.vocab_size} ids, "
            f"{arguments.corpus} of {text.tokenizer[:12]} with {text.vocab_size}: prepare both with one"
        )
    return text, held_out
