"""Preparing data, compared with megatron's own way, and how long a step waits for the loader.

The text is Python's standard library, one document per file, or FILE, one document per line. Megatron's way is that
of its tools/preprocess_data.py: a pool of processes parses and encodes JSON lines, whole documents at a time, with
sentencepiece, and IndexedDatasetBuilder writes them one by one. Both use the same documents and the same tokenizer,
and have to write the same bytes before anything is timed. Our figures include our checks, digests and counts.

In-process figures leave out starting Python and importing libraries. Whole commands, which --quick leaves out, are
timed from start to end.

The loader's figure is the share of a training step (stage 1, one process, the model of benchmarks.step) spent waiting
for a batch. Without a worker the step reads for itself and waits as long as that takes. The goal is 2 %.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from benchmarks.common import markdown, medians, parser, publish, ratios, take_turns, timed
from benchmarks.contestants import LAPTOP, QUICK, Contestant, Task, build
from benchmarks.corpus import Corpus, library_text
from stablemoe_ds.data.corpus import corpus_file
from stablemoe_ds.data.flaws import Flaws
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.run_data import RunData
from stablemoe_ds.data.text import Documents, Span, read_documents
from stablemoe_ds.data.text_files import TextFile
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world

CHUNK = 32
"""Documents that a process of megatron's pool takes at a time."""
OURS, MEGATRON = "stablemoe", "megatron"
Ways = dict[str, tuple[Callable[[], object], Callable[[], object]]]


@dataclass(frozen=True)
class Text:
    """The same documents twice: as text files, and as lines of JSON."""

    files: list[Path]
    documents: Documents
    lines: Path
    tokenizer: Path


def gather(folder: Path, file: Path | None, most_bytes: int, vocab_size: int) -> Text:
    """Text to prepare, and a tokenizer learned from it."""
    files = [file] if file else library_text(most_bytes)
    documents: Documents = "line" if file else "file"
    lines = folder / "text.jsonl"
    with lines.open("w") as out:
        for path in files:
            for document in read_documents(Span(TextFile(path)), documents, Flaws()):
                out.write(json.dumps({"text": document.text}) + "\n")
    tokenizer = train_tokenizer(files, folder / "tokenizer.model", vocab_size, "bpe")
    return Text(files, documents, lines, tokenizer.path)


@cache
def _load(tokenizer: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))


def _encode(tokenizer: Path, line: str) -> list[int]:
    model = _load(tokenizer)
    return [*model.encode(json.loads(line)["text"]), model.eos_id()]


