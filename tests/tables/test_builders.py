"""Tables from a corpus: what each builder promises, and what all of them do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stablemoe_ds.config.table_options import OPTIONS
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.counted_corpus import Corpus, IdStream
from stablemoe_ds.tables.measures import cohesion, moved
from stablemoe_ds.tables.table import RoutingTable, least_load
from tests.tables.texts import KINDS, corpus_of, random_stream, text_of_kinds

BUILDERS = list(OPTIONS)
TEXT = text_of_kinds()


def made(builder: str, corpus: Corpus = TEXT, /, **changed: Any) -> RoutingTable:
    arguments: dict[str, Any] = {"experts": KINDS, "blocks": (2,), "seed": 3, "options": {}} | changed
    arguments.setdefault("top_k", OPTIONS[builder].least_top_k if builder in OPTIONS else 1)
    return build_table(builder, arguments.pop("options"), corpus, **arguments)


def kinds_together(table: RoutingTable, layer: int = 0) -> float:
    """Share of the ids that occur and are where most of their kind are, at best one expert for each kind."""
    seen = np.flatnonzero(TEXT.token_counts)
    kind = (seen % KINDS).astype(np.int32)[:, None]
    return 1 - moved(kind, table.expert_LVK[layer, seen], np.ones(len(seen)))


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (3, 3), (16, 5), (300, 1), (300, 2)])
def test_every_table_is_whole(builder: str, experts: int, top_k: int) -> None:
    """One expert, all experts, more experts than ids; different experts for an id; ids that do not occur, too."""
    if top_k < OPTIONS[builder].least_top_k:
        pytest.skip("an id has too few experts for this builder")
    table = made(builder, experts=experts, top_k=top_k, blocks=(2, 5))
    assert table.expert_LVK.shape == (2, TEXT.vocab_size, top_k)
    assert (np.diff(np.sort(table.expert_LVK, axis=-1), axis=-1) > 0).all()
    assert (table.experts, table.blocks, table.tokenizer) == (experts, (2, 5), "tokenizer")
    if builder != "random":
        limit = max(1.3, least_load(TEXT.token_counts, experts, top_k))
        assert table.expert_load(TEXT.token_counts).max() <= limit * 1.02
    if builder in ("scattered", "cooccurrence"):
        absent = table.expert_LVK[0, TEXT.token_counts == 0]
        assert np.ptp(np.bincount(absent.reshape(-1), minlength=experts)) <= 1, "dealt out"


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_same_arguments_make_the_same_table(builder: str) -> None:
    one, same, other = (made(builder, seed=seed).sha256 for seed in (1, 1, 2))
    assert one == same
    if builder in ("random", "even"):
        assert one != other


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_table_says_how_it_was_made(builder: str) -> None:
    table = made(builder)
    assert (table.made["builder"], table.made["seed"], table.made["corpus"]) == (builder, 3, "text")
    again = made(table.made["builder"], options=table.made["options"], seed=table.made["seed"])
    assert again.sha256 == table.sha256


@pytest.mark.parametrize("choice", ["balanced", "alternating", "greedy", "nearest"])
@pytest.mark.parametrize("weighting", ["ppmi", "log"])
def test_cooccurrence_finds_the_kinds(choice: str, weighting: str) -> None:
    options = {"choice": choice, "weighting": weighting, "dims": 8}
    assert kinds_together(made("cooccurrence", options=options)) > 0.95
    assert kinds_together(made("random")) < 0.45


@pytest.mark.parametrize("top_k", [2, 3])
def test_crossed_keeps_like_ids_together_in_one_choice_and_parts_them_in_the_others(top_k: int) -> None:
    experts, seen = KINDS * top_k, TEXT.token_counts > 0
    crossed = made("crossed", options={"dims": 8}, experts=experts, top_k=top_k, blocks=(2, 5))
    assert (crossed.expert_LVK // KINDS == np.arange(top_k)).all(), "each choice has experts of its own"
    alike = made("cooccurrence", options={"dims": 8}, blocks=(2, 5))
    assert (crossed.expert_LVK[..., :1] == alike.expert_LVK).all()
    apart = [*crossed.expert_LVK[0].T, *crossed.expert_LVK[1, :, 1:].T]
    for number, one in enumerate(apart):
        for other in apart[number + 1 :]:
            assert moved(one[:, None] % KINDS, other[:, None] % KINDS, seen) > 0.4, "each is drawn by itself"


def test_cohesion_orders_the_builders() -> None:
    followers = TEXT.followers()
    scattered, random, together = (
        cohesion(made(name, options=options).expert_LVK[0], KINDS, followers)
        for name, options in (("scattered", {}), ("random", {}), ("cooccurrence", {"dims": 8}))
    )
    assert scattered < random < together


def test_greedy_gives_each_id_its_best_expert_with_room() -> None:
    from stablemoe_ds.tables.placing import greedy_choices

    random = np.random.default_rng(4)
    scores, counts = random.normal(size=(50, 5)), random.integers(1, 100, 50)
    found, load, room = greedy_choices(scores, counts, 1.2, 2), np.zeros(5), 1.2 * 2 * counts.sum() / 5
    for index in sorted(range(50), key=lambda i: (-counts[i], i)):
        fitting = sorted((e for e in range(5) if load[e] + counts[index] <= room), key=lambda e: -scores[index, e])
        full = sorted((e for e in range(5) if e not in fitting), key=lambda e: load[e])
        assert found[index].tolist() == (fitting + full)[:2]
        load[found[index]] += counts[index]


@pytest.mark.parametrize("layers", ["seeds", "slices"])
def test_layers_differ(layers: str) -> None:
    options = {"layers": layers, "dims": 16}
    noise = corpus_of(random_stream(6, vocab=80, tokens=8000), 80)
    table = made("cooccurrence", noise, options=options, blocks=(1, 2), experts=8)
    assert moved(table.expert_LVK[0], table.expert_LVK[1], np.ones(80)) > 0.2


def test_layers_can_be_the_same() -> None:
    table = made("cooccurrence", options={"layers": "same"}, blocks=(1, 2, 5))
    assert (table.expert_LVK == table.expert_LVK[0]).all()


@pytest.mark.parametrize("vocab", [1, 2, 5, 40])
@pytest.mark.parametrize("builder", ["scattered", "cooccurrence"])
def test_a_vocabulary_smaller_than_the_dimensions(builder: str, vocab: int) -> None:
    corpus = corpus_of(random_stream(7, vocab=vocab), vocab)
    assert made(builder, corpus, experts=3, top_k=2).expert_LVK.shape == (1, vocab, 2)


@pytest.mark.parametrize("builder", ["scattered", "cooccurrence"])
def test_documents_of_a_single_id_have_no_neighbours(builder: str) -> None:
    ids = np.arange(40, dtype=np.int32) % 20
    corpus = corpus_of(IdStream(ids, np.ones(40, np.int64)), 25)
    table = made(builder, corpus)
    assert table.expert_load(corpus.token_counts).max() <= 1.3


def test_one_document() -> None:
    ids = np.array([0, 1, 2, 3] * 50, np.int32)
    table = made("cooccurrence", corpus_of(IdStream(ids, np.array([200])), 4), experts=2)
    assert table.expert_load(np.full(4, 50)).max() == 1


@pytest.mark.parametrize(
    ("builder", "changed", "message"),
    [
        ("none", {}, r"no table builder 'none': expected one of random, even, scattered, cooccurrence, crossed"),
        ("even", {"options": {"dims": 3}}, r"even: unknown option dims; it has none at all"),
        ("cooccurrence", {"options": {"dim": 3}}, r"unknown option dim; it has window, sides, .*dims"),
        ("cooccurrence", {"options": {"dims": 0}}, r"cooccurrence: dims: got 0: .*greater than or equal to 1"),
        ("cooccurrence", {"options": {"dims": "many"}}, r"dims: got 'many': .*integer"),
        ("cooccurrence", {"options": {"sides": "up"}}, r"sides: got 'up': .*'both', 'joined', 'left' or 'right'"),
        ("scattered", {"options": {"max_load": 0.5}}, r"max_load: got 0.5"),
        ("random", {"top_k": 5}, r"top_k is 5, expected 1 to the number of experts, 4"),
        ("random", {"top_k": 0}, r"top_k is 0"),
        ("crossed", {"top_k": 1}, r"table builder crossed: top_k is 1, expected 2 or more"),
        ("random", {"experts": 0}, r"table builder random: experts are 0, expected 1 or more"),
        ("scattered", {"options": {"max_load": "inf"}}, r"max_load: got 'inf': .*finite"),
        ("cooccurrence", {"options": {"max_load": float("nan")}}, r"max_load: got nan: .*finite"),
        ("random", {"blocks": ()}, r"layers are \[\], expected block numbers"),
        ("random", {"blocks": (3, 2)}, r"layers are \[3, 2\], expected block numbers"),
        ("random", {"seed": -1}, r"seed is -1"),
    ],
)
def test_what_cannot_be_built_is_refused(builder: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(builder, **changed)


def test_counts_alone_make_no_table_of_neighbours() -> None:
    counts = Corpus(TEXT.token_counts)
    assert made("even", counts).vocab_size == TEXT.vocab_size
    with pytest.raises(UserError, match="cooccurrence counts neighbours: it needs a prepared corpus"):
        made("cooccurrence", counts)
