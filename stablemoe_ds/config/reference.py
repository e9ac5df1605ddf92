"""The configuration reference, written from the schema.

``python -m stablemoe_ds.config.reference > docs/configuration.md``
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from stablemoe_ds.config.messages import section_of, show
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.section import Section
from stablemoe_ds.config.table_options import OPTIONS

HEAD = """# Configuration

<!-- Generated: python -m stablemoe_ds.config.reference > docs/configuration.md -->

A run is one YAML file; `ds_configs/` has examples. You can also set any key on the command line, with its value in
YAML: `schedule.steps=100 moe.layers=[2,4] stages.at_step=null`. Unknown keys, repeated keys and YAML aliases are
refused.

`stablemoe config check RUN.yaml` checks a run against every rule, looks at the files it names, and prints what it
costs. A file that `train` would refuse is an error. A file that does not exist on this machine is only listed. So are
settings of `moe` that the run's router does not look at, since one file may serve many routers.

The rules that involve several sections are in `stablemoe_ds/config/rules.py`. An error names the nearest setting that
works.
"""
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def reference() -> str:
    """The whole reference as Markdown."""
    return document(HEAD, "run", RunConfig) + "\n" + "\n".join(_builders()) + "\n"


def document(head: str, name: str, schema: type[Section]) -> str:
    """A reference as Markdown: ``head``, the keys at the top of a file under the heading ``name``, its sections."""
    return "\n".join([head, *_section(name, schema, "", "At the top of the file.")]).rstrip() + "\n"


def _builders() -> Iterator[str]:
    """The options of all table builders in one table, since most are those of several."""
    yield "## moe.table_options\n"
    without = " and ".join(f"`{name}`" for name, options in OPTIONS.items() if not options.model_fields)
    yield "Options of the table builders; on the command line `stablemoe table build HOW key=value ...`."
    yield f"The builders {without} have none.\n"
    yield "| key | builder | type | default | meaning |\n|---|---|---|---|---|"
    every = {key: field for options in OPTIONS.values() for key, field in options.model_fields.items()}
    for key, field in every.items():
        having = ", ".join(f"`{name}`" for name, options in OPTIONS.items() if key in options.model_fields)
        yield f"| `{key}` | {having} | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"


def _section(title: str, section: type[Section], prefix: str, note: str | None = None) -> Iterator[str]:
    """A heading, a table of the plain keys, then every section below, whose keys begin with ``prefix``."""
    yield f"## {title}\n\n{note or inspect.getdoc(section)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    below: list[tuple[str, type[Section]]] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner:
            below.append((name, inner))
        if not inner or field.description:
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"
    yield ""
    for name, inner in below:
        if inner.__name__ == "Source" and name != "train":
            continue  # train, valid and test have items of one kind
        yield from _section(f"{prefix}{name}", inner, f"{prefix}{name}.")


def _type(field: FieldInfo) -> str:
    words = _words(field.annotation)
    bounds = _bounds(field.metadata)
    return words.replace(" or `null`", f"{bounds} or `null`") if "`null`" in words else words + bounds


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in arguments)
    if origin in (Union, types.UnionType):
        kept = [_words(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*kept, "`null`"] if type(None) in arguments else kept)
    if origin is dict and arguments[1] is not Any:
        return f"names, each with {_words(arguments[1])}"
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}, each {_words(arguments[0])}"
    if section_of(annotation):
        return "section"
    if hasattr(annotation, "__metadata__"):  # Annotated, as in PositiveInt
        return _words(arguments[0]) + _bounds(annotation.__metadata__)
    return NAMES.get(annotation, "section")


def _bounds(metadata: Iterable[Any]) -> str:
    return "".join(f" {sign} {getattr(m, key):g}" for m in metadata for key, sign in SIGNS.items() if hasattr(m, key))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, Section) else f"`{show(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
