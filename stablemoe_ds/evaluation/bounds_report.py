"""Tables of several sizes made from one text and judged on another: what ``stablemoe table bounds`` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import build_table, even_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.held_out import count_batches
from stablemoe_ds.tables.load_bounds import Bound, Reach, bound, most_experts, reach, round_robin
from stablemoe_ds.tables.split_ids import SplitIds
from stablemoe_ds.tables.splitting import split_ids
from stablemoe_ds.tables.table import RoutingTable, is_below

EVEN_OF_ITSELF = "even, of this text"
"""The table that ``even`` makes of the held-out text itself: how close to the bound any table can come."""
EVEN_SPLIT = "even, split"
"""The table that ``even`` makes if the commonest ids are split."""
DEFAULT_RANKS = 8


@dataclass(frozen=True)
class Judged:
    """All tables of one number of experts and choices, on one text. ranks: that the experts are spread over."""

    bound: Bound
    ranks: int
    tables: tuple[Reach, ...]


@dataclass(frozen=True)
class Question:
    """What is to be judged.

    shapes: (experts, top_k), each once. named: given tables by name. builders: names of ``build_table``. ranks: None
    for 8, or fewer where that does not divide the experts. replicated: experts on every rank, where they are placed by
    load. capacities: factors. batch_tokens: tokens of one dispatch. split: the load above which an id is split by the
    id before it, in another ``even`` table; None: there is none.
    """

    shapes: Sequence[tuple[int, int]]
    named: Sequence[tuple[str, RoutingTable]]
    builders: Sequence[str]
    ranks: int | None
    replicated: int
    capacities: Sequence[float]
    batch_tokens: int
    seed: int
    split: float | None = None

    def check(self, held_out: Corpus) -> None:
        """Raise UserError, a line for each shape, table and number that cannot be judged."""
        sizes = sorted({experts for experts, _ in self.all_shapes()})
        problems = [
            f"--experts: got {experts}: {self.ranks} ranks hold as many experts each; nearest that works: "
            f"{max(1, round(experts / self.ranks)) * self.ranks}"
            for experts in sizes
            if self.ranks and experts % self.ranks
        ]
        problems += [
            f"--replicated-experts: got {self.replicated}: of {experts} experts, at least one must be left to spread; "
            f"nearest that works: {experts - 1}"
            for experts in sizes
            if self.replicated >= experts
        ]
        problems += [
            f"--top-k: got {top_k}: an id cannot have more than the {experts} experts there are; nearest that works: "
            f"{experts}"
            for experts, top_k in self.shapes
            if top_k > experts
        ]
        for name, table in self.named:
            try:
                table.check_ids(held_out.tokenizer, held_out.vocab_size, "the corpus")
            except UserError as error:
                problems.append(f"--table {name}: {error}")
        if problems:
            raise UserError("\n".join(problems))

    def all_shapes(self) -> list[tuple[int, int]]:
        """Those asked for and those of the given tables, ascending."""
        return sorted({*self.shapes, *((table.experts, table.top_k) for _, table in self.named)})


def judge(question: Question, text: Corpus, held_out: Corpus, done: Callable[[int], object]) -> list[Judged]:
    """Tables made of ``text``, judged on ``held_out``. done: called with 1 after each shape.

    Raises UserError for what :meth:`Question.check` refuses, and for an empty held-out text.
    """
    question.check(held_out)
    (stream,) = held_out.streams
    whole_counts = count_batches(stream.ids, held_out.vocab_size, question.batch_tokens)
    judged = []
    for experts, top_k in question.all_shapes():
        ranks = question.ranks or math.gcd(DEFAULT_RANKS, experts)
        tables = []
        for split, layers in _tables(question, text, held_out, experts, top_k):
            counts = whole_counts
            if split is not None:
                counts = count_batches(stream.ids, held_out.vocab_size, question.batch_tokens, split)
            spread = (text.row_counts(split), experts, ranks, question.capacities, question.replicated)
            tables += [reach(name, expert_VK, counts, *spread) for name, expert_VK in layers]
        judged.append(Judged(bound(held_out.token_counts, experts, top_k), ranks, tuple(tables)))
        done(1)
    return judged


def _tables(
    question: Question, text: Corpus, held_out: Corpus, experts: int, top_k: int
) -> Iterator[tuple[SplitIds | None, list[tuple[str, NDArray[np.int32]]]]]:
    """Of every table of a shape: the ids that it splits, and name and int32 [V, K] of each layer."""
    yield None, [("round-robin", round_robin(held_out.vocab_size, experts, top_k))]
    for name in question.builders:
        made = build_table(name, {}, text, experts=experts, top_k=top_k, blocks=[1], seed=question.seed)
        yield None, [(name, made.expert_LVK[0])]
    if question.split is not None and (split := split_ids(text, experts, top_k, question.split)):
        yield split, [(EVEN_SPLIT, even_table(text.row_counts(split), experts, top_k, 1, question.seed)[0])]
    for name, table in question.named:
        if (table.experts, table.top_k) == (experts, top_k):
            names = [name] if len(table.blocks) == 1 else [f"{name}, block {block}" for block in table.blocks]
            yield table.split, list(zip(names, table.expert_LVK, strict=True))
    yield None, [(EVEN_OF_ITSELF, even_table(held_out.token_counts, experts, top_k, 1, question.seed)[0])]


def bounds_facts(question: Question, text: Corpus, held_out: Corpus, judged: Sequence[Judged]) -> dict[str, Any]:
    """Everything that was found, as JSON can hold it."""
    return {
        "made_of": _size(text),
        "judged_on": _size(held_out),
        "batch_tokens": question.batch_tokens,
        "replicated_experts": question.replicated,
        "bounds": [
            {
                **asdict(shape.bound),
                "ranks": shape.ranks,
                "tables": [
                    {
                        "table": table.name,
                        "max_load": table.max_load,
                        "max_rank_load": table.max_rank_load,
                        "max_placed_rank_load": table.max_placed_load,
                        "idle": table.idle,
                        "dropped": {str(c): d for c, d in zip(question.capacities, table.dropped, strict=True)},
                        "expert_load": table.load_N.tolist(),
                        "rank_load": table.load_G.tolist(),
                        "placed_rank_load": table.placed_G.tolist(),
                    }
                    for table in shape.tables
                ],
            }
            for shape in judged
        ],
    }


def bounds_text(
    question: Question, text: Corpus, held_out: Corpus, judged: Sequence[Judged], piece: Callable[[int], str]
) -> str:
    """The same for a person. piece: ids in readable form."""
    commonest = judged[0].bound
    lines = [
        "Tables made of {tokens:,} tokens in {documents:,} documents,".format(**_size(text))
        + " judged on {tokens:,} tokens in {documents:,} others.".format(**_size(held_out)),
        f"The commonest id of those, {piece(commonest.commonest)}, is {commonest.share:.2%} of the tokens:",
    ]
    for top_k in sorted({shape.bound.top_k for shape in judged}):
        allowed = (f"{load:g} up to {most_experts(held_out.token_counts, top_k, load):,}" for load in (1.25, 2, 4))
        lines.append(f"  with top-{top_k} it forces no more than a max/mean load of {', '.join(allowed)} experts")
    for shape in judged:
        lines += ["", *_shape_lines(shape, question.capacities)]
    limits = f"Dropped: (token, choice) pairs above a capacity, in batches of {question.batch_tokens:,} tokens."
    placed = "Placed: the busiest rank, if experts are placed by their load on the text that tables are made of"
    placed += f", and the {question.replicated} heaviest are on every rank." if question.replicated else "."
    idle = "Idle: share of the time that a rank of mean load waits for the busiest one, with experts by number."
    return "\n".join([*lines, "", limits, placed, idle])


def _shape_lines(shape: Judged, capacities: Sequence[float]) -> list[str]:
    limit, held = shape.bound, shape.bound.experts // shape.ranks
    rows = [["table", "max/mean load", "busiest rank", "placed", "idle", *(f"dropped at {c:g}" for c in capacities)]]
    of_whole_ids = " of whole ids" if any(is_below(table.max_load, limit.least) for table in shape.tables) else ""
    for table in shape.tables:
        loads = (table.max_load, table.max_rank_load, table.max_placed_load)
        figures = [*(f"{load:.2f}" for load in loads), f"{table.idle:.1%}"]
        rows.append([table.name, *figures, *(f"{share:.1%}" for share in table.dropped)])
    return [
        f"{limit.experts} experts, top-{limit.top_k}, on {shape.ranks} ranks of {held}: p_max N / k = "
        f"{limit.forced:.2f}; no table{of_whole_ids} goes below a max/mean load of {limit.least:.2f}",
        *aligned(rows, right=range(1, len(rows[0]))).splitlines(),
    ]


def _size(corpus: Corpus) -> dict[str, int]:
    return {"tokens": int(corpus.token_counts.sum()), "documents": sum(len(s.lengths) for s in corpus.streams)}
