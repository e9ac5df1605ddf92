"""Findings of the doctor, and how they are printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from stablemoe_ds.config.text_table import aligned

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. remedy: what to do about it, "" if it is well."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def render(findings: list[Finding]) -> str:
    """An aligned table, remedies below what they cure, and a last line that sums up."""
    rows = []
    for finding in findings:
        rows.append([finding.verdict, finding.name, finding.found])
        if finding.remedy:
            rows.append(["", "", f"→ {finding.remedy}"])
    count = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("fail", "warn")}
    bad = [f"{number} {verdict}" for verdict, number in count.items() if number]
    return f"{aligned(rows)}\n\n" + (", ".join(bad) + f" of {len(findings)}" if bad else "all well")
