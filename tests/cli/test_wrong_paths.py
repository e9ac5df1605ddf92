"""A path that leads nowhere is answered at once: torch, which takes seconds to load, is not needed to see that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TABLES = (
    "table show {}",
    "table diff {table} {}",
    "table diff {} {table}",
    "table build balanced {} --max-load 1.3 --output out",
    "table build split {} --output out",
    "table build resized {} --experts 4 --output out",
    "table export {} --format npz --output out",
    "table import {} --output out",
    "table bounds {}",
    "routing table {}",
)
CHECKPOINTS = (
    "table build frozen {} --output out",
    "table build observed {} --output out",
    "table distil {}",
    "routing report {}",
    "routing bands {}",
    "eval {}",
    "generate {} --prompt x",
    "export {} --output out",
    "checkpoint show {}",
    "checkpoint verify {}",
)


def answers(commands: list[list[str]]) -> list[list[object]]:
    """Exit status and error of each command, in one interpreter; and whether torch is loaded in the end."""
    code = (
        "import contextlib, io, json, sys\n"
        "from stablemoe_ds.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    err, status = io.StringIO(), 0\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        try: main(words)\n"
        "        except SystemExit as ending: status = ending.code\n"
        "    print(json.dumps([status, err.getvalue(), 'torch' in sys.modules]))"
    )
    argv = [sys.executable, "-c", code, json.dumps(commands)]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_a_wrong_path_is_answered_without_torch(tmp_path: Path) -> None:
    """A file or folder that is not there, and for checkpoints also a folder that holds none."""
    import numpy as np

    from stablemoe_ds.tables.table import RoutingTable

    RoutingTable(np.zeros((1, 5, 1), np.int32), 1, (1,)).save(tmp_path / "table")
    (tmp_path / "empty").mkdir()
    none, empty = str(tmp_path / "none"), str(tmp_path / "empty")
    lines = [(line, none) for line in (*TABLES, *CHECKPOINTS)] + [(line, empty) for line in CHECKPOINTS]
    commands = [line.format(path, table=tmp_path / "table").split() for line, path in lines]
    found = answers(commands)
    assert len(found) == len(commands)
    for words, (_, path), (status, said, torch_is_loaded) in zip(commands, lines, found, strict=True):
        assert status == 2, words
        assert path in str(said), (words, said)
        assert str(said).count("\n") == 1, (words, said)
        assert not torch_is_loaded, words
