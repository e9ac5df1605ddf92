"""Parquet: the texts in one column, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablemoe_ds.errors import UserError, one_line

ROWS = 256
"""Rows in memory at a time, besides what pyarrow needs to decode a page."""


def row_groups(path: Path, column: str) -> list[int]:
    """Bytes of text in each row group. Raises UserError if the file is damaged or has no such column of text."""
    with _opened(path) as file:
        _check_column(path, file.schema_arrow, column)
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        chunks = [[group.column(number) for number in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in row if c.path_in_schema == column) for row in chunks]


def read_rows(path: Path, column: str, start: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    """(number of the row, from 1, text in UTF-8 or None for null) of the row groups [start, end). Raises UserError."""
    import pyarrow as pa

    with _opened(path) as file:
        if file.metadata.num_row_groups < end:
            raise UserError(f"{path} became shorter while it was read: try again when nothing writes to it")
        row = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(ROWS, list(range(start, end)), columns=[column]):
            texts = batch.column(0)
            if pa.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            # As bytes, since nothing has checked that what calls itself a string is UTF-8.
            for text in texts.cast(pa.large_binary()).to_pylist():
                row += 1
                yield row, text


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{path} is Parquet, and pyarrow, which reads it, is not installed: pip install 'stablemoe_ds[parquet]'"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a damaged name
        raise UserError(f"cannot read Parquet file {path}: {one_line(error)[:200]}") from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    """Raise UserError unless there is one such column, of strings or bytes."""
    import pyarrow as pa

    def is_text(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
        return kind in texts

    texts = [field.name for field in schema if is_text(field.type)]
    if column in texts and schema.names.count(column) == 1:
        return
    found = f"its column {column!r} is {schema.field(column).type}" if column in schema.names else "it has none"
    if schema.names.count(column) > 1:
        found = "it has several"
    raise UserError(
        f"{path}: expected one column {column!r} of text, but {found:.80}; columns of text are "
        f"{', '.join(map(repr, texts[:8])) or 'none'}; name one with --field"
    )
