"""Records of routes: what the layers did, in an order that stays, on a disk that may fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.perplexity import evaluate
from stablemoe_ds.evaluation.probe import record_routes
from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.run_directory.probe_records import RecordFolder
from tests.evaluation.test_perplexity import random_batch


def test_records_what_fixed_routing_says_of_each_real_token(build):
    model = build(moe={"top_k": 2, "distilled": {"kind": "bigram"}}).train()
    routing = freeze(model.distilled_routers, 2, (2, 3))
    batch = random_batch(3)
    real = batch.real.clone()
    real[1, 12:] = False
    probe = [replace(batch, real=real), random_batch(2, seed=5)]
    record = record_routes(model, probe, routing, "cpu").expert_LP
    wanted = [
        [int(routing(b.ids)[block][position * len(b.ids) + row, 0])]
        for block in (2, 3)
        for b in probe
        for row in range(len(b.ids))
        for position in range(16)
        if b.real[row, position]
    ]
    assert record.dtype == np.int16
    assert record.shape == (2, 44 + 32)
    assert record.reshape(-1, 1).tolist() == wanted
    assert model.training


def test_learned_routes_are_those_of_the_layers_and_no_prediction(tiny_model):
    batch = random_batch(2)
    record = record_routes(tiny_model, [batch], LEARNED, "cpu").expert_LP
    tiny_model.eval()
    for layer, report in enumerate(tiny_model(batch).layers):
        assert record[layer].reshape(2, 16).T.reshape(-1).tolist() == report.expert_TK[:, 0].tolist()
    distilled = record_routes(tiny_model, [batch], freeze(tiny_model.distilled_routers, 1, (2, 3)), "cpu").expert_LP
    assert (record != distilled).any()


def test_does_not_depend_on_batch_size(tiny_model):
    whole = random_batch(4)
    fields = (whole.ids, whole.labels, whole.real, whole.scored)
    parts = [type(whole)(*(field[i : i + 1] for field in fields)) for i in range(4)]
    one, many = (record_routes(tiny_model, probe, LEARNED, "cpu").expert_LP for probe in ([whole], parts))
    np.testing.assert_array_equal(one, many)


def test_counts_load_and_agreement_as_evaluation_does(tiny_model):
    batch = random_batch(4)
    record = record_routes(tiny_model, [batch], LEARNED, "cpu")
    outcome = evaluate(tiny_model, [batch], LEARNED, lambda total: total, "cpu")
    assert record.served_LN.tolist() == [list(row) for row in outcome.served_LN]
    assert record.agreed / record.compared == outcome.agreement
    fixed = record_routes(tiny_model, [batch], freeze(tiny_model.distilled_routers, 1, (2, 3)), "cpu")
    assert (fixed.agreed, fixed.compared) == (0, 0)


def test_nothing_to_record_is_refused(tiny_model, build):
    with pytest.raises(ValueError, match="0 probe batches"):
        record_routes(tiny_model, [], LEARNED, "cpu")
    with pytest.raises(ValueError, match="0 MoE layers"):
        record_routes(build(moe={"router": "dense", "layers": []}), [random_batch(1)], LEARNED, "cpu")


def record(value: int) -> np.ndarray:
    return np.full((2, 5), value, dtype=np.int16)


def test_folder_gives_back_what_it_got_in_order(tmp_path):
    folder = RecordFolder(tmp_path / "probe")
    assert folder.load_all() is None
    for step in (0, 900, 20, 123_456_789):
        folder.append(step, record(step % 7))
    records = folder.load_all()
    assert records.steps.tolist() == [0, 20, 900, 123_456_789]
    assert records.expert_HLP[:, 0, 0].tolist() == [0, 6, 4, 123_456_789 % 7]
    assert records.expert_HLP.dtype == np.int16


def test_folder_is_cut_back_on_resume(tmp_path):
    folder = RecordFolder(tmp_path)
    folder.truncate_after(3)
    for step in (10, 20, 30):
        folder.append(step, record(1))
    folder.truncate_after(20)
    assert folder.steps() == [10, 20]
    folder.append(20, record(3))
    assert folder.load_all().expert_HLP[-1].tolist() == record(3).tolist()


def test_folder_survives_a_kill_in_the_middle(tmp_path):
    folder = RecordFolder(tmp_path)
    folder.append(10, record(1))
    (tmp_path / "00000020.part").write_bytes(b"\x93NUMPY")
    assert folder.load_all().steps.tolist() == [10]


def test_damaged_records_are_named(tmp_path):
    folder = RecordFolder(tmp_path)
    folder.append(10, record(1))
    (tmp_path / "00000020.npy").write_bytes(b"not a record")
    with pytest.raises(UserError, match=r"00000020\.npy"):
        folder.load_all()
    folder.append(20, record(1)[:, :3])
    with pytest.raises(UserError, match="different runs"):
        folder.load_all()
    with pytest.raises(ValueError, match="int16"):
        folder.append(30, torch.zeros(2, 5).numpy())
