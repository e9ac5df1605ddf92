"""Runs whose gate is not the router's own: they learn, go on where they stopped, and are evaluated as they trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import (
    STEPS,
    SWITCH,
    TinyData,
    checkpoint_of,
    command,
    differing,
    history,
    restarted,
    tensors_of,
    train_run,
)
from tests.training.test_routers import run_of

pytestmark = pytest.mark.timeout(900)
AT = "decoder.layers.1.moe.router."
LEARNED: dict[tuple[str, str], set[str]] = {
    ("hash", "doubled"): {"centroids"},
    ("stablemoe", "learned"): {"centroids", "gate.scale_N", "gate.bias_N"},
    ("stablemoe", "one"): {"centroids"},
}
"""What the router of a run has beside a distilled one, by router and gate."""


@pytest.fixture(scope="module", params=LEARNED, ids=" ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="module")
def trained(case: tuple[str, str], data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    router, gate = case
    run = run_of(router, data, tmp_path_factory.mktemp("gates") / "run", moe={"gate": gate})
    train_run(run)
    return run


def test_learns_what_the_gate_has_to_learn(case: tuple[str, str], trained: RunConfig) -> None:
    lines = history(trained, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    first, switch, end = (tensors_of(checkpoint_of(trained, step)) for step in (2, SWITCH, STEPS))
    own = {name for name in end if name.startswith(AT) and "/" not in name and ".distilled." not in name}
    assert {name.removeprefix(AT) for name in own} == LEARNED[case]
    assert sorted(differing({n: first[n] for n in own}, {n: switch[n] for n in own})) == sorted(own)
    moved = differing({n: switch[n] for n in own}, {n: end[n] for n in own})
    if case[1] != "one":
        assert sorted(moved) == sorted(own), "the gate goes on learning in stage 2"


def test_resume_is_bit_exact(trained: RunConfig, tmp_path: Path) -> None:
    resumed = restarted(trained, tmp_path / "resumed", SWITCH - 2)
    train_run(resumed)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(trained, STEPS))) == []
    assert history(resumed) == history(trained)


def test_a_checkpoint_evaluates_and_generates_as_the_run_did(case: tuple[str, str], trained: RunConfig) -> None:
    (final,) = (line for line in history(trained, "valid") if line["step"] == STEPS)
    said = command("eval", trained.directory, "--json").json
    assert said["perplexity"] == pytest.approx(final["perplexity"], rel=1e-6)
    asked = ("generate", trained.directory, "--prompt", "def wrap(self", "--tokens", "6", "--json")
    assert command(*asked).json == command(*asked, "--no-cache").json
    assert command("checkpoint", "show", trained.directory, "--json").json["gate"] == case[1]
