"""What a run leaves open is what its checkpoint has, then the default: the embedding and what routers see of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stablemoe_ds.config.resolved import as_begun, resolve, saved_run
from stablemoe_ds.config.schema import RunConfig

Make = Callable[..., RunConfig]
FORMER = ("model.embedding=scaled", "moe.router_input=raw")


def choices(run: RunConfig) -> tuple[str | None, str | None]:
    return run.model.embedding, run.moe.router_input


@pytest.mark.parametrize(
    ("said", "before", "chosen"),
    [
        ((), None, ("plain", "normalized")),
        (("model.embedding=scaled",), None, ("scaled", "raw")),
        ((), FORMER, ("scaled", "raw")),
        (("moe.router_input=normalized",), FORMER, ("scaled", "normalized")),
        (("model.embedding=plain",), FORMER, ("plain", "raw")),
        # A dense run has an embedding, but no router to take anything from.
        ((), ("moe.router_input=raw", "moe.router=dense", "moe.layers=[]"), ("plain", "normalized")),
    ],
)
def test_what_is_left_open(
    make: Make, said: tuple[str, ...], before: tuple[str, ...] | None, chosen: tuple[str, str]
) -> None:
    run = make(*said)
    earlier = None if before is None else make(*before)
    assert choices(as_begun(run, earlier)) == chosen
    resolved = resolve(run, 1, None, earlier).run
    assert choices(resolved) == chosen
    assert as_begun(resolved, None) == resolved


def test_a_table_that_an_older_run_named_in_vain_is_forgotten(make: Make) -> None:
    stray = make().model_dump(mode="json")
    stray["moe"]["table"] = "cooccurence"
    assert saved_run(stray) == saved_run(make().model_dump(mode="json"))
    for followed in (("moe.router=table",), ("moe.router=topk", "moe.layers=[2,4]", "moe.table_layers=[2]")):
        assert saved_run(make(*followed, "moe.table=even").model_dump(mode="json")).moe.table == "even"


def test_a_checkpoint_that_does_not_say_has_what_was_the_default_in_its_time(make: Make) -> None:
    settings = make("model.embedding=plain", "moe.router_input=normalized").model_dump(mode="json")
    assert choices(saved_run(settings)) == ("plain", "normalized")
    del settings["model"]["embedding"], settings["moe"]["router_input"]
    assert choices(saved_run(settings)) == ("scaled", "raw")
