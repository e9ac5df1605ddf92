"""What a file is that is not text, recognised by its first bytes."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass

HEAD = 1 << 16
"""Bytes at the beginning of a file that are looked at."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that is no text: its name with an article, and how its text can be had."""

    name: str
    remedy: str


UNPACK = "unpack it and name the files in it"
DECOMPRESS = "decompress it, or compress it with gzip, bzip2, xz or zstd"
EXTRACT = "extract its text first"
CONVERT = "write its text as JSON lines or Parquet"
NO_TEXT = "name a text, JSON lines or Parquet file"
AS_TEXT = "or read it as it is with --format text"

ZIP = rb"PK\x03\x04[\s\S]{26}"
"""Local header of the first member; its name follows."""

SIGNATURES: dict[str, dict[str, bytes]] = {
    EXTRACT: {
        "a PDF document": rb"%PDF-\d",
        "a PostScript document": rb"%!PS",
        "an RTF document": rb"\{\\rtf\d",
        "a Word document (docx)": ZIP + rb"[\s\S]*?word/",
        "an Excel workbook (xlsx)": ZIP + rb"[\s\S]*?xl/",
        "a PowerPoint presentation (pptx)": ZIP + rb"[\s\S]*?ppt/",
        "an OpenDocument file": ZIP + rb"mimetypeapplication/vnd\.oasis",
        "an EPUB book": ZIP + rb"mimetypeapplication/epub",
        "an old Microsoft Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a DjVu document": rb"AT&TFORM",
        "a Mobipocket book": rb"[\s\S]{60}BOOKMOBI",
    },
    UNPACK: {
        "a ZIP archive": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
        "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
        "a RAR archive": rb"Rar!\x1a\x07",
        "a cpio archive": rb"07070[127][0-9A-Fa-f]{30}",
        "an ar archive or Debian package": rb"!<arch>\n",
        "a git pack": rb"PACK\0\0\0[\x02\x03]",
    },
    DECOMPRESS: {
        "an lz4 file": rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18",
        "a framed snappy file": rb"\xff\x06\0\0sNaPpY",
        "an lzip file": rb"LZIP\x01",
        "an lzop file": rb"\x89LZO\0",
        "a file made by compress (.Z)": rb"\x1f[\x9d\xa0]",
    },
    CONVERT: {
        "an SQLite database": rb"SQLite format 3\0",
        "an Arrow file": rb"ARROW1\0\0|FEA1",
        "an Arrow stream": rb"\xff{4}[\s\S]{4}\x10\0\0\0",
        "an encrypted Parquet file": rb"PARE",
        "an ORC file": rb"ORC[\0-\x1f]",
        "an Avro file": rb"Obj\x01",
        "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
        "a numpy array (npy)": rb"\x93NUMPY",
        "a numpy archive (npz)": ZIP + rb"[^\0]{1,200}?\.npy",
        "a Matlab file": rb"MATLAB 5\.0 MAT-file",
        "a Redis dump": rb"REDIS\d{4}",
    },
    NO_TEXT: {
        "a PyTorch file": ZIP + rb"[^\0]{1,200}?/(data\.pkl|\.format_version)",
        "a pickled Python object": rb"\x80[\x02-\x05][\x95\]}(cX\x8a\x8c]",
        "a safetensors file": rb"[\s\S]{4}[\0-\x0f]\0{3}\{\"",
        "a GGUF model": rb"GGUF[\x01-\x0f]\0\0\0",
        "a sentencepiece model": rb"\n[\s\S]\n[\x01-\x40][^\n]{1,64}\x15[\s\S]{4}",
        "the index of a prepared corpus (idx)": rb"MMIDIDX\0\0",
        "an ELF program": rb"\x7fELF",
        "a Windows program": rb"MZ[\s\S]{0,62}\0[\s\S]*?PE\0\0",
        "a Mach-O program or Java class": rb"\xca\xfe\xba\xbe|[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]",
        "a WebAssembly program": rb"\0asm",
        "compiled Python (pyc)": rb"[\s\S]{2}\r\n[\0-\x03]\0\0\0",
        "a PNG image": rb"\x89PNG\r\n\x1a\n",
        "a JPEG image": rb"\xff\xd8\xff",
        "a GIF image": rb"GIF8[79]a",
        "a TIFF image": rb"II\*\0|MM\0\*",
        "a BMP image": rb"BM[\s\S]{4}\0{4}",
        "an icon": rb"\0\0[\x01\x02]\0",
        "a WebP image, WAV sound or AVI film": rb"RIFF[\s\S]{4}(WEBP|WAVE|AVI )",
        "a Photoshop image": rb"8BPS\0",
        "an MP3 sound": rb"ID3[\x02-\x04]\0",
        "a FLAC sound": rb"fLaC\0",
        "an Ogg stream": rb"OggS\0",
        "an MP4 film or HEIF image": rb"\0\0\0[\s\S]ftyp",
        "a Matroska or WebM film": rb"\x1aE\xdf\xa3",
        "a font": rb"wOF[F2][\0\x01]|OTTO\0|\0\x01\0\0\0|ttcf\0",
        "a message catalogue (mo)": rb"\xde\x12\x04\x95|\x95\x04\x12\xde",
    },
    "convert it to UTF-8, e.g. with iconv -f UTF-32 -t UTF-8": {
        "UTF-32 text": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    },
    "convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8": {
        "UTF-16 text": rb"\xff\xfe|\xfe\xff",
    },
    "fetch the file itself with git lfs pull": {
        "a Git LFS pointer": rb"version https://git-lfs\.github\.com/spec/",
    },
}
KINDS = [
    (re.compile(pattern), Kind(name, remedy)) for remedy, group in SIGNATURES.items() for name, pattern in group.items()
]
"""In the order of the table: the first that fits, so a Word document comes before the ZIP archive it is."""


