"""In which order a layer serves its experts when only some of them are in memory, and which give way to which."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

AT_LEAST = 2
"""Places that change hands where more experts are missing: one is filled while the other's expert serves."""


@dataclass(frozen=True)
class Turn:
    """An expert's turn in one call. place: where its weights stand. fetched: they have to be brought there first."""

    expert: int
    place: int
    fetched: bool


def turns(held: Sequence[int | None], needed: Set[int], worth: Sequence[float]) -> list[Turn]:
    """The turns of one call.

    held: the expert at each place, None where there is none. needed: experts that this call has tokens for. worth: of
    each expert; of those that are not needed, the ones of least worth give way.

    Experts that are there serve first, so that the others arrive meanwhile. If more are missing than places are free,
    they go through these places one after another, and all other experts stay: a call that needs every expert, such as
    the reading of a prompt, does not drive out those of most worth.
    """
    missing = sorted(needed - set(held), key=lambda expert: (worth[expert], expert))

    def staying(place: int) -> tuple[bool, float]:
        expert = held[place]
        return expert in needed, -1.0 if expert is None else worth[expert]

    places = sorted(range(len(held)), key=staying)
    free = sum(expert not in needed for expert in held)
    changing = places[: min(len(missing), max(free, AT_LEAST))]
    present = [(held[place], place) for place in places]
    return [Turn(expert, place, False) for expert, place in present if expert is not None and expert in needed] + [
        Turn(expert, changing[number % len(changing)], True) for number, expert in enumerate(missing)
    ]
