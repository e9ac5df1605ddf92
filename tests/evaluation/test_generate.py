"""Generation: with a cache and without, in a batch and alone, against slow references."""

from __future__ import annotations

import pytest
import torch

from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.generate import Reader, choose, generate, nucleus
from stablemoe_ds.routing.fixed import freeze
from tests.tiny import VOCAB

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 60, 6, 8]]
SHAPES = {
    "paper": {
        "model": {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None},
        "moe": {"sublayers": 2},
    },
    "modern": {"moe": {"placement": "replace", "top_k": 2, "shared_experts": 1}},
    "bigram": {"moe": {"distilled": {"kind": "bigram"}}},
    "cnn": {"moe": {"distilled": {"kind": "cnn"}}},
    "transformer": {"moe": {"distilled": {"kind": "transformer"}}},
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request, build):
    model = build(**SHAPES[request.param])
    return model, frozen(model)


def frozen(model):
    run = model.run_config
    return freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))


def slow_greedy(model, prompt, routing, new):
    """One prompt alone, everything read anew for each id."""
    ids = list(prompt)
    model.eval()
    for _ in range(new):
        ids_BS = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(model.logits(ids_BS, routing(ids_BS))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_equals_uncached_and_each_prompt_alone(case):
    model, routing = case
    cached = generate(model, PROMPTS, routing, max_new_tokens=8)
    assert cached == generate(model, PROMPTS, routing, max_new_tokens=8, use_cache=False)
    assert cached == [slow_greedy(model, prompt, routing, 8) for prompt in PROMPTS]
    assert len({i for row in cached for i in row}) > 1, "a model that repeats one id proves nothing"


def test_cached_logits_are_close_to_uncached(case):
    model, routing = case
    ids_BS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    model.eval()
    with torch.no_grad():
        full = model.logits(ids_BS, routing(ids_BS))
        reader = Reader(model, routing, cache_size=(2, 16))
        for length in (5, 6, 7, 12, 13, 16):  # several ids at once in the middle, too
            torch.testing.assert_close(reader.next_logits(ids_BS[:, :length]), full[:, length - 1], atol=1e-5, rtol=0)


def test_sampling_follows_the_seed_with_and_without_cache(tiny_model):
    options = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9}
    routing = frozen(tiny_model)
    first = generate(tiny_model, PROMPTS, routing, seed=1, **options)
    assert first == generate(tiny_model, PROMPTS, routing, seed=1, use_cache=False, **options)
    assert first != generate(tiny_model, PROMPTS, routing, seed=2, **options)


NEIGHBOURS = {
    "in another order": [PROMPTS[2], PROMPTS[0], PROMPTS[1]],
    "longer ones": [*PROMPTS, [6] * 15, [9] * 12],
    "shorter ones": [[8], *PROMPTS, [3]],
    "the same ones again": [*PROMPTS, *PROMPTS],
    "one that is full": [*PROMPTS, [5] * 16],
}


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sample_depends_on_seed_and_prompt_alone(tiny_model, neighbours, use_cache):
    routing, batch = frozen(tiny_model), NEIGHBOURS[neighbours]
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_p": 0.95, "seed": 4}
    alone = {tuple(prompt): generate(tiny_model, [prompt], routing, **options)[0] for prompt in batch}
    assert generate(tiny_model, batch, routing, use_cache=use_cache, **options) == [alone[tuple(p)] for p in batch]
    eos = alone[tuple(PROMPTS[0])][2]  # one ends early: the others go on as before
    cut = {prompt: row[: row.index(eos)] if eos in row else row for prompt, row in alone.items()}
    ended = generate(tiny_model, batch, routing, use_cache=use_cache, eos_id=eos, **options)
    assert ended == [cut[tuple(p)] for p in batch]


def test_prompts_and_seeds_have_samples_of_their_own(tiny_model):
    """Not the same random numbers for all: with equal scores, equal draws would be equal samples."""
    routing, options = frozen(tiny_model), {"max_new_tokens": 8, "temperature": 1e9}
    drawn = [tuple(row) for seed in (0, 1) for row in generate(tiny_model, PROMPTS, routing, seed=seed, **options)]
    assert len(set(drawn)) == len(drawn)


def test_stops_at_eos_and_leaves_it_out(tiny_model):
    routing = frozen(tiny_model)
    free = generate(tiny_model, PROMPTS, routing, max_new_tokens=9)
    eos = free[0][4]
    wanted = [row[: row.index(eos)] if eos in row else row for row in free]
    assert generate(tiny_model, PROMPTS, routing, max_new_tokens=9, eos_id=eos) == wanted
    assert len(wanted[0]) <= 4


def test_eos_inside_a_prompt_does_not_stop_it(tiny_model):
    routing = frozen(tiny_model)
    prompts = [[7], [1, 2, 63, 4]]
    free = generate(tiny_model, prompts, routing, max_new_tokens=4)
    eos = next(i for i in range(VOCAB) if all(i not in row for row in free))
    prompts[1][2] = eos
    assert len(generate(tiny_model, prompts, routing, max_new_tokens=4, eos_id=eos)[1]) == 4


def test_stops_at_the_sequence_length(tiny_model):
    rows = generate(tiny_model, [[3] * 14, [4], [5] * 16], frozen(tiny_model), max_new_tokens=100)
    assert [len(row) for row in rows] == [2, 15, 0]


def test_nothing_asked_nothing_given(tiny_model):
    assert generate(tiny_model, [], frozen(tiny_model), max_new_tokens=5) == []
    assert generate(tiny_model, PROMPTS, frozen(tiny_model), max_new_tokens=0) == [[], [], []]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], [2] * 17], {}, "prompt 2 has 17 ids, the model has 16 positions"),
        ([[]], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, "outside 0..63"),
        ([[-1]], {}, "outside 0..63"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_bad_input_is_named(tiny_model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_model, prompts, frozen(tiny_model), **{"max_new_tokens": 4, **options})


def test_nan_in_the_weights_is_named(build):
    model = build().train()
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = float("nan")
    with pytest.raises(UserError, match="after id 1 of prompt 1 hold NaN"):
        generate(model, [[1]], frozen(model), max_new_tokens=2)
    assert model.training


def slow_nucleus(shares: list[float], top_p: float) -> list[float]:
    """The definition, in a loop: likeliest first, until the sum reaches top_p."""
    kept, reached = [0.0] * len(shares), 0.0
    for index in sorted(range(len(shares)), key=lambda i: (-shares[i], i)):
        if reached >= top_p:
            break
        kept[index], reached = shares[index], reached + shares[index]
    return [share / reached for share in kept]


@pytest.mark.parametrize("top_p", [1e-9, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_nucleus_matches_its_definition(top_p):
    rows = [[0.125, 0.5, 0.0625, 0.25, 0.0625], [0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
    wanted = torch.tensor([slow_nucleus(row, top_p) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(nucleus(torch.tensor(rows, dtype=torch.float64), top_p), wanted)


def test_draws_have_the_probabilities_of_the_nucleus():
    logits = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2])) * 2  # temperature 2 undoes the factor
    drawn = choose(logits.expand(20_000, 4), 2.0, 0.85, [torch.Generator().manual_seed(0)] * 20_000)
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([4 / 9, 0, 3 / 9, 2 / 9]), atol=0.015, rtol=0)


def test_greedy_takes_the_lowest_of_equals():
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]), 0.0, 1.0, [None]).tolist() == [1]
