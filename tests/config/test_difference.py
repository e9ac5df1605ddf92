"""In what two runs differ."""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import TinyData, small_run

DATA = TinyData(Path("text"), "tokenizer.model", "train", "valid")


def test_differences_leave_out_what_changes_nothing():
    one = small_run(DATA, Path("a"))
    two = small_run(DATA, Path("b"), logging={"every": 7}, checkpoint={"every": 3}, data={"workers": 1})
    assert list(differences(one, two.model_copy(update={"name": "other"}))) == []
    unknown = one.model_copy(update={"model": one.model.model_copy(update={"vocab_size": None})})
    assert list(differences(unknown, one)) == [], "the tokenizer fills it in"
    switches = [small_run(DATA, Path("a"), moe={"router": r}, stages={"at_step": 3}) for r in ("switch", "stablemoe")]
    later = [run.model_copy(update={"stages": run.stages.model_copy(update={"at_step": 4})}) for run in switches]
    found = [[key for key, _, _ in differences(*pair)] for pair in zip(switches, later, strict=True)]
    assert found == [[], ["stages.at_step"]], "routers of one stage do not look at it"
    other: RunConfig = small_run(DATA, Path("a"), optimizer={"lr": 0.5})
    assert list(differences(one, other)) == [("optimizer.lr", 1e-3, 0.5)]
