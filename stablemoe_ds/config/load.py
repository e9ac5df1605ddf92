"""A run, or any other strict section, from its YAML file and the ``key.sub=value`` of the command line, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stablemoe_ds.config import yamltext
from stablemoe_ds.config.messages import cut, error_messages, printable, show
from stablemoe_ds.config.paths import WRITTEN
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.section import Section
from stablemoe_ds.config.textfile import LARGEST_YAML, read_text
from stablemoe_ds.errors import UserError

Kind = TypeVar("Kind", bound=Section)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run and apply the overrides in order.

    overrides: ``key.sub=value``, the value as YAML: ``moe.layers=[2,4]``, ``stages.at_step=null``.
    Raises UserError, with one line for each error. Rules that involve several sections are in ``rules.check``.
    """
    return load_section(RunConfig, path, overrides, "'model:' and 'schedule:'")


def load_section(schema: type[Kind], path: str | Path, overrides: Sequence[str], top: str) -> Kind:
    """Read a YAML file as ``schema`` and lay the overrides over it. top: keys such a file has, for an error message.

    Raises UserError, one line for each thing that is wrong.
    """
    where = printable(str(path))
    tree = yamltext.parse(read_text(path, "a short YAML file", LARGEST_YAML), where)
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else show(tree)
        raise UserError(f"{where}: expected sections such as {top} at the top, found {found}")
    overridden = {}
    for override in overrides:
        overridden[_lay(tree, override)] = override

    def origin(key: str) -> str:
        hits = [text for name, text in overridden.items() if f"{key}.".startswith(f"{name}.")]
        return f"override {cut(hits[-1])}" if hits else where

    try:
        # By way of JSON: pydantic is strict there (no true for 1, no text for numbers) and still takes lists as tuples.
        return schema.model_validate_json(json.dumps(tree), strict=True, context=WRITTEN)
    except ValidationError as error:
        raise UserError(error_messages(error, origin, schema)) from error


def dump_run(run: RunConfig) -> str:
    """YAML of every setting of a run, defaults included; ``load_run`` reads it back to an equal run."""
    return yamltext.dump(run.model_dump(mode="json"))


def _lay(tree: dict[str, Any], override: str) -> str:
    """Set one override in ``tree``; the topmost dotted key it brought into being or replaced."""
    key, equals, text = override.partition("=")
    *parents, last = names = key.strip().split(".")
    if not equals or not all(names) or len(names) > yamltext.DEEPEST:
        raise UserError(f"override {show(override)}: expected key.sub=value, e.g. schedule.steps=100")
    where = f"override {cut(override)}"
    value = yamltext.parse(text, where)
    section, made = tree, len(names)
    for depth, name in enumerate(parents, 1):
        if section.get(name) is None:
            section[name] = {}
            made = min(made, depth)
        if not isinstance(section[name], dict):
            whole = ".".join(parents[:depth])
            raise UserError(f"{where}: {whole} is no section but {show(section[name])}; set {whole}=... as a whole")
        section = section[name]
    section[last] = value
    return ".".join(names[:made])
