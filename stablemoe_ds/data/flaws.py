"""What could not be read as text in a file: counted while reading, judged once the whole file was read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

from stablemoe_ds.data.text_files import TextFile, open_text
from stablemoe_ds.errors import UserError

MOST_UNREADABLE = 0.01
"""Share of a file's characters that may be unreadable. Text has next to none; what is in another encoding has more."""

CONTROL = bytes({*range(7), *range(14, 27), *range(28, 32), 127})
"""Bytes that no text needs. White space, bell, backspace and escape are not among them: logs and manuals have those."""

logger = logging.getLogger(__name__)


@dataclass
class Flaws:
    """Counts of a part of a file; parts add up.

    invalid: byte sequences that were not UTF-8, and halves of surrogate pairs; each became U+FFFD.
    replaced: U+FFFD in the text, whether it was there already or is one of ``invalid``.
    control: characters of ``CONTROL``, such as NUL.
    records: lines of JSON or rows of Parquet; broken: those without a text.
    first: of the first broken one, the byte it starts at (JSON) or its number from 1 (Parquet), and what is wrong.
    """

    characters: int = 0
    invalid: int = 0
    replaced: int = 0
    control: int = 0
    records: int = 0
    broken: int = 0
    first: tuple[int, str] | None = None

    @property
    def share(self) -> float:
        """Unreadable characters among all."""
        return (self.replaced + self.control) / max(1, self.characters)

    def count(self, text: str, raw: bytes, invalid: int) -> None:
        """Take in one document: its text, the same in UTF-8, and how much of it was invalid."""
        self.characters += len(text)
        self.invalid += invalid
        self.replaced += text.count("\ufffd")
        self.control += len(raw) - len(raw.translate(None, CONTROL))

    def add(self, later: Flaws) -> None:
        """Take in the next part of the same file, or another file."""
        self.first = self.first or later.first
        for name in (f.name for f in fields(self) if f.name != "first"):
            setattr(self, name, getattr(self, name) + getattr(later, name))

    def unreadable(self) -> str:
        """Describes the unreadable characters."""
        parts = [
            f"{number:,} {what}"
            for number, what in (
                (self.invalid, "byte sequences were not UTF-8"),
                (self.replaced - self.invalid, "were U+FFFD before"),
                (self.control, "control characters such as NUL"),
            )
            if number > 0
        ]
        return f"{100 * self.share:.2g} % of {self.characters:,} characters: {', '.join(parts)}"


@dataclass
class Judge:
    """Sees the flaws of each file and decides whether to go on.

    allow_damaged: go on whatever there is, leaving out broken records, and report it at the end.
    """

    allow_damaged: bool
    total: Flaws = field(default_factory=Flaws)
    worst: tuple[float, Path | None] = (0.0, None)

    def file(self, file: TextFile, flaws: Flaws) -> None:
        """Judge a file that has been read through. Raises UserError for more flaws than text may have."""
        if flaws.first and not self.allow_damaged:
            plain = ", or read it as plain text with --format text" if file.format == "jsonl" else ""
            raise UserError(
                f"{file.path}: {flaws.broken:,} of {flaws.records:,} records have no text, first "
                f"{_place(file, flaws)}, which {flaws.first[1]}; correct it, leave them out with --allow-damaged{plain}"
            )
        if flaws.share > MOST_UNREADABLE and not self.allow_damaged:
            encoded = flaws.invalid > flaws.control
            remedy = "convert it, e.g. with iconv -f LATIN1 -t UTF-8," if encoded else "name a file of text,"
            raise UserError(
                f"{file.path} is not UTF-8 text (unreadable: {flaws.unreadable()}); {remedy} "
                "or read it anyway with --allow-damaged"
            )
        self.total.add(flaws)
        self.worst = max(self.worst, (flaws.share, file.path), key=lambda pair: pair[0])

    def warn(self) -> None:
        """Warn about flaws that were accepted. Silent if there were none."""
        if self.total.broken:
            logger.warning("%d of %d records have no text: left out", self.total.broken, self.total.records)
        if self.total.share:
            logger.warning("unreadable: %s; most in %s", self.total.unreadable(), self.worst[1])


def _place(file: TextFile, flaws: Flaws) -> str:
    """Where the first broken record is: "line 7", "row 7"."""
    first = flaws.first[0] if flaws.first else 0
    if file.format == "parquet":
        return f"row {first}"
    number = 1
    with open_text(file) as content:
        while first and (block := content.read(min(first, 1 << 20))):
            number += block.count(b"\n")
            first -= len(block)
    return f"line {number}"
