"""lm-evaluation-harness on an exported folder, offline: its word perplexity is ours. Needs the extra lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.evaluation.perplexity import evaluate, word_perplexity
from stablemoe_ds.export.exported_folder import export

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig
    from stablemoe_ds.distributed.groups import Groups

pytest.importorskip("lm_eval", reason="pip install 'stablemoe_ds[lm-eval]'")
pytestmark = pytest.mark.slow

TEXTS = ["def wrap(text):", "import os, sys", "class Reader: pass"]
TASK = """\
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""


def test_word_perplexity_of_a_local_task_is_ours(finished: RunConfig, world_groups: Groups, tmp_path: Path) -> None:
    from stablemoe_ds import open_model

    export(finished.directory, tmp_path / "out")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=tmp_path / "texts.jsonl"))
    model = f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32"
    options = ["--model", "hf", "--model_args", model, "--tasks", "local_text", "--device", "cpu", "--batch_size", "2"]
    options += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "answer")]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    # The ranks of this process are none of the program's.
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *options],
        env=environment | quiet | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (answer,) = (tmp_path / "answer").rglob("results_*.json")
    theirs = json.loads(answer.read_text())["results"]["local_text"]["word_perplexity,none"]

    ours = open_model(finished.directory)
    batches = []
    for text in TEXTS:
        ids = ours.tokenizer.encode(text)
        rows = [torch.tensor([row]) for row in ([ours.tokenizer.eos_id, *ids[:-1]], ids)]
        everything = torch.ones_like(rows[0], dtype=torch.bool)
        batches.append(Batch(*rows, everything, everything))
    found = evaluate(ours.trained.model, batches, ours.trained.routes, world_groups.sum_over_data_ranks, "cpu")
    assert theirs == pytest.approx(word_perplexity(found, sum(len(text.split()) for text in TEXTS)), rel=1e-4)
