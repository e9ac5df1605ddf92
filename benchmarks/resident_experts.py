"""Some of the experts in memory: the others fetched ahead of their tokens, or on demand; compared with all in memory.

A text is read as generation reads it, with a key-value cache: 32 ids in one call, then one id at a time, of 1 sequence
or of 8 together. The 48 ids (16 with --quick) that are read one at a time are timed. Routes are those of a cooccurrence
table of the text. *Ahead*: all fetches of a call begin before its first layer, and experts of least load give way. *On
demand*: a layer fetches its experts when its tokens have come, and those not used for longest give way. Scores must be
the same to the bit before anything is timed (on a GPU up to rounding).

The checkpoint was just written, so its pages are in the system's page cache: a fetch is a copy in memory, and from a
disk it takes longer. Fetches, and the share of the time in which a layer waited for one, are of the last round.
One process, fp32, random weights; wider on a GPU, which has its experts copied there from the host's page cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import markdown, medians, parser, publish, ratios, record, take_turns, timed
from benchmarks.corpus import library_text, make_corpus
from stablemoe_ds.checkpoint.attached import to_attach
from stablemoe_ds.checkpoint.convert.conversion import write_first_checkpoint
from stablemoe_ds.checkpoint.reader import Checkpoint, Progress
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.table_corpus import table_corpus
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from stablemoe_ds.evaluation.generate import Reader
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import pieces
from stablemoe_ds.moe.resident import Traffic
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.counted_corpus import Corpus

VOCAB, PROMPT = 4096, 32
BATCHES, FRACTIONS = (1, 8), (0.5, 0.25)
WHOLE = "all in memory"
Timer = Callable[[Callable[[], None]], object]


def text(folder: Path, quick: bool) -> Corpus:
    """Python's standard library, encoded."""
    prefix = make_corpus(folder, library_text(200_000 if quick else 2_000_000), VOCAB).prefix
    return table_corpus([Source(path=prefix)])


def save_model(folder: Path, corpus: Corpus, quick: bool, groups: Groups) -> Checkpoint:
    """A model of random weights that follows a table of the text, as a checkpoint."""
    width, layers = (64, 2) if quick else (768, 6) if groups.world.device.type == "cuda" else (256, 6)
    blocks = list(range(2, layers + 1, 2))
    run = RunConfig.model_validate(
        {
            "model": {
                "layers": layers,
                "hidden_size": width,
                "heads": 4,
                "ffn_hidden_size": 4 * width,
                "vocab_size": VOCAB,
            },
            "moe": {"router": "table", "table": "cooccurrence", "layers": blocks, "experts": 16},
            "data": {"sequence_length": 256},
            "run_dir": str(folder),
            "optimizer": {"lr": 1e-3},
            "schedule": {"steps": 1, "tokens_per_step": 256},
        }
    )
    table = build_table("cooccurrence", {}, corpus, experts=16, top_k=1, blocks=blocks, seed=0)
    model, random = StableMoEGPT(run, VOCAB, groups.placement), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # experts start as nothing
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    weights = {piece.name: piece.select(piece.parameter).detach() for piece in pieces(model, 1)}
    path = write_first_checkpoint(
        run,
        weights,
        table,
        Progress(stage=2),
        tokenizer=corpus.tokenizer,
        vocab_size=VOCAB,
        attached=to_attach(None, corpus.token_counts),
        origin=__name__,
    )
    return Checkpoint.open(path)


def read(trained: TrainedModel, ids_BS: Tensor, timer: Timer) -> Tensor:
    """Scores after the whole text; ``timer`` is given what reads all but the prompt, to call it."""
    reader = Reader(trained.model, trained.routes, cache_size=ids_BS.shape)
    scores = []

    def go_on() -> None:
        for length in range(PROMPT + 1, ids_BS.shape[1] + 1):
            scores.append(reader.next_logits(ids_BS[:, :length]))

    with inference(trained.model):
        reader.next_logits(ids_BS[:, :PROMPT])
        timer(go_on)
    return scores[-1]


