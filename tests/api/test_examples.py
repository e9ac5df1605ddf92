"""Every program in examples/ runs, and says what it is there to say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.distributed.launch import run_distributed
from tests.training.runs import command

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def said_by(example: str, *arguments: str) -> str:
    program = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text] == []


def test_an_open_model_says_what_the_commands_say(finished: RunConfig) -> None:
    said = said_by("open_model.py", finished.directory)
    new = command("generate", finished.directory, "--prompt", "def wrap(", "--tokens", "20", "--json").json
    assert said.startswith(new[0]["continuation"] + "\n")
    assert "layer 0 sends its ids to experts [" in said


def test_a_layer_learns_a_routing_and_goes_on_along_it() -> None:
    *steps, table = said_by("moe_layer.py").splitlines()
    losses = [float(line.split()[3]) for line in steps]
    assert losses[-1] < losses[9] < losses[0]
    assert table.startswith("table ")


def test_a_large_model_follows_what_a_small_one_has_learned(capsys: pytest.CaptureFixture[str]) -> None:
    done = runpy.run_path(str(EXAMPLES / "table_transfer.py"))
    small, large, last = capsys.readouterr().out.splitlines()
    sizes = [int(line.split()[0].replace(",", "")) for line in (small, large)]
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)
    assert last.endswith(": 100% of the ids go to the expert that the small model chose")
    served = np.bincount(done["table"].expert_LVK[0, :, 0], minlength=4)
    assert (served > 0).all(), "every expert is chosen by some id, so the agreement says something"
    assert all(float(line.split()[-1]) < 1 for line in (small, large)), "chance is ln 100 = 4.6"


def test_a_table_and_a_run(finished: RunConfig) -> None:
    said = said_by("routing_table.py", str(Path(finished.directory, "routing_table.safetensors")))
    assert f"of {finished.moe.experts} experts each" in said
    said = said_by("load_run.py", str(ROOT / "ds_configs" / "demo.yaml"))
    assert "router switch, 100 steps" in said
    assert "override moe.ruoter=switch" in said


def losses_here(expert_parallel: int) -> list[float]:
    """What the example for several processes trains, in this one."""
    script = str(EXAMPLES / "moe_layer_on_several.py")
    sys.argv = [script, str(expert_parallel)]
    losses: list[float] = runpy.run_path(script, run_name="__main__")["losses"]
    return losses


@pytest.mark.distributed
def test_several_processes_train_what_one_does() -> None:
    """Over the freeze, with the experts divided (2), and with a copy of each in both processes (1)."""
    alone = run_distributed(1, losses_here, 1)[0]
    assert alone[-1] < alone[0]
    for expert_parallel in (2, 1):
        for losses in run_distributed(2, losses_here, expert_parallel):
            assert losses == pytest.approx(alone, abs=2e-6)
