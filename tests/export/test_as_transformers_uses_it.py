"""What transformers asks of a model beyond logits: caches, padding, labels, saving, other kinds of attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.export.exported_folder import export
from stablemoe_ds.export.folder_settings import NETWORKS
from tests.export.opened import opened, some_ids
from tests.export.small_checkpoints import SPLITTING, SavedModel
from tests.export.test_equal_logits import PAPER

PADDING = 3


@pytest.fixture(scope="module", params=["modern", "paper", "learned", "split", "bigram", "cnn", "transformer"])
def pair(
    request: pytest.FixtureRequest, saved: Callable[..., SavedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SavedModel, Path]:
    """A model that weighs two experts and a shared one, and its exported folder."""
    shape: dict[str, Any] = {"moe": {"top_k": 2, "shared_experts": 1}, "data": {"sequence_length": 32, "eos_id": 2}}
    if request.param == "paper":
        shape["model"] = PAPER
    if request.param == "split":
        shape["moe"] |= {"router": "table", "table": SPLITTING, "gate": "sigmoid"}
    if request.param in NETWORKS:
        shape["moe"]["distilled"] = {"kind": request.param}
        shape["data"]["document_mask"] = "none" if request.param == "cnn" else "attention"
    ours = saved(stage=1 if request.param == "learned" else 2, **shape)
    folder = tmp_path_factory.mktemp(request.param) / "exported"
    export(ours.path, folder)
    return ours, folder


@pytest.fixture(scope="module")
def theirs(pair: tuple[SavedModel, Path]) -> Any:
    return opened(pair[1])[0]


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_generation_with_a_cache_is_generation_without_and_ours(pair: tuple[SavedModel, Path], theirs: Any) -> None:
    ours, ids = pair[0], some_ids()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = theirs.generate(ids, **options)
    assert torch.equal(cached, theirs.generate(ids, use_cache=False, **options))
    if ours.routes.blocks:
        new = generate(ours.model, ids.tolist(), ours.routes, max_new_tokens=8)
        assert cached[:, ids.shape[1] :].tolist() == new


def test_beams_that_change_places_take_their_ids_along(theirs: Any) -> None:
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(some_ids(), **options), theirs.generate(some_ids(), use_cache=False, **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(theirs: Any, side: str) -> None:
    short, long = some_ids(1, 5), some_ids(2, 9)[1:]
    padding = torch.full((1, 4), PADDING)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    ids, mask = torch.cat([padded, long]), torch.ones(2, 9, dtype=torch.int64)
    at = slice(4, 9) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, at] = 1
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
        assert_near(logits[:1, at], theirs(short).logits)
        assert_near(logits[1:], theirs(long).logits)


def test_a_padded_batch_continues_as_each_prompt_alone(theirs: Any) -> None:
    short, long = some_ids(1, 5), some_ids(2, 9)[1:]
    ids = torch.cat([torch.cat([torch.full((1, 4), PADDING), short], dim=1), long])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PADDING}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    both = theirs.generate(ids, attention_mask=mask, **options)[:, 9:]
    for row, prompt in enumerate((short, long)):
        alone = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]
        assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_both_of_its_names(theirs: Any, name: str) -> None:
    from transformers import DynamicCache

    ids, cache = some_ids(), DynamicCache(config=theirs.config)
    with torch.no_grad():
        whole = theirs(ids).logits
        first = theirs(ids[:, :7], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 7
        assert cache in (first.get("cache"), first.get("past_key_values"))
        rest = theirs(ids[:, 7:], use_cache=True, **{name: cache}).logits
    assert_near(torch.cat([first.logits, rest], dim=1), whole)
    assert {"cache", "past_key_values"} <= inspect.signature(type(theirs).forward).parameters.keys()


def test_labels_give_the_loss_and_every_weight_a_gradient(pair: tuple[SavedModel, Path]) -> None:
    ours, ids = pair[0], some_ids(4, 32)
    labels = ids.clone()
    labels[0, :5] = -100
    model = opened(pair[1])[0].train()
    loss = model(ids, labels=labels).loss
    wanted = torch.nn.functional.cross_entropy(ours.logits(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_near(loss, wanted)
    scored = (labels[:, 1:] != -100).sum()
    assert_near(model(ids, labels=labels, num_items_in_batch=4 * scored).loss, wanted / 4)  # as Trainer calls it
    plain = _gradients(model, loss)
    frozen = {name for name in plain if ".network." in name}
    assert {name for name, gradient in plain.items() if gradient is None} == frozen
    model.gradient_checkpointing_enable()
    for name, gradient in _gradients(model, model(ids, labels=labels).loss).items():
        if name not in frozen:
            assert_near(gradient, plain[name])


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_saved_and_opened_again_it_is_the_same(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "again")
    again, report = opened(tmp_path / "again")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex_attention"])
def test_every_kind_of_attention_computes_the_same(pair: tuple[SavedModel, Path], kind: str) -> None:
    ids, mask = some_ids(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        wanted = opened(pair[1])[0](ids, attention_mask=mask).logits
        found = opened(pair[1], attn_implementation=kind)[0](ids, attention_mask=mask).logits
    assert_near(found[mask.bool()], wanted[mask.bool()])


def test_the_parts_that_servers_rely_on(theirs: Any) -> None:
    """Of vLLM's Transformers backend: what comes in as keywords reaches attention, and attention can be replaced."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append((module.layer_idx, module.is_causal, kwargs["attention_instances"], kwargs["scaling"]))
        return torch.zeros_like(query.transpose(1, 2)), None

    assert theirs._supports_attention_backend
    assert theirs.base_model_prefix == "model"
    assert not any(name.endswith(".experts") for name, _ in theirs.named_modules())
    before = theirs.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("servers_own", attend)
    try:
        theirs.config._attn_implementation = "servers_own"
        given = object()
        ids = some_ids(1)
        positions = torch.arange(12)[None]
        with torch.no_grad():
            out = theirs.model(
                input_ids=ids,
                position_ids=positions,
                attention_instances=given,
                use_cache=False,
                return_dict=False,
            )
    finally:
        theirs.config._attn_implementation = before
    assert isinstance(out, tuple)
    assert out[0].shape == (1, 12, 32)
    assert seen == [(layer, True, given, (32 // 4) ** -0.5) for layer in range(3)]


def test_the_base_model_opens_by_itself(pair: tuple[SavedModel, Path], theirs: Any) -> None:
    from transformers import AutoModel

    base, report = AutoModel.from_pretrained(pair[1], trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, theirs.model(ids).last_hidden_state)


def test_hidden_states_and_few_logits(theirs: Any) -> None:
    ids = some_ids()
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
        assert len(out.hidden_states) == theirs.config.num_hidden_layers + 1
        assert torch.equal(theirs.lm_head(out.hidden_states[-1]), out.logits)
        assert_near(theirs(ids, logits_to_keep=1).logits, out.logits[:, -1:])


def test_a_table_needs_token_ids(pair: tuple[SavedModel, Path], theirs: Any) -> None:
    ids = some_ids()
    embeds = theirs.get_input_embeddings()(ids)
    with torch.no_grad():
        assert_near(theirs(ids, inputs_embeds=embeds).logits, theirs(ids).logits)
        if pair[0].routes.blocks:
            with pytest.raises(ValueError, match="pass input_ids"):
                theirs(inputs_embeds=embeds)
        else:
            assert_near(theirs(inputs_embeds=embeds).logits, theirs(ids).logits)
