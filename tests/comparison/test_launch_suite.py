"""A suite handed to a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from stablemoe_ds.comparison.launch_suite import launch_all
from stablemoe_ds.comparison.suite import load_suite
from stablemoe_ds.errors import UserError
from tests.comparison.suites import tiny_suite
from tests.training.runs import TinyData

DATA = TinyData(Path("text"), "tokenizer.model", "train", "valid")


def cluster_file(folder: Path, **more: str) -> str:
    path = folder / "cluster.yaml"
    lines = {"name": "there", "launcher": "slurm", "device": "cpu", "nodes": "1", "processes_per_node": "1", **more}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return str(path)


def test_runs_become_one_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    suite = load_suite(tiny_suite(DATA, tmp_path).file)
    assert launch_all(suite.runs, cluster_file(tmp_path), dry_run=True) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3\n" in script
    for one in suite.runs:
        assert f"run_dir: {one.folder}\n" in script
    assert not suite.output.exists(), "a dry run writes nothing"


def test_a_cluster_with_a_place_of_its_own_for_runs_is_refused(tmp_path: Path):
    suite = load_suite(tiny_suite(DATA, tmp_path).file)
    with pytest.raises(UserError, match="run_dir: got elsewhere: a suite decides where its runs go"):
        launch_all(suite.runs, cluster_file(tmp_path, run_dir="elsewhere"), dry_run=True)
