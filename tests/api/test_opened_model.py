"""A trained model, opened from Python: the numbers that the commands and transformers have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stablemoe_ds import UserError, open_model
from tests.training.runs import checkpoint_of

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig
    from stablemoe_ds.distributed.groups import Groups


def test_a_model_follows_its_table(finished: RunConfig, world_groups: Groups) -> None:
    model = open_model(finished.directory)
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    assert model.table is not None
    routes = model.routes(ids)
    assert routes.tolist() == model.table.expert_LVK[:, ids.numpy()].tolist()
    # Along the routes of a table, a row's scores are those of the row by itself.
    torch.testing.assert_close(model.logits(ids)[1:], model.logits(ids[1].tolist()))
    assert model.logits("def")[0].shape == (len(model.tokenizer.encode("def")), model.trained.model.vocab_size)


def test_in_stage_1_the_learned_router_can_be_asked(finished: RunConfig, world_groups: Groups) -> None:
    model = open_model(checkpoint_of(finished, 3))
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    learned, frozen = model.routes(ids, learned=True), model.routes(ids)
    assert learned.shape == frozen.shape == (len(finished.moe.layers), 2, 7, finished.moe.top_k)
    layer, seen = model.trained.model.moe_layers[0], []
    handle = layer.register_forward_hook(lambda _module, _arguments, out: seen.append(out[1].expert_TK))
    scores = model.logits(ids, learned=True)
    handle.remove()
    assert torch.equal(seen[0].view(7, 2, -1).transpose(0, 1), learned[0])
    assert not torch.equal(scores, model.logits(ids)) or torch.equal(learned, frozen)


def test_two_models_are_open_side_by_side_and_misuse_is_refused(
    finished: RunConfig, world_groups: Groups, tmp_path: Path
) -> None:
    new, old = open_model(finished.directory), open_model(checkpoint_of(finished, 3))
    assert not torch.equal(new.logits([5, 6, 7]), old.logits([5, 6, 7]))
    assert new.generate(["def", "class"], max_new_tokens=3)[0] == new.generate("def", max_new_tokens=3)[0]
    with pytest.raises(UserError, match=r"ids: got 0 to 9999: expected 0 to"):
        new.logits([0, 9999])
    with pytest.raises(UserError, match=r"ids: got torch.float32 of shape \[2\]"):
        new.logits(torch.zeros(2))
    with pytest.raises(UserError, match="no checkpoint at"):
        open_model(tmp_path)
