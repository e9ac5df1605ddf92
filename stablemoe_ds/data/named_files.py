"""The files that a run names, checked without training: do they exist, and can ``train`` read them?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import PreparedInfo, check_one_tokenizer, check_tokens, check_vocabulary, corpus_file
from stablemoe_ds.data.prepare import ENDINGS
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import check_sizes, read_manifest, saved_checkpoints
from stablemoe_ds.tables.given import given_table

State = Literal["sound", "missing", "unusable"]


@dataclass(frozen=True)
class NamedFile:
    """One of them. key: the setting that names it. found: as text, and for an unusable one what to do about it.

    A missing file is not an error: the configuration may be for another machine, or may be written before its data. A
    file that exists but that ``train`` would refuse is an error.
    """

    key: str
    path: str
    state: State
    found: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def look_at_files(run: RunConfig) -> tuple[list[NamedFile], int | None]:
    """What is found of all files a run names, and the ids of its tokenizer; None if that is not here or unusable.

    Reads tokenizers, descriptions, indexes and counts, and of checkpoints the manifest; not the ids of a corpus.
    """
    files, tokenizer = [], None
    if (path := run.data.tokenizer) is not None:
        if os.path.lexists(path):
            try:
                tokenizer = Tokenizer(path)
                files.append(NamedFile("data.tokenizer", path, "sound", f"{tokenizer.vocab_size:,} ids"))
            except UserError as error:
                files.append(NamedFile("data.tokenizer", path, "unusable", str(error)))
        else:
            files.append(_missing("data.tokenizer", path))
    if run.moe.table_file is not None:
        files.append(_table(run, run.moe.table_file, tokenizer))
    files += _corpora(run, tokenizer)
    files += _run_directory(run)
    return files, tokenizer.vocab_size if tokenizer else None


def _table(run: RunConfig, path: str, tokenizer: Tokenizer | None) -> NamedFile:
    """The table of a run; what only the tokenizer decides is not checked while that is not here."""
    key = f"moe.{run.moe.table_key}"
    if not os.path.lexists(path):
        return _missing(key, path)
    unknown = tokenizer is None and run.data.tokenizer is not None
    try:
        table = given_table(
            path,
            experts=run.moe.experts,
            top_k=run.moe.top_k,
            blocks=tuple(run.moe.table_blocks),
            vocab_size=run.model.vocab_size or (tokenizer.vocab_size if tokenizer else None),
            tokenizer=None if unknown else tokenizer.fingerprint if tokenizer else "",
            key=key,
        )
    except UserError as error:
        return NamedFile(key, path, "unusable", str(error).removeprefix(f"{key}: "))
    return NamedFile(key, path, "sound", f"{table.vocab_size:,} ids to {table.experts} experts")


def _corpora(run: RunConfig, tokenizer: Tokenizer | None) -> Iterator[NamedFile]:
    read: list[PreparedInfo] = []
    if not run.data.train:
        yield NamedFile("data.train", "", "missing", "names no corpus; train needs one")
    for name in ("train", "valid", "test"):
        for number, source in enumerate(getattr(run.data, name)):
            key, path = f"data.{name}.{number}", source.path
            if not any(os.path.lexists(corpus_file(path, ending)) for ending in ENDINGS):
                yield _missing(key, path)
                continue
            try:
                info = PreparedInfo.read(path, tokenizer)
                check_one_tokenizer([*read[:1], info])
                if run.model.vocab_size is not None:
                    check_vocabulary(info, run.model.vocab_size)
                check_tokens(info, run.data.sequence_length if name == "train" else 1)
                if name == "train":
                    info.token_counts()
                read.append(info)
                yield NamedFile(key, path, "sound", f"{info.tokens:,} tokens in {info.documents:,} documents")
            except UserError as error:
                yield NamedFile(key, path, "unusable", str(error))


def _run_directory(run: RunConfig) -> Iterator[NamedFile]:
    """The newest checkpoint, which the run would go on from."""
    folder = Path(run.directory)
    obstacle = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if obstacle.exists() and not obstacle.is_dir():
        yield NamedFile("run_dir", run.directory, "unusable", f"{obstacle} is a file: name another run_dir")
    elif run.checkpoint.resume and (newest := next(iter(saved_checkpoints(folder)), None)) is not None:
        try:
            manifest = read_manifest(newest)
            check_sizes(newest, manifest)
            found: State = "sound"
            text = f"continues from {newest.name}"
        except UserError as error:
            found, text = (
                ("sound", f"{error}; an older one is tried") if run.checkpoint.fallback else ("unusable", str(error))
            )
        yield NamedFile("run_dir", run.directory, found, text)


def _missing(key: str, path: str) -> NamedFile:
    return NamedFile(key, path, "missing", "not here; train needs it")
