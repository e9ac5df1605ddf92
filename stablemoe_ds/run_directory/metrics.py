"""The history of a run: one JSON object a line in ``metrics.jsonl``.

Every line has ``step`` (updates made) and ``kind``:

    train   loss, lr, grad_norm, tokens_per_second, stage, agreement (stage 1), load (max/mean by layer), drop_rate,
            tokens_read (since the run began, whatever the size of its updates)
    valid   perplexity, perplexity_distilled (stage 1), agreement (stage 1), stage, tokens, words
    test    the same, once at the end
    probe   churn, seconds (that recording took)
    switch  agreement, load, least_load, table_sha256
    fault   what, where: of an update that was dropped, or of a return to an older checkpoint
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stablemoe_ds.errors import UserError

Kind = Literal["train", "valid", "test", "probe", "switch", "fault"]
Line = dict[str, Any]


class MetricsLog:
    """Append to the history, read it, and cut it back when a run resumes from an earlier step."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, kind: Kind, step: int, **values: Any) -> None:
        """Add one line. NaN and infinity, which JSON does not have, are written as null."""
        line = json.dumps(plain({"step": step, "kind": kind, **values}), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[Line]:
        """All lines in order; none if there is no file. A last line that was cut off in writing is left out.

        Raises UserError for any other line that is not one of ours.
        """
        lines: list[Line] = []
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return lines
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read metrics {self.path}: {error}") from error
        complete = text.split("\n")[:-1]  # what follows the last newline is nothing, or half a line
        for number, line in enumerate(complete, 1):
            try:
                value = json.loads(line)
                lines.append({**value, "step": int(value["step"]), "kind": str(value["kind"])})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number}: expected a JSON object with step and kind, got {line[:60]!r}; "
                    "remove the line to continue without it"
                ) from error
        return lines

    def truncate_after(self, step: int) -> None:
        """Forget what came after ``step``, and half a line if there is one: a resumed run writes it again."""
        if not self.path.exists():
            return
        kept = [json.dumps(line, allow_nan=False) + "\n" for line in self.read() if line["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, self.path)


def training_seconds(lines: Sequence[Line], tokens_per_step: int) -> list[tuple[int, float]]:
    """(step, seconds spent in updates up to it) of the ``train`` lines; validation and probes are not in it.

    From the logged speeds, so that an interrupted run counts what it has kept and no pause.
    """
    seconds, before, series = 0.0, 0, []
    for line in lines:
        if line["kind"] == "train" and line.get("tokens_per_second"):
            seconds += (line["step"] - before) * tokens_per_step / line["tokens_per_second"]
            before = line["step"]
            series.append((before, seconds))
    return series


def validations(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """Lines of validation over the same tokens, which a curve may join, and those over another set, which it may not.

    On the way a run often measures a part of its validation text, and all of it at the switch and at the end.
    """
    found = [line for line in lines if line["kind"] == "valid" and line.get("perplexity") is not None]
    usual = statistics.mode(line.get("tokens") for line in found) if found else None
    alike = [line for line in found if line.get("tokens") == usual]
    return alike, [line for line in found if line.get("tokens") != usual]


def probe_seconds(lines: Sequence[Line]) -> float | None:
    """What recording the routing of the probe took in all; None if no line says."""
    spent = [line["seconds"] for line in lines if line["kind"] == "probe" and line.get("seconds") is not None]
    return sum(spent) if spent else None


def plain(value: Any) -> Any:
    """The value in types JSON has: arrays and tensors become lists, their scalars numbers, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
