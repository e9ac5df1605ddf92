"""Reading a corpus through before it is trained on, once as long as its files do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from stablemoe_ds.data.blend import content
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.distributed.together import of_all_ranks, of_first_rank
from stablemoe_ds.errors import UserError


def verify_once(infos: Sequence[PreparedInfo], folder: Path) -> None:
    """Let the first rank verify corpora, unless a mark in ``folder`` says that files that look the same were sound.

    Collective. Raises UserError on all ranks if a corpus is damaged, if the mark cannot be made, or if hosts have
    different corpora.
    """
    _same_everywhere(infos)

    def verify() -> None:
        for info in infos:
            _verify(info, folder)

    of_first_rank(verify)


def _same_everywhere(infos: Sequence[PreparedInfo]) -> None:
    """Each rank works out the order of the text for itself, so all must have the same."""
    ranks: list[list[str]] = of_all_ranks([content(info) for info in infos])
    for rank, theirs in enumerate(ranks):
        for info, here, there in zip(infos, ranks[0], theirs, strict=True):
            if here != there:
                raise UserError(
                    f"rank {rank} has another text at {info.prefix} than rank 0: copy the same corpus to all hosts"
                )


def _verify(info: PreparedInfo, folder: Path) -> None:
    file = info.path("bin").stat()
    known = f"{info.sha256} {info.vocab_size} {file.st_size} {file.st_mtime_ns}"
    mark = folder / f"verified-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    try:
        if mark.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        info.verify()
        mark.touch()
    except OSError as error:
        raise UserError(f"cannot note in {folder} that corpus {info.prefix} is sound: {error}") from error