def megatron_way(lines: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    """Encode JSON lines into ``prefix.bin`` and ``prefix.idx``."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(_load(tokenizer).vocab_size()))
    with lines.open() as file, multiprocessing.Pool(workers) as pool:
        for ids in pool.imap(partial(_encode, tokenizer), file, CHUNK):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def ways_of(text: Text, folder: Path, workers: int, quick: bool) -> Ways:
    """Megatron's way and ours, in this process and, unless quick, as whole commands."""
    files = [str(path) for path in text.files]
    ours, theirs = folder / "ours", folder / "theirs"
    tokenizer = Tokenizer(text.tokenizer)
    cli = [sys.executable, "-m", "stablemoe_ds", "data", "prepare", "--tokenizer", str(text.tokenizer)]
    cli += ["--documents", text.documents, "--output", str(ours), "--workers", str(workers), *files]
    code = "import sys; from pathlib import Path; from benchmarks.data import megatron_way; a = sys.argv[1:]; "
    code += "megatron_way(Path(a[0]), Path(a[1]), Path(a[2]), int(a[3]))"
    script = [sys.executable, "-c", code, str(text.lines), str(text.tokenizer), str(theirs), str(workers)]
    ways: Ways = {
        "in process": (
            partial(megatron_way, text.lines, text.tokenizer, theirs, workers),
            partial(prepare, text.files, tokenizer, ours, workers, text.documents),
        )
    }
    if not quick:
        start = partial(subprocess.run, check=True, capture_output=True)
        ways["whole command"] = (partial(start, script), partial(start, cli))
    return ways


def check_equal(folder: Path) -> int:
    """Raise AssertionError unless both ways wrote the same; returns the tokens of the corpus."""
    for ending in ("bin", "idx"):
        one, other = (corpus_file(folder / name, ending).read_bytes() for name in ("ours", "theirs"))
        if one != other:
            raise AssertionError(f"the two ways wrote different .{ending} files")
    return int(np.load(corpus_file(folder / "ours", "counts.npy")).sum())


def measure_preparing(text: Text, folder: Path, workers: int, quick: bool, rounds: int) -> dict[str, Any]:
    """Median seconds and tokens a second of each way, with so many processes that encode."""
    ways = ways_of(text, folder, workers, quick)
    contestants: dict[str, Callable[[], float]] = {}
    for kind, (theirs, ours) in ways.items():
        theirs()
        ours()
        tokens = check_equal(folder)
        contestants |= {f"{MEGATRON}, {kind}": timed(theirs), f"{OURS}, {kind}": timed(ours)}
    seconds = take_turns(contestants, rounds)
    middle = medians(seconds)
    return {
        "workers": workers,
        "tokens": tokens,
        "seconds": middle,
        "tokens_per_second": {name: tokens / took for name, took in middle.items()},
        "ratio_to_megatron": {kind: ratios(seconds, f"{MEGATRON}, {kind}")[f"{OURS}, {kind}"] for kind in ways},
    }


def measure_waiting(corpus: Corpus, folder: Path, quick: bool, rounds: int) -> dict[str, float]:
    """Share of a training step in which no batch was there, by workers of the loader."""
    shape = QUICK if quick else LAPTOP
    task = Task(1, ("stage 1",), shape, corpus, str(folder), rounds)
    contestant = build(task, Groups(start_world(), tensor=1, expert=1))["stage 1"]
    engine, run = contestant.engine, contestant.engine.run
    readers = {}
    for workers in (0, 1):
        reading = run.model_copy(update={"data": run.data.model_copy(update={"workers": workers})})
        data = RunData(reading, engine.plan, engine.groups, Tokenizer(corpus.tokenizer))
        readers[f"{workers} workers"] = Contestant(engine.run, engine, data, None)
    for reader in readers.values():
        reader.start()
    seconds = take_turns({name: reader.step for name, reader in readers.items()}, rounds)
    stop_world()
    return {name: sum(reader.waited[1:]) / sum(seconds[name]) for name, reader in readers.items()}


def tables(rows: list[dict[str, Any]], waiting: dict[str, float]) -> str:
    names = list(rows[0]["tokens_per_second"])
    body = []
    for row in rows:
        speeds = [f"{row['tokens_per_second'][name]:,.0f}" for name in names]
        body.append([str(row["workers"]), *speeds, *(f"{r:.2f}" for r in row["ratio_to_megatron"].values())])
    head = ["processes", *(f"{name}, tokens/s" for name in names)]
    head += [f"{kind}: time / megatron" for kind in rows[0]["ratio_to_megatron"]]
    shares = [[name, f"{share:.2%}"] for name, share in waiting.items()]
    return markdown(head, body) + "\n\n" + markdown(["loader", "share of a step spent waiting"], shares)


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--text", type=Path, help="a text file to prepare, a document a line")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = gather(folder, arguments.text, *((300_000, 512) if quick else (8_000_000, 4096)))
        numbers = [1] if quick else sorted({1, len(os.sched_getaffinity(0))})
        rows = [measure_preparing(text, folder, workers, quick, arguments.rounds) for workers in numbers]
        corpus = Corpus(str(text.tokenizer), str(folder / "ours"))
        waiting = measure_waiting(corpus, folder, quick, arguments.rounds)
    publish(arguments, __doc__, {"rows": rows, "waiting": waiting}, tables(rows, waiting))


if __name__ == "__main__":
    main()
