"""What can be set of each table builder, by the names that command line and configuration share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stablemoe_ds.errors import UserError


class NoOptions(BaseModel):
    """Options of a builder that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VectorOptions(NoOptions):
    """How ids become vectors: from which neighbours, weighted how, in how many dimensions."""

    window: int = Field(1, ge=1, description="how many places away a neighbour may be")
    sides: Literal["both", "joined", "left", "right"] = Field(
        "both", description="both: left and right neighbours counted apart; joined: together; or one side alone"
    )
    weighting: Literal["ppmi", "log"] = Field(
        "ppmi", description="of a count: positive pointwise mutual information, or log(1 + count)"
    )
    dims: int = Field(64, ge=1, description="singular vectors that are kept")
    power: float = Field(0.5, ge=0, le=1, description="of the singular values that the vectors are multiplied by")


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


OPTIONS: dict[str, type[NoOptions]] = {
    "random": NoOptions,
    "even": NoOptions,
    "scattered": ScatteredOptions,
    "cooccurrence": CooccurrenceOptions,
}
"""The builders that need nothing but a corpus, and their options."""


def read_options(builder: str, options: Mapping[str, Any]) -> NoOptions:
    """The options of a builder, checked, defaults filled in. Raises UserError, one line a problem."""
    if builder not in OPTIONS:
        raise UserError(f"no table builder {builder!r}: expected one of {', '.join(OPTIONS)}")
    try:
        return OPTIONS[builder].model_validate(dict(options))
    except ValidationError as error:
        raise UserError("\n".join(_line(builder, found) for found in error.errors(include_url=False))) from error


def _line(builder: str, found: Any) -> str:
    name = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        known = ", ".join(OPTIONS[builder].model_fields) or "none at all"
        return f"table builder {builder}: unknown option {name}; it has {known}"
    return f"table builder {builder}: {name}: got {found['input']!r:.40}: {found['msg'].lower()}"
