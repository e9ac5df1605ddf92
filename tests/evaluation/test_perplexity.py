"""Evaluation against a token-by-token reference, however the data is cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.perplexity import Evaluation, evaluate, word_perplexity
from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.source import LEARNED
from tests.tiny import VOCAB


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def random_batch(sequences: int, seed: int = 0, length: int = 16) -> Batch:
    ids = torch.randint(VOCAB, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))
    everything = torch.ones(sequences, length, dtype=torch.bool)
    return Batch(ids[:, :-1], ids[:, 1:], everything, everything)


def reference(model, batch: Batch, routing) -> tuple[float, int]:
    """Loss sum and count by a Python loop over scored tokens, each from its own logits."""
    model.eval()
    total, tokens = 0.0, 0
    for row in range(len(batch.ids)):
        ids = batch.ids[row : row + 1]
        with torch.no_grad():
            log_p = model.logits(ids, routing(ids)).double().log_softmax(-1)[0]
        for position, label in enumerate(batch.labels[row].tolist()):
            if batch.scored[row, position]:
                total, tokens = total - log_p[position, label].item(), tokens + 1
    return total, tokens


def frozen(model):
    run = model.run_config
    return freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))


def test_matches_a_loop_over_tokens(tiny_model):
    routing, batch = frozen(tiny_model), random_batch(3)
    scored = batch.scored.clone()
    scored[0, :5] = scored[2, 9] = False
    batch = replace(batch, scored=scored)
    result = evaluate(tiny_model, [batch], routing, identity, "cpu")
    total, tokens = reference(tiny_model, batch, routing)
    assert result.tokens == tokens == 3 * 16 - 6
    assert result.loss == pytest.approx(total / tokens, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result.agreement is None


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_does_not_depend_on_batch_size(tiny_model, cut):
    whole = random_batch(6)
    fields = (whole.ids, whole.labels, whole.real, whole.scored)
    parts = [Batch(*(field[i : i + cut] for field in fields)) for i in range(0, 6, cut)]
    for routing in (LEARNED, frozen(tiny_model)):
        one = evaluate(tiny_model, [whole], routing, identity, "cpu")
        many = evaluate(tiny_model, parts, routing, identity, "cpu")
        assert many.loss == pytest.approx(one.loss, abs=1e-6)
        assert (many.tokens, many.served_LN, many.agreement) == (one.tokens, one.served_LN, one.agreement)


def test_padding_counts_nowhere(tiny_model):
    batch = random_batch(2)
    real = batch.real.clone()
    real[1, 10:] = False
    padded = replace(batch, real=real, scored=real)
    result = evaluate(tiny_model, [padded], LEARNED, identity, "cpu")
    assert result.tokens == 26
    assert [sum(served) for served in result.served_LN] == [26, 26]


def test_agreement_and_load_are_those_of_the_layers(tiny_model):
    batch = random_batch(4)
    tiny_model.eval()
    learned = [layer.expert_TK[:, 0] for layer in tiny_model(batch).layers]
    distilled = [expert_TK[:, 0] for expert_TK in frozen(tiny_model)(batch.ids).values()]
    result = evaluate(tiny_model, [batch], LEARNED, identity, "cpu")
    same = sum(int((a == b).sum()) for a, b in zip(learned, distilled, strict=True))
    assert result.agreement == pytest.approx(same / 128)
    for layer, chosen in enumerate(learned):
        counts = [int((chosen == expert).sum()) for expert in range(4)]
        assert result.served_LN[layer] == tuple(counts)
        assert result.load[layer] == pytest.approx(max(counts) / 16)


def test_ranks_are_added_up_before_dividing(tiny_model):
    """The other rank's sums come in through the callable; a mean of means would differ, as the shares differ."""
    mine, theirs = random_batch(1, seed=1), random_batch(5, seed=2)
    sums = []
    evaluate(tiny_model, [theirs], LEARNED, lambda tensor: sums.append(tensor.clone()) or tensor, "cpu")
    both = evaluate(tiny_model, [mine], LEARNED, lambda tensor: tensor + sums[0], "cpu")
    together = evaluate(tiny_model, [mine, theirs], LEARNED, identity, "cpu")
    assert both.loss == pytest.approx(together.loss, abs=1e-12)
    assert (both.tokens, both.served_LN, both.agreement) == (together.tokens, together.served_LN, together.agreement)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_and_the_gradients_alone(build, training):
    model = build().train(training)

    def broken():
        yield random_batch(1)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        evaluate(model, broken(), LEARNED, identity, "cpu")
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_dense_model_has_no_load(build):
    result = evaluate(build(moe={"router": "dense", "layers": []}), [random_batch(2)], LEARNED, identity, "cpu")
    assert (result.tokens, result.agreement, result.served_LN, result.load) == (32, None, (), [])


def test_nothing_to_score_is_an_error(tiny_model):
    batch = random_batch(1)
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(tiny_model, [replace(batch, scored=~batch.scored)], LEARNED, identity, "cpu")
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(tiny_model, [], LEARNED, identity, "cpu")


def test_perplexity_per_word():
    result = Evaluation(loss=2.0, tokens=30, agreement=None, served_LN=())
    assert word_perplexity(result, 20) == pytest.approx(math.exp(3.0))
    with pytest.raises(UserError, match="at least 1"):
        word_perplexity(result, 0)


def test_a_hopeless_loss_is_infinite_not_an_exception():
    result = Evaluation(loss=800.0, tokens=10, agreement=None, served_LN=())
    assert result.perplexity == math.inf == word_perplexity(result, 5)
    assert math.isnan(Evaluation(math.nan, 1, None, ()).perplexity)
