"""``stablemoe export`` on a run that was trained: what is written says what the run was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.export.exported_folder import export
from tests.export.opened import opened
from tests.training.runs import Answer, checkpoint_of, command, history

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig


@pytest.fixture(scope="module")
def written(finished: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What the command said; the folder is its ``output``."""
    folder = tmp_path_factory.mktemp("command") / "out"
    return command("export", finished.directory, "--output", str(folder), "--json")


@pytest.fixture(scope="module")
def folder(written: Answer) -> Path:
    return Path(written.json["output"])


def test_the_answer_says_what_was_written(written: Answer, folder: Path) -> None:
    assert (written.code, written.json["router"], written.json["tokenizer"]) == (0, "table", True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    model, _ = opened(folder)
    stored = sum(model.state_dict()[name].nbytes for name in index["weight_map"])
    assert written.json["bytes"] == index["metadata"]["total_size"] == stored
    # The output matrix is the embedding, and is stored once.
    assert model.state_dict().keys() - index["weight_map"].keys() == {"lm_head.weight"}


def test_the_card_says_what_the_run_was(finished: RunConfig, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    checkpoint = Checkpoint.open(finished.directory)
    table, position = checkpoint.table(), checkpoint.progress.position
    assert table is not None
    valid, test = (history(finished, kind)[-1] for kind in ("valid", "test"))
    for fact in (
        f"# {finished.name}",
        f"| tokens read | {position.tokens:,} |",
        *(f"fingerprint `{name}`" for name in position.sources),
        f"sha256 `{table.sha256}`",
        f"sha256 `{checkpoint.tokenizer}`",
        f"| perplexity, validation text | {valid['perplexity']:.4f} a token",
        f"| perplexity, test text | {test['perplexity']:.4f} a token",
        "| max/mean load of the experts on the training text, by layer |",
        "**License:** to be filled in.",
    ):
        assert fact in card
    assert str(Path(finished.directory).parent) not in card


def test_the_perplexity_of_an_earlier_checkpoint_is_its_own(finished: RunConfig, tmp_path: Path) -> None:
    """Checkpoint 3 is of stage 1: its routers are learned, and the figures of the run's end are not its."""
    export(checkpoint_of(finished, 3), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{history(finished, 'test')[-1]['perplexity']:.4f}" not in card
    assert "learned, from hidden states" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router"] == "affinity"


def test_text_goes_in_and_text_comes_out(finished: RunConfig, folder: Path) -> None:
    """What the README shows, and the same continuation as ``stablemoe generate``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, _ = opened(folder)
    prompt = "def wrap("
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
    ours = command("generate", finished.directory, "--prompt", prompt, "--tokens", "8", "--json").json
    assert Tokenizer(str(finished.data.tokenizer)).decode(new.tolist()) == ours[0]["continuation"]
    assert torch.equal(model.generate(max_new_tokens=1)[:, :1], torch.tensor([[tokenizer.eos_token_id]]))


def test_a_refusal_is_one_line(finished: RunConfig, tmp_path: Path) -> None:
    answer = command("export", finished.directory, "--output", str(tmp_path))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.strip().splitlines()[-1].startswith(f"stablemoe: error: {tmp_path} exists already")
