"""What of a run's layout can be combined with what: one table, by which rules refuse and which commands and docs show.

``python -m stablemoe_ds.config.compatibility > docs/parallelism.md``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Literal

from stablemoe_ds.config.messages import breach
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.text_table import aligned

Verdict = Literal["yes", "GPU", "no", ""]
"""Two settings work together; do, on a GPU alone; do not; or are two values of one key."""


@dataclass(frozen=True)
class Setting:
    """A row and a column of the matrix: a value, or any value but the default, of a key. only_on_gpu: no CPU has it."""

    name: str
    key: str
    in_force: Callable[[Any], bool]
    only_on_gpu: bool = False

    def of(self, run: RunConfig) -> Any:
        """What a run says for the key."""
        return reduce(getattr, self.key.split("."), run)

    def holds(self, run: RunConfig) -> bool:
        return self.in_force(self.of(run))


def _value(name: str, key: str, value: Any, only_on_gpu: bool = False) -> Setting:
    return Setting(name, key, lambda found: found == value, only_on_gpu)


def _degree(name: str, key: str) -> Setting:
    return Setting(name, key, lambda found: found > 1)


SETTINGS: tuple[Setting, ...] = (
    *(_value(f"ZeRO {stage}", "parallel.zero_stage", stage) for stage in range(4)),
    _value("fp32", "precision.dtype", "fp32"),
    _value("bf16", "precision.dtype", "bf16"),
    _value("fp16", "precision.dtype", "fp16", only_on_gpu=True),
    _degree("tensor", "parallel.tensor"),
    _degree("expert", "parallel.expert"),
    _degree("sequence", "parallel.sequence"),
    Setting("micro-batches", "parallel.micro_batch", lambda found: found is not None),
    _value("recompute", "parallel.recompute", True),
    _degree("parts", "parallel.dispatch_parts"),
    _value("compile", "parallel.compile", True),
    Setting("offload", "parallel.offload", lambda found: found is not None),
)


@dataclass(frozen=True)
class Refusal:
    """Two settings, by name, that do not work together; an error names the key of the first."""

    first: str
    second: str
    reason: str
    nearest: str


WRAPPER = "with {} DeepSpeed's wrapper takes one step on zero gradients at the start, so Adam's count is off"
REFUSALS: tuple[Refusal, ...] = (
    *(Refusal("ZeRO 0", dtype, WRAPPER.format(dtype), "1, or precision.dtype fp32") for dtype in ("bf16", "fp16")),
    Refusal(
        "compile",
        "ZeRO 3",
        "blocks are compiled as functions of whole weights, which ZeRO 3 gathers on the way",
        "false, or parallel.zero_stage 2",
    ),
    *(
        Refusal("offload", f"ZeRO {stage}", "host memory takes what ZeRO 3 shards", "null, or parallel.zero_stage 3")
        for stage in range(3)
    ),
    Refusal("offload", "compile", "offload needs ZeRO 3, under which blocks are not compiled", "null"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def refused(run: RunConfig) -> Iterator[str]:
    """One line for each pair of settings of a run that do not work together."""
    for refusal in REFUSALS:
        first, second = _BY_NAME[refusal.first], _BY_NAME[refusal.second]
        if first.holds(run) and second.holds(run):
            yield breach(first.key, first.of(run), refusal.reason, refusal.nearest)


def verdict(one: Setting, other: Setting) -> Verdict:
    """Whether two settings work together."""
    if one.key == other.key:
        return ""
    if any({refusal.first, refusal.second} == {one.name, other.name} for refusal in REFUSALS):
        return "no"
    return "GPU" if one.only_on_gpu or other.only_on_gpu else "yes"


def facts() -> dict[str, Any]:
    """The matrix for scripts: its settings and their keys, the verdict on each pair, and why pairs are refused."""
    return {
        "settings": {setting.name: setting.key for setting in SETTINGS},
        "pairs": [
            {"first": one.name, "second": other.name, "verdict": verdict(one, other)}
            for one, other in combinations(SETTINGS, 2)
            if one.key != other.key
        ],
        "refusals": [vars(refusal) for refusal in REFUSALS],
    }


def _cells() -> list[list[str]]:
    """The head, then a row a setting, with the settings before it as columns: the other half would say the same."""
    columns = SETTINGS[:-1]
    rows = [
        [one.name, *(verdict(one, other) if at < number else "" for at, other in enumerate(columns))]
        for number, one in enumerate(SETTINGS)
    ]
    return [["", *(setting.name for setting in columns)], *(row for row in rows if any(row[1:]))]


def _because() -> list[str]:
    return [f"{r.first} with {r.second}: {r.reason}; nearest that works: {r.nearest}" for r in REFUSALS]


def render() -> str:
    """The matrix as text."""
    legend = "GPU: on a GPU alone. Settings of one key have no cell."
    return "\n\n".join([aligned(_cells()), legend, "\n".join(_because())])


HEAD = """# What works with what

<!-- Generated: python -m stablemoe_ds.config.compatibility > docs/parallelism.md -->

`stablemoe config matrix` prints this table; a run that has two settings with *no* between them is refused before it
begins, with the reason and the nearest setting that works. What cells with *yes* say is trained in
`tests/distributed/test_parity.py` and held against a slow reference in one process; bf16 is held against fp32
(`tests/distributed/test_invariance.py`). Cells with *GPU* need one.
[Operations](operations.md#which-of-these-to-choose-when) says which of these to choose when.
"""


def document() -> str:
    """The matrix as a page of Markdown."""
    head, *rows = _cells()
    keys = "\n".join(f"| {setting.name} | `{setting.key}` |" for setting in SETTINGS)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    reasons = "\n".join(f"- {line}" for line in _because())
    return f"{HEAD}\n{table}\n\n{reasons}\n\n| name | key |\n|---|---|\n{keys}\n"


if __name__ == "__main__":
    print(document(), end="")