def opened(checkpoint: Checkpoint, groups: Groups) -> dict[str, TrainedModel]:
    """The contestants."""
    models = {WHOLE: TrainedModel(checkpoint, groups.world)}
    for fraction in FRACTIONS:
        ahead, demand = (TrainedModel(checkpoint, groups.world, fraction) for _ in range(2))
        assert demand.residency is not None
        demand.residency.announcing.remove()  # no layer learns of a call before its tokens come
        models |= {f"{fraction:.0%}, ahead": ahead, f"{fraction:.0%}, on demand": demand}
    return models


def measure(models: dict[str, TrainedModel], corpus: Corpus, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Figures of each model. Raises AssertionError if one has other scores than the whole model."""
    ids_T = np.concatenate([np.asarray(stream.ids) for stream in corpus.streams])
    firsts = [number * (len(ids_T) // batch) for number in range(batch)]
    device = models[WHOLE].groups.world.device
    ids_BS = torch.tensor(np.stack([ids_T[first : first + length] for first in firsts]).astype(np.int64), device=device)
    wanted = read(models[WHOLE], ids_BS, lambda go_on: go_on())
    for name, model in models.items():
        scores = read(model, ids_BS, lambda go_on: go_on())
        if not (torch.equal(scores, wanted) or (scores.is_cuda and torch.allclose(scores, wanted, rtol=1e-4))):
            raise AssertionError(f"{name}: other scores than with all experts in memory")
    traffic = dict.fromkeys(models, (0, 0.0))

    def contestant(name: str) -> float:
        took = 0.0
        residency = models[name].residency

        def timer(go_on: Callable[[], None]) -> None:
            nonlocal took
            before = replace(residency.traffic) if residency else Traffic()
            took = timed(go_on, device)()
            after = residency.traffic if residency else Traffic()
            traffic[name] = after.fetched - before.fetched, (after.waited - before.waited) / took

        read(models[name], ids_BS, timer)
        return took

    seconds = take_turns({name: partial(contestant, name) for name in models}, rounds)
    middle, relative = medians(seconds), ratios(seconds, WHOLE)
    steps, layers = length - PROMPT, len(models[WHOLE].model.moe_layers)
    return {
        name: {
            "ids_per_second": batch * steps / middle[name],
            "time_to_whole": relative[name],
            "expert_megabytes": expert_bytes(models[name]) / 1e6,
            "fetches_per_id_and_layer": traffic[name][0] / (batch * steps * layers),
            "waiting": traffic[name][1],
        }
        for name in models
    }


def expert_bytes(trained: TrainedModel) -> int:
    """Bytes of the experts that are in memory."""
    if trained.residency is not None:
        return trained.residency.bytes_in_memory
    return sum(weight.nbytes for layer in trained.model.moe_layers for weight in layer.experts.parameters())


def table_of(rows: list[dict[str, Any]]) -> str:
    """A row a batch size and contestant."""
    head = ["batch", "experts", "MB of experts", "ids/s", "time / all in memory", "fetches per id and layer", "waiting"]
    body = [
        [
            str(row["batch"]),
            name,
            f"{figures['expert_megabytes']:.1f}",
            f"{figures['ids_per_second']:,.0f}",
            f"{figures['time_to_whole']:.2f}",
            f"{figures['fetches_per_id_and_layer']:.2f}",
            f"{figures['waiting']:.0%}",
        ]
        for row in rows
        for name, figures in row["models"].items()
    ]
    return markdown(head, body)


def main() -> None:
    arguments = parser(__doc__, rounds=11).parse_args()
    torch.set_num_threads(1)
    groups = Groups(start_world(), tensor=1, expert=1)
    length = PROMPT + (16 if arguments.quick else 48)
    with tempfile.TemporaryDirectory() as name:
        corpus = text(Path(name), arguments.quick)
        models = opened(save_model(Path(name) / "run", corpus, arguments.quick, groups), groups)
        rows: list[dict[str, Any]] = []
        for batch in BATCHES:
            rows.append({"batch": batch, "models": measure(models, corpus, batch, length, arguments.rounds)})
            record(arguments, __doc__, {"rows": rows}, table_of(rows))
    publish(arguments, __doc__, {"rows": rows}, table_of(rows))
    stop_world()


if __name__ == "__main__":
    main()
