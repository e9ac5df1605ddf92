"""A suite: one run in several variants, each with several seeds. YAML in, checked runs out."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic import Field, StringConstraints, model_validator

from stablemoe_ds.config.load import load_run, load_section
from stablemoe_ds.config.paths import PathText
from stablemoe_ds.config.resolved import settled
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.section import Section
from stablemoe_ds.errors import UserError

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
"""Names a directory, and stands in tables and pictures."""


class SuiteConfig(Section):
    """Runs that differ in nothing but their variant and their seed."""

    name: Label = Field(description="name of the suite")
    run: PathText = Field(description="YAML file of the run that all variants start from, relative to this file")
    overrides: list[str] = Field(default_factory=list, description="key=value, applied to the run in every variant")
    variants: dict[Label, list[str]] = Field(
        min_length=1, description="by label: key=value, applied on top of the overrides"
    )
    seeds: list[Annotated[int, Ge(0)]] = Field(min_length=1, description="every variant runs once with each seed")
    reference: Label = Field(description="label of the variant that the others are compared with")
    output: PathText | None = Field(None, description="output folder; null: runs/compare/<name>")

    @model_validator(mode="after")
    def _coherent(self) -> SuiteConfig:
        if self.reference not in self.variants:
            raise ValueError(f"reference '{self.reference}' is no variant: expected one of {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds repeat; nearest that works: {sorted(set(self.seeds))}")
        return self


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite. base and overrides: what it is made of, for the command line."""

    label: str
    seed: int
    run: RunConfig
    base: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.run.directory)

    def sibling(self, ending: str) -> Path:
        """A file next to the run directory: ``run.sibling("log")``."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    @property
    def command(self) -> str:
        """A line for a shell that trains it and needs nothing but the YAML file the suite names."""
        words = [sys.executable, "-m", "stablemoe_ds", "train", str(self.base), *self.overrides]
        return shlex.join(words)

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class Suite:
    """A suite and its runs: all variants with the first seed, then all with the second."""

    path: Path
    config: SuiteConfig
    runs: tuple[SuiteRun, ...]

    @property
    def output(self) -> Path:
        return _output(self.config)

    def only(self, labels: Sequence[str]) -> list[SuiteRun]:
        """The runs of these variants. Raises UserError for a label the suite does not have."""
        for label in labels:
            if label not in self.config.variants:
                known = ", ".join(self.config.variants)
                raise UserError(f"--only {label}: {self.path} has no such variant; expected one of {known}")
        return [run for run in self.runs if run.label in labels]


def load_suite(path: str | Path) -> Suite:
    """Read a suite and check every run of it. Raises UserError, one line for each thing that is wrong."""
    path = Path(path)
    config = load_section(SuiteConfig, path, (), "'name:' and 'variants:'")
    return Suite(path, config, tuple(_runs(path, config)))


def _runs(path: Path, config: SuiteConfig) -> Iterator[SuiteRun]:
    base = path.parent / config.run
    for seed in config.seeds:
        for label, variant in config.variants.items():
            place = {
                "name": f"{label}-{seed}",
                "seed": seed,
                "run_dir": str(_output(config) / label / f"seed-{seed}"),
            }
            overrides = (*config.overrides, *variant, *(f"{key}={json.dumps(value)}" for key, value in place.items()))
            try:
                run = settled(load_run(base, overrides))  # so that all variants mean the same
                check(run)
                if not run.data.valid:
                    raise UserError("data.valid: got []: runs are compared by the perplexity on it; name a corpus")
            except UserError as error:
                lines = "\n".join(f"{path}: variant {label}: {line}" for line in str(error).splitlines())
                raise UserError(lines) from error
            yield SuiteRun(label, seed, run, base, overrides)


def _output(config: SuiteConfig) -> Path:
    return Path(config.output or f"runs/compare/{config.name}")
