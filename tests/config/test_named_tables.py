"""``moe.table`` and ``moe.start_table`` name a builder or a file: a misspelled builder is not taken for a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.table_options import OPTIONS
from stablemoe_ds.errors import UserError

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cooccurence", "cooccurrence"),
        ("Random", "random"),
        ("scatered", "scattered"),
        ("evn", "even"),
        ("balanced", "./balanced, for a file not here yet"),
        ("mytable", "./mytable, for a file not here yet"),
        ("mytable.", "./mytable., for a file not here yet"),
    ],
)
@pytest.mark.parametrize("setting", ["moe.router=table moe.table", "moe.start_table"])
def test_a_bare_name_that_is_neither_builder_nor_file(make: Make, setting: str, name: str, nearest: str) -> None:
    *others, key = setting.split()
    with pytest.raises(UserError) as caught:
        make(*others, f"{key}={name}")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f'override {key}={name}: {key}: got "{name}": there is neither a table builder nor a file')
    assert ", ".join(OPTIONS) in line
    assert line.endswith(f"nearest that works: {nearest}")


@pytest.mark.parametrize("name", [*OPTIONS, "tables/mytable", "./cooccurence", "cooccurence.safetensors", "~/tables"])
def test_builders_and_paths_of_files_that_may_be_elsewhere(make: Make, name: str) -> None:
    moe = make(f"moe.start_table={name}", "moe.top_k=2").moe
    assert (moe.table_builder is not None) is (name in OPTIONS)


def test_a_file_without_a_suffix_is_a_file(make: Make, here: Path) -> None:
    (here / "cooccurence").touch()
    assert make("moe.router=table", "moe.table=cooccurence").moe.table_file == "cooccurence"


def test_what_a_checkpoint_has_recorded_is_not_looked_for(make: Make) -> None:
    tree = make("moe.router=table", "moe.table=even").model_dump(mode="json")
    tree["moe"]["table"] = "gone"
    assert RunConfig.model_validate(tree).moe.table == "gone"


def test_options_without_a_table_that_is_followed(make: Make) -> None:
    with pytest.raises(UserError, match=r"'stablemoe' does not follow moe.table, so table_options build nothing"):
        make("moe.table=even", "moe.table_options={max_load: 2}")
