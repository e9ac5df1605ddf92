"""Compressed files as streams of bytes, recognised by how they begin, whatever their names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Compression = Literal["gzip", "bzip2", "xz", "lzma", "zstd"]

PATTERNS: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # three letters alone may begin a text
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "lzma": re.compile(rb"\]\0\0[\s\S]{10}"),
    "zstd": re.compile(rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"),  # the second is a frame to be skipped
}

ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError)
"""What reading a damaged file raises."""

WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
"""Accept what ``zstd --long=31`` writes; the memory is taken only where a file asks for it."""

BLOCK = 1 << 16


def compression_of(head: bytes) -> Compression | None:
    """How a file that begins with these bytes is compressed; None if it is not."""
    return next((name for name, pattern in PATTERNS.items() if pattern.match(head)), None)


def decompressed(file: BinaryIO, compression: Compression) -> BinaryIO:
    """The bytes inside a compressed file, those of all its members. Reading raises one of ``ERRORS`` on damage."""
    if compression == "gzip":
        return gzip.open(file)  # type: ignore[return-value]
    decompressors: dict[str, Callable[[], Any]] = {
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
        "lzma": lzma.LZMADecompressor,
        "zstd": lambda: zstd.ZstdDecompressor(options=WINDOW),
    }
    return io.BufferedReader(_Members(file, decompressors[compression]), BLOCK)


class _Members(io.RawIOBase):
    """The members of a bzip2, xz or zstd file, one after the other.

    ``bz2.open`` and ``lzma.open`` silently drop whatever follows the last member that they understand, and so all text
    after a damaged one. This class raises instead.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make, self._decompressor = file, make, make()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof and not self._next_member():
                return 0
            if self._decompressor.needs_input and not self._pending:
                self._pending = self._file.read(BLOCK)
                if not self._pending:
                    raise EOFError("cut short: it ends in the middle of its compressed data")
            data, self._pending = self._pending, b""
            if found := self._decompressor.decompress(data, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def _next_member(self) -> bool:
        """Go to the next member, past the zeros that xz and tapes fill up with. False at the end of the file."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            block = self._file.read(BLOCK)
            if not block:
                return False
            rest = block.lstrip(b"\0")
        self._pending, self._decompressor = rest, self._make()
        return True