def kind_of(head: bytes) -> Kind | None:
    """What a file is that begins with these (at most ``HEAD``) bytes; None if they may be text."""
    found = [kind for pattern, kind in KINDS if pattern.match(head)]
    # numpy's and PyTorch's archives stand further down in the table than the ZIP archive they are.
    special = [kind for kind in found if kind.name != "a ZIP archive"] or found
    if special:
        return special[0]
    if markup := _markup(head.lstrip().lower()):
        return Kind(markup, f"{EXTRACT}, {AS_TEXT}")
    if _is_tar(head):
        return Kind("a tar archive", UNPACK)
    if encoding := _wide_encoding(head):
        return Kind(f"{encoding} text", f"convert it to UTF-8, e.g. with iconv -f {encoding} -t UTF-8")
    return None


def json_kind(head: bytes) -> Kind | None:
    """What JSON a file is that begins with these bytes and is not JSON lines; None if it is none."""
    if re.match(rb'\s*\{\s*?\n\s*("(?:[^"\\\n]|\\.)*"\s*:|\})', head):
        return Kind("one JSON document", f"write its texts as JSON lines, an object a line (jq -c), {AS_TEXT}")
    if _is_array(head.decode(errors="replace")):
        return Kind("a JSON array", f"write it as JSON lines, an object a line (jq -c '.[]'), {AS_TEXT}")
    return None


def is_json_lines(head: bytes) -> bool:
    """Whether the first line that is not blank begins like an object with a key."""
    first = head.lstrip().split(b"\n", 1)[0]
    return re.match(rb'\{[ \t]*("(?:[^"\\]|\\.)*"[ \t]*:|\}\s*$)', first) is not None


def _markup(head: bytes) -> str | None:
    """HTML or XML, behind any comments and declarations."""
    xml = head.startswith((b"<?xml ", b"<mediawiki ", b"<!doctype "))
    while head.startswith((b"<!--", b"<?xml")):
        head = head.partition(b"-->" if head.startswith(b"<!--") else b"?>")[2].lstrip()
    if re.match(rb"<(!doctype html|html|head|body)[\s>]", head):
        return "an HTML page"
    return "an XML document" if xml else None


def _is_tar(head: bytes) -> bool:
    """The checksum of the header decides, for some tar archives have no other mark."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark, as Western text is in them: letters and NULs take turns."""
    if head.count(0) < len(head) / 10:
        return None
    order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"
    for encoding in (f"UTF-32{order}", f"UTF-16{order}"):
        text = head.decode(encoding, errors="replace")
        if sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text) >= 0.98 * len(text) > 0:
            return encoding
    return None


def _is_array(text: str) -> bool:
    """Whether a text begins with a JSON array, cut off or followed by nothing but more of them."""
    text = text.lstrip()
    decoder = json.JSONDecoder()
    if not text.startswith("["):
        return False
    try:
        _, end = decoder.raw_decode(text)
        return text[end:].lstrip()[:1] in ("", "[")
    except (ValueError, RecursionError):
        pass
    try:  # cut off: its first element will do
        start = len(text) - len(text[1:].lstrip())
        element, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return isinstance(element, dict | list | str) and text[end:].lstrip()[:1] == ","
