"""Table builders and what can be set of each, by the names that command line and configuration share."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stablemoe_ds.config.paths import expanded, if_written
from stablemoe_ds.errors import UserError


class NoOptions(BaseModel):
    """Options of a builder that has none. least_top_k: how many experts an id has to have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    least_top_k: ClassVar[int] = 1


class VectorOptions(NoOptions):
    """How ids become vectors: from which neighbours, weighted how, in how many dimensions."""

    window: int = Field(1, ge=1, description="how many places away a neighbour may be")
    sides: Literal["both", "joined", "left", "right"] = Field(
        "both", description="both: left and right neighbours counted apart; joined: together; or one side alone"
    )
    weighting: Literal["ppmi", "log"] = Field(
        "ppmi", description="weight of a pair: ppmi: positive pointwise mutual information; log: log(1 + count)"
    )
    dims: int = Field(64, ge=1, description="singular vectors that are kept")
    power: float = Field(
        0.5, ge=0, le=1, description="exponent of the singular values, which the vectors are multiplied by"
    )


class ScatteredOptions(VectorOptions):
    """Options of ``scattered``."""

    max_load: float = Field(1.3, ge=1, description="largest max/mean load, where frequencies allow")


class CooccurrenceOptions(ScatteredOptions):
    """Options of ``cooccurrence``."""

    choice: Literal["balanced", "alternating", "greedy", "nearest"] = Field(
        "balanced",
        description="balanced: clusters first, then the choice that keeps most under the load limit; alternating: "
        "clusters found under the limit (balanced k-means); greedy: the commonest ids first, each to the nearest with "
        "room; nearest: no limit",
    )
    layers: Literal["seeds", "slices", "same"] = Field(
        "seeds",
        description="how tables of several layers differ: other first centroids; other dimensions (layer l of L takes "
        "every L-th one); not at all",
    )


class CrossedOptions(CooccurrenceOptions):
    """Options of ``crossed``: those of its first choice."""

    least_top_k: ClassVar[int] = 2


OPTIONS: dict[str, type[NoOptions]] = {
    "random": NoOptions,
    "even": NoOptions,
    "scattered": ScatteredOptions,
    "cooccurrence": CooccurrenceOptions,
    "crossed": CrossedOptions,
}
"""The builders that need nothing but a corpus, and their options."""


def builder_or_file(name: str) -> str:
    """The name of a builder, or the path of a table file with ``~`` replaced.

    A name without a slash or a suffix is meant as a builder unless there is a file of that name.
    Raises ValueError for a misspelled builder, and for what :func:`expanded` refuses.
    """
    path = expanded(name)
    bare = os.path.basename(path) == path and not os.path.splitext(path)[1].strip(".")
    if not bare or path in OPTIONS or os.path.lexists(path):
        return path
    near = difflib.get_close_matches(path.lower(), OPTIONS, 1, 0.6)
    raise ValueError(
        f"there is neither a table builder nor a file of that name; expected {', '.join(OPTIONS)}, or a file from "
        f"'stablemoe table build'; nearest that works: {near[0] if near else f'./{path}, for a file not here yet'}"
    )


TableText = Annotated[str, if_written(builder_or_file)]
"""A builder or a path in a section of a YAML file."""


def read_options(builder: str, options: Mapping[str, Any], top_k: int | None = None) -> NoOptions:
    """The options of a builder, checked, defaults filled in; top_k: experts of an id, where that is known.

    Raises UserError, one line a problem.
    """
    if builder not in OPTIONS:
        raise UserError(f"no table builder {builder!r}: expected one of {', '.join(OPTIONS)}")
    try:
        read = OPTIONS[builder].model_validate(dict(options))
    except ValidationError as error:
        raise UserError("\n".join(_line(builder, found) for found in error.errors(include_url=False))) from error
    if top_k is not None and top_k < read.least_top_k:
        raise UserError(f"table builder {builder}: top_k is {top_k}, expected {read.least_top_k} or more")
    return read


def named_with_options(builder: str, options: Mapping[str, Any]) -> str:
    """A builder as the command line names it, with the options that are not the default: ``scattered dims=32``."""
    given = read_options(builder, options).model_dump(exclude_defaults=True)
    return " ".join([builder, *(f"{name}={value}" for name, value in given.items())])


def options_help(builder: str) -> str:
    """The options of a builder with their defaults, as they stand on a command line, in lines of 80 characters."""
    fields = OPTIONS[builder].model_fields
    if not fields:
        return f"The builder {builder} has no options."
    lines = [
        textwrap.fill(
            field.description or "",
            80,
            initial_indent=f"  {name}={field.default}".ljust(20),
            subsequent_indent=" " * 20,
        )
        for name, field in fields.items()
    ]
    return "\n".join([f"options of the builder {builder}, with their defaults:", *lines])


def _line(builder: str, found: Any) -> str:
    name = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        known = ", ".join(OPTIONS[builder].model_fields) or "none at all"
        return f"table builder {builder}: unknown option {name}; it has {known}"
    return f"table builder {builder}: {name}: got {found['input']!r:.40}: {found['msg'].lower()}"
