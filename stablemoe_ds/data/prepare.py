"""Text files to a prepared corpus, in parallel, with the same bytes whatever the number of processes."""

from __future__ import annotations

import hashlib
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.data.corpus import PreparedInfo, corpus_file
from stablemoe_ds.data.flaws import Flaws, Judge
from stablemoe_ds.data.text import Documents, Span, plan_spans, read_documents
from stablemoe_ds.data.text_files import AS_FOUND, Reading, TextFile, recognise
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.libraries import import_megatron
from stablemoe_ds.errors import UserError
from stablemoe_ds.progress_bar import progress_bar

SPAN_BYTES = 4 << 20
"""Text one task encodes: long enough to hide the cost of a task, short enough to share out one file."""

ENDINGS = ("counts.npy", "bin", "idx", "json")
"""The files of a corpus in the order they appear; the last one seals it."""


@dataclass
class Encoded:
    """Ids of the documents of a span, and what was counted in their text.

    ids: the documents one after the other, each with its eos; lengths: int64 [documents], ids of each.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    words: int
    characters: int
    bytes: int
    flaws: Flaws


@dataclass
class Totals:
    """Sums over all spans; ``counts`` is int64 [V]."""

    counts: NDArray[np.int64]
    documents: int = 0
    words: int = 0
    characters: int = 0
    bytes: int = 0
    invalid: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, part: Encoded) -> None:
        self.counts += np.bincount(part.ids, minlength=len(self.counts))
        self.digest.update(part.ids.tobytes())
        self.documents += len(part.lengths)
        self.words += part.words
        self.characters += part.characters
        self.bytes += part.bytes
        self.invalid += part.flaws.invalid


def prepare(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    output_prefix: Path | str,
    workers: int = 1,
    documents: Documents = "line",
    reading: Reading = AS_FOUND,
) -> PreparedInfo:
    """Encode text files into ``<output_prefix>.bin/.idx/.counts.npy/.json``.

    Files and documents keep their order; blank documents are left out; eos follows each document.
    The files appear when all of them are complete, so an interrupted run leaves no half corpus.
    workers: processes that encode; up to 1, this process does.
    documents: how plain text is cut; a line of JSON and a row of Parquet are a document each.
    Raises UserError for unreadable files, files that are not text or have more flaws than text may have, text without
    a word, and an output that cannot be written.
    """
    import_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = Path(output_prefix)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    encode = partial(encode_span, tokenizer.path, np.dtype(dtype).name, documents)
    spans = plan_spans(recognise(files, reading), documents, SPAN_BYTES)
    totals, judge = Totals(np.zeros(tokenizer.vocab_size, np.int64)), Judge(reading.allow_damaged)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".prepare-") as folder:
            part = Path(folder, "corpus")
            builder = IndexedDatasetBuilder(str(corpus_file(part, "bin")), dtype=dtype)
            for encoded in _judged(spans, _in_order(encode, spans, workers), judge):
                totals.add(encoded)
                for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]):
                    if len(ids):
                        builder.add_document(ids, [len(ids)])
            builder.finalize(str(corpus_file(part, "idx")))
            info = _describe(prefix, totals, np.dtype(dtype).name, tokenizer)
            np.save(corpus_file(part, "counts.npy"), totals.counts)
            info.save(corpus_file(part, "json"))
            _move(part, prefix)
    except OSError as error:
        raise UserError(f"cannot write corpus {prefix}: {error}") from error
    judge.warn()
    return info


def encode_span(tokenizer: Path, dtype: str, documents: Documents, span: Span) -> Encoded:
    """Encode the documents of one span with the tokenizer at a path; runs in a worker process."""
    model = _load(tokenizer)
    ids: list[NDArray[Any]] = []
    words = characters = size = 0
    flaws = Flaws()
    for text, raw in read_documents(span, documents, flaws):
        ids.append(np.array([*model.encode(text), model.eos_id], dtype=dtype))
        words += len(text.split())
        characters += len(text)
        size += len(raw)
    joined = np.concatenate(ids) if ids else np.empty(0, dtype)
    return Encoded(joined, np.array([len(i) for i in ids], np.int64), words, characters, size, flaws)


def _judged(spans: list[Span], parts: Iterator[Encoded], judge: Judge) -> Iterator[Encoded]:
    """Pass parts on; after the last one of each file judge it. Raises UserError."""
    last = {span.file: number for number, span in enumerate(spans)}
    found: dict[TextFile, Flaws] = {}
    for number, (span, part) in enumerate(zip(spans, parts, strict=True)):
        flaws = found.setdefault(span.file, Flaws())
        flaws.add(part.flaws)
        if last[span.file] == number:
            judge.file(span.file, flaws)
        yield part


@lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _in_order(encode: Callable[[Span], Encoded], spans: list[Span], workers: int) -> Iterator[Encoded]:
    """Encode spans on several processes and yield the results in the order of the spans."""
    with progress_bar("encoding", sum(span.size for span in spans), in_bytes=True) as advance:
        if workers <= 1:
            for span in spans:
                yield encode(span)
                advance(span.size)
            return
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                remaining = iter(spans)
                # What is done but not yet written stays in memory, so only so many spans may be under way.
                waiting = deque((span, pool.submit(encode, span)) for span in islice(remaining, 4 * workers))
                while waiting:
                    done, future = waiting.popleft()
                    yield future.result()
                    advance(done.size)
                    waiting.extend((span, pool.submit(encode, span)) for span in islice(remaining, 1))
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that encodes text was killed, probably because memory ran out: use fewer workers"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _describe(prefix: Path, totals: Totals, dtype: str, tokenizer: Tokenizer) -> PreparedInfo:
    if totals.words == 0:
        raise UserError(f"nothing to write to {prefix}: the text files are empty or hold only white space")
    return PreparedInfo(
        prefix=str(prefix),
        documents=totals.documents,
        tokens=int(totals.counts.sum()),
        words=totals.words,
        characters=totals.characters,
        bytes=totals.bytes,
        invalid=totals.invalid,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        sha256=totals.digest.hexdigest(),
    )


def _move(part: Path, prefix: Path) -> None:
    """Put finished files in place, the seal last; a corpus that was there loses its seal first."""
    corpus_file(prefix, "json").unlink(missing_ok=True)
    for ending in ENDINGS:
        corpus_file(part, ending).replace(corpus_file(prefix, ending))
