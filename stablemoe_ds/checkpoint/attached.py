"""What a checkpoint needs besides its model: the tokenizer and the token counts of the training text, which are stored
in it, and the corpora that its run names, which are searched for.

Checkpoints of earlier versions store neither. Then both are read from the paths that the run names, if they exist.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.checkpoint.reader import Checkpoint, advice
from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import corpus_file, read_sources, token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import DamagedError, check_hashes

TOKENIZER, TOKEN_COUNTS = "tokenizer", "token_counts.npy"
"""Names in a checkpoint. The tokenizer keeps its own suffix; what else it consists of keeps its name."""


def to_attach(tokenizer: Tokenizer | None, counts: NDArray[np.int64] | None) -> dict[str, bytes]:
    """Files to store in a checkpoint: content by name. counts: int64 [V], of the training text."""
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        files |= {path.name: path.read_bytes() for path in tokenizer.files}
        files[TOKENIZER + tokenizer.path.suffix] = files.pop(tokenizer.path.name)
    if counts is not None:
        buffer = io.BytesIO()
        np.save(buffer, counts)
        files[TOKEN_COUNTS] = buffer.getvalue()
    return files


def carried(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that a checkpoint made from this one takes over: content by name, as :func:`to_attach` returns it.

    A tokenizer that is not stored in it is read from the path that its run names; if that is gone, it is left out.
    """
    names = [name for name in checkpoint.files if name.startswith(TOKENIZER) or name == TOKEN_COUNTS]
    files = {name: (checkpoint.path / name).read_bytes() for name in names}
    if checkpoint.tokenizer and _own_tokenizer(checkpoint) is None:
        with suppress(UserError):
            files |= to_attach(open_tokenizer(checkpoint), None)
    return files


def open_tokenizer(checkpoint: Checkpoint, given: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: ``given``, else the stored one, else the one its run names.

    Raises UserError if it is not found, or if it is not the one of the training run. If the run named none, it is not
    known which one that was; then ``given`` only has to have no more ids than the model.
    """
    if given is not None:
        tokenizer = Tokenizer(given)
        if checkpoint.tokenizer or tokenizer.vocab_size > checkpoint.vocab_size:
            check_tokenizer(checkpoint, tokenizer)
        return tokenizer
    own = _own_tokenizer(checkpoint)
    if own is not None:
        _check_unchanged(checkpoint, [name for name in checkpoint.files if name.startswith(TOKENIZER)])
        tokenizer = Tokenizer(checkpoint.path / own)
        check_tokenizer(checkpoint, tokenizer)
        return tokenizer
    named = checkpoint.run.data.tokenizer
    if not named:
        raise UserError(
            f"the run of checkpoint {checkpoint.path} names no tokenizer, so text cannot be read or written; name "
            "the one that made its training text with --tokenizer"
        )
    places = _places(checkpoint, named)
    found = [Tokenizer(path) for path in places if os.path.isfile(path)]
    for tokenizer in found:
        if tokenizer.fingerprint == checkpoint.tokenizer:
            return tokenizer
    for tokenizer in found:
        check_tokenizer(checkpoint, tokenizer)
    raise UserError(
        f"checkpoint {checkpoint.path} contains no tokenizer, and the one its run names was not found: looked for "
        f"{' and '.join(map(str, places))}; name it with --tokenizer"
    )


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> None:
    """Raise UserError unless the checkpoint was trained with this tokenizer."""
    found = tokenizer.fingerprint if tokenizer else ""
    if checkpoint.tokenizer != found:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {checkpoint.tokenizer[:12] or 'none'}, but "
            f"{tokenizer.path if tokenizer else 'the run'} is {found[:12] or 'none'}: name the one it was trained with"
        )


def token_counts_of(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """int64 [V]: how often each id occurs in the text that a checkpoint was trained on.

    Raises UserError if they are damaged, or if none are stored and the training text is gone.
    """
    if TOKEN_COUNTS in checkpoint.files:
        _check_unchanged(checkpoint, [TOKEN_COUNTS])
        counts: NDArray[np.int64] = np.load(checkpoint.path / TOKEN_COUNTS)
        return counts
    try:
        sources = find_corpora(checkpoint, checkpoint.run.data.train)
        check_corpora(checkpoint, sources)
    except UserError as error:
        raise UserError(
            f"checkpoint {checkpoint.path} contains no counts of its training text, which is missing: {error}"
        ) from error
    return token_counts(sources, None, checkpoint.vocab_size)


def find_corpora(checkpoint: Checkpoint, sources: Sequence[Source]) -> list[Source]:
    """The corpora that a checkpoint's run names, with paths that lead to them from the working directory.

    Raises UserError if one is not found.
    """
    found = []
    for source in sources:
        places = _places(checkpoint, source.path)
        path = next((place for place in places if os.path.isfile(corpus_file(place, "json"))), None)
        if path is None:
            raise UserError(
                f"no prepared corpus {source.path}, which the run of checkpoint {checkpoint.path} names: looked for "
                f"{' and '.join(map(str, places))}"
            )
        found.append(source.model_copy(update={"path": str(path)}))
    return found


def check_corpora(checkpoint: Checkpoint, sources: Sequence[Source]) -> None:
    """Raise UserError unless these corpora were made with the checkpoint's tokenizer."""
    for info in read_sources(sources):
        if checkpoint.tokenizer and info.tokenizer != checkpoint.tokenizer:
            raise UserError(
                f"corpus {info.prefix} was made by tokenizer {info.tokenizer[:12]}, but checkpoint {checkpoint.path} "
                f"was trained with {checkpoint.tokenizer[:12]}: prepare the text with that one"
            )
        if info.vocab_size > checkpoint.vocab_size:  # possible only where the run names no tokenizer
            raise UserError(
                f"corpus {info.prefix} was prepared with {info.vocab_size} ids, but the model of checkpoint "
                f"{checkpoint.path} has {checkpoint.vocab_size}"
            )


def _own_tokenizer(checkpoint: Checkpoint) -> str | None:
    """Name of the tokenizer's main file in a checkpoint; None if no tokenizer is stored in it."""
    return next((name for name in checkpoint.files if Path(name).stem == TOKENIZER), None)


def _check_unchanged(checkpoint: Checkpoint, names: list[str]) -> None:
    try:
        check_hashes(checkpoint.path, checkpoint.manifest, names)
    except DamagedError as error:
        raise UserError(f"{error}; {advice(checkpoint.path)}") from error


def _places(checkpoint: Checkpoint, path: str) -> list[Path]:
    """Candidates for a path that a run names, the likeliest first.

    A relative path starts in the directory where training was started. If the run directory was moved since, the file
    may have been moved with it. The working directory comes last.
    """
    roots, run_dir, named = [], checkpoint.run_directory, Path(checkpoint.run.directory)
    if run_dir is not None and not named.is_absolute() and run_dir.parts[-len(named.parts) :] == named.parts:
        roots.append(Path(*run_dir.parts[: -len(named.parts)]))
    if checkpoint.started_in:
        roots.append(Path(checkpoint.started_in))
    return list(dict.fromkeys(root / path for root in [*roots, Path.cwd()]))
