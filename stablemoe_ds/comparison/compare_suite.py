"""``stablemoe compare``: train a suite, then write its tables and pictures."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stablemoe_ds.answers import answer
from stablemoe_ds.comparison.outcome import outcome_of
from stablemoe_ds.comparison.outcome_tables import markdown, write_csv
from stablemoe_ds.comparison.pictures import draw_all
from stablemoe_ds.comparison.runner import cores, threads_of_each, train_all
from stablemoe_ds.comparison.suite import Suite, SuiteRun
from stablemoe_ds.comparison.suite_state import state_of
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import read_sources
from stablemoe_ds.errors import UserError

HARDWARE = "hardware.txt"


def say(text: str) -> None:
    answer(text)


def compare(suite: Suite, runs: Sequence[SuiteRun], jobs: int) -> int:
    """Train ``runs`` of a suite, ``jobs`` at once, and report on all that is finished. Returns an exit status.

    Raises UserError before anything begins if a run needs several processes, or its directory holds another run.
    """
    for one in runs:
        try:
            check(one.run, world_size=1)
        except UserError as error:
            raise UserError(f"{one}: every run has one process here: {error}; see --dry-run and --cluster") from error
    if any(state_of(one) != "finished" for one in runs):
        suite.output.mkdir(parents=True, exist_ok=True)
        (suite.output / HARDWARE).write_text(f"{_hardware()}; {_side_by_side(jobs)}\n", encoding="utf-8")
    unfinished = train_all(runs, jobs, say)
    report(suite)
    for one in unfinished:
        say(f"not finished: {one}; the same command continues it")
    return 1 if unfinished else 0


def report(suite: Suite) -> int:
    """Write tables and pictures of the finished runs. Returns an exit status: 1 if there is none."""
    finished = [one for one in suite.runs if state_of(one) == "finished"]
    if not finished:
        say(f"no run of {suite.path} is finished yet: nothing to report")
        return 1
    outcomes = [outcome_of(one) for one in finished]
    labels, output = list(suite.config.variants), suite.output
    write_csv(outcomes, output / "table.csv")
    tables = markdown(outcomes, labels, suite.config.reference)
    head = "\n".join(_head(suite, finished))
    (output / "table.md").write_text(f"{head}\n\n{tables}", encoding="utf-8")
    pictures = draw_all(outcomes, labels, output)
    say(f"\n{tables}")
    say(f"wrote {', '.join(str(path) for path in (output / 'table.md', output / 'table.csv', *pictures))}")
    return 0


def _head(suite: Suite, finished: Sequence[SuiteRun]) -> list[str]:
    """What was run, on what, with which seeds."""
    config, sources = suite.config, finished[0].run.data.train
    corpora = ", ".join(map(_corpus, sources))
    tokens = sorted({one.run.schedule.steps * one.run.schedule.tokens_per_step for one in finished})
    kept = suite.output / HARDWARE
    hardware = kept.read_text(encoding="utf-8").strip() if kept.exists() else _hardware()
    return [
        f"# {config.name}",
        "",
        f"- command: `stablemoe compare {shlex.quote(str(suite.path))}`",
        f"- corpus: {corpora}; trained on {' or '.join(f'{count:,}' for count in tokens)} tokens",
        f"- hardware: {hardware}",
        f"- seeds: {', '.join(map(str, config.seeds))}; {len(finished)} of {len(suite.runs)} runs are finished",
        f"- reference: {config.reference}",
    ]


def _corpus(source: Source) -> str:
    """A corpus by its path, and how large it is if it is still there: a report does not need it."""
    try:
        (info,) = read_sources([source])
    except UserError:
        return source.path
    return f"{info.prefix} ({info.tokens:,} tokens)"


def _hardware() -> str:
    if shutil.which("nvidia-smi"):  # not by torch, which would claim memory of the GPU for this process
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        if names := asked.stdout.splitlines() if asked.returncode == 0 else []:
            return f"{len(names)} x {' and '.join(sorted(set(names)))}"
    return f"{cores()} cores of {_processor()}"


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _side_by_side(jobs: int) -> str:
    threads = os.environ.get("OMP_NUM_THREADS", str(threads_of_each(jobs)))
    return f"{jobs} run(s) at once, {threads} thread(s) each"
