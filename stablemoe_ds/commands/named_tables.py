"""Tables and texts as the command line names them, and the files that commands write tables to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.commands.parsing import settle_libraries
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.config.schema import Source
    from stablemoe_ds.data.tokenizer import Tokenizer
    from stablemoe_ds.tables.counted_corpus import Corpus
    from stablemoe_ds.tables.table import RoutingTable


TABLES = "a table file, a checkpoint or a run directory"
"""What a path to a table may lead to."""


def open_table(path: str) -> tuple[RoutingTable, Checkpoint | None]:
    """A table file, or the frozen table of a checkpoint or run directory and that. Raises UserError without one.

    A path that leads nowhere is refused before torch is loaded, which only checkpoints need.
    """
    check_there(path, TABLES)
    if Path(path).is_file():
        from stablemoe_ds.tables.table_file import read_table

        return read_table(path), None
    settle_libraries(path)
    from stablemoe_ds.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path)
    table = checkpoint.table()
    if table is None:
        raise UserError(
            f"checkpoint {checkpoint.path} has no routing table: it is of stage {checkpoint.progress.stage}; "
            "'stablemoe table build frozen' or 'observed' makes one"
        )
    return table, checkpoint


def check_there(path: str | Path, expected: str) -> None:
    """Raise UserError if a path leads nowhere; ``expected``: what it should lead to."""
    if not Path(path).exists():
        raise UserError(f"nothing at {path}: expected {expected}")


def text_of(data: Sequence[str], checkpoint: Checkpoint | None) -> list[Source]:
    """The named corpora; where none is, the training text of the run that the table is of.

    Raises UserError if that is not found, and for a table file, which has no run.
    """
    from stablemoe_ds.config.schema import Source

    if data:
        return [Source(path=path) for path in data]
    if checkpoint is None:
        raise UserError(
            "--data: got none: expected prepared corpora (paths without extension); a table file names none"
        )
    from stablemoe_ds.checkpoint.attached import find_corpora

    return find_corpora(checkpoint, checkpoint.run.data.train)


def text_if_found(data: Sequence[str], checkpoint: Checkpoint | None) -> tuple[list[Source], str]:
    """As :func:`text_of`, to measure by: none and a line that says why, if a run's text is gone, as where a checkpoint
    was copied to; none and nothing to say for a table file."""
    if not data and checkpoint is None:
        return [], ""
    try:
        return text_of(data, checkpoint), ""
    except UserError as error:
        return [], f"not measured by the run's text: {error}"


def corpus_of(sources: Sequence[Source], tokenizer: Tokenizer | None, vocab_size: int | None) -> Corpus:
    """A text as tables see it. Raises UserError as ``table_corpus`` does."""
    from stablemoe_ds.data.table_corpus import table_corpus

    return table_corpus(sources, tokenizer, vocab_size)


def tokenizer_of(path: str | Path | None, *checkpoints: Checkpoint | None) -> Tokenizer | None:
    """The named tokenizer, or the first that a checkpoint has or its run names; None if there is none."""
    from stablemoe_ds.data.tokenizer import Tokenizer

    if path is not None:
        return Tokenizer(path)
    for checkpoint in filter(None, checkpoints):
        from stablemoe_ds.checkpoint.attached import open_tokenizer

        with suppress(UserError):
            return open_tokenizer(checkpoint)
    return None


def pieces(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """Ids in readable form; as numbers without a tokenizer, and where a model has more ids than that."""
    return lambda index: tokenizer.piece(index) if tokenizer and index < tokenizer.vocab_size else str(index)


def check_load(max_load: float | None, option: str = "--max-load") -> None:
    """Raise UserError for a largest max/mean load that no table can have."""
    if max_load is not None and not 1 <= max_load < float("inf"):
        raise UserError(f"{option}: got {max_load}: expected at least 1, the mean")


def write_table(table: RoutingTable, path: Path, save: Callable[[RoutingTable, Path], None] | None = None) -> None:
    """Write a table file, whole or not at all, on the main rank only. Raises UserError if that is impossible.

    save: writes the file; by default in this package's own format.
    """
    from safetensors import SafetensorError

    from stablemoe_ds.distributed.environment import read_launcher_environment

    if read_launcher_environment()[0] != 0:
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if save is None:
            table.save(part)
        else:
            save(table, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write routing table {path}: {error}") from error
