"""Who may import whom, what answers without torch, and what a checkout must not contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stablemoe_ds"
HEIGHT = {
    "config": 0,
    "ops": 0,
    "tables": 1,
    "run_directory": 2,
    "distributed": 3,
    "data": 4,
    "routing": 4,
    "moe": 5,
    "model": 6,
    "checkpoint": 7,
    "evaluation": 8,
    "export": 8,
    "launch": 8,
    "api": 9,
    "training": 9,
    "comparison": 9,
    "commands": 10,
    "": 10,
    "cli": 11,
    "__main__": 12,
}
"""A room imports from lower ones and from itself; rooms of one height do not know each other. "": the package itself,
which shows the names of its API."""
EVERYWHERE = {"answers", "errors", "files", "progress_bar"}
"""Files that import nothing of the package, so that anybody may import them."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.removeprefix("stablemoe_ds").removeprefix(".").partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, function bodies and type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # "from package import room" names a room, "from package.room import thing" a thing in it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[str]:
    """Every call of a file, written out: "deepspeed.initialize"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_downwards(path: Path) -> None:
    me = room_of(dotted(path))
    for module in imports(path):
        if not module.startswith("stablemoe_ds."):
            continue
        room = room_of(module)
        if me in EVERYWHERE:
            pytest.fail(f"{me} serves everybody, so it may not import {module}")
        allowed = room == me or room in EVERYWHERE or HEIGHT[room] < HEIGHT[me]
        assert allowed, f"{dotted(path)} imports {module}, which stands above or beside it"


def test_every_room_has_its_height() -> None:
    """A room that nobody ranked would escape the test above; one that is ranked but gone would be a lie."""
    rooms = {room_of(dotted(path)) for path in MODULES} - EVERYWHERE
    assert HEIGHT.keys() == rooms


def test_a_file_name_is_used_once() -> None:
    """An editor's list of files, a traceback and a search by name show little more than the name."""
    names = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, uses in names.items() if uses > 1] == []


def test_only_the_engine_initializes_deepspeed() -> None:
    found = {dotted(path) for path in MODULES if "deepspeed.initialize" in calls(path)}
    assert found == {"stablemoe_ds.training.engine"}
    aliases = [dotted(path) for path in MODULES if "deepspeed.initialize" in imports(path)]
    assert aliases == []


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("megatron.core.models", {"model"}),
        ("megatron.core.transformer", {"model"}),
        ("megatron.core.tensor_parallel", {"model"}),
        ("megatron.core.datasets", {"data"}),
        ("megatron.core.parallel_state", {"distributed", "model", "training"}),
        ("deepspeed", {"distributed", "model", "moe", "training"}),
        ("torch.distributed", {"checkpoint", "distributed", "launch", "model", "moe", "training"}),
    ],
)
def test_a_library_stays_in_its_rooms(library: str, rooms: set[str]) -> None:
    """Routing is in none of these sets: it is handed what adds counts up over ranks, and knows no process group."""
    users = {
        room_of(dotted(path))
        for path in MODULES
        if any(module == library or module.startswith(library + ".") for module in imports(path))
    }
    assert users <= rooms


def loaded_by(module: str) -> list[str]:
    """Names of all modules that importing this one loads in a fresh interpreter."""
    code = f"import {module}, sys; print(*sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config.load",
        "config.rules",
        "config.cost_report",
        "launch.doctor.examine",
        "tables.table",
        "tables.builders",
        "data.table_corpus",
        "evaluation.table_report",
        "evaluation.bounds_report",
        "tables.table_file",
        "comparison.suite",
        "run_directory.checkpoint_files",
        "run_directory.progress",
        "distributed.environment",
    ],
)
def test_answers_without_torch(module: str) -> None:
    loaded = loaded_by(f"stablemoe_ds.{module}")
    assert f"stablemoe_ds.{module}" in loaded
    assert set(loaded) & {"torch", "deepspeed", "megatron", "mpi4py", "matplotlib"} == set()


def test_a_model_is_built_without_the_compiler() -> None:
    """torch.compile takes as long to load as the libraries that a model needs."""
    loaded = loaded_by("stablemoe_ds.training.trainer")
    assert "megatron.core.models.gpt" in loaded
    assert set(loaded) & {"torch._dynamo", "torch._inductor.compile_fx"} == set()


def test_command_line_imports_next_to_nothing() -> None:
    """``--help`` answers at once because every command imports what it needs when it is called."""
    ours = [name for name in loaded_by("stablemoe_ds.cli") if name.startswith("stablemoe_ds")]
    assert sorted(ours) == ["stablemoe_ds", "stablemoe_ds.answers", "stablemoe_ds.cli", "stablemoe_ds.errors"]


def test_no_path_of_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()]
    assert len(files) > 50
    marks = [f"/{name}/".encode() for name in ("work", "root")]  # so that this file has none of them
    texts = {path: data for path in files if b"\0" not in (data := path.read_bytes())}
    assert [(path, mark) for path, data in texts.items() for mark in marks if mark in data] == []
