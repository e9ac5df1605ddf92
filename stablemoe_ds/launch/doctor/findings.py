"""What a look at the machine finds, and how it is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<6}{finding.name:<{width + 2}}{finding.found}")
        if finding.remedy:
            lines.append(f"{'':<{width + 8}}→ {finding.remedy}")
    count = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("fail", "warn")}
    bad = [f"{number} {verdict}" for verdict, number in count.items() if number]
    lines.append("")
    lines.append("all well" if not bad else ", ".join(bad) + f" of {len(findings)}")
    return "\n".join(lines)
