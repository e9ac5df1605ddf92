"""The reference of the Python API, written from its docstrings.

``python -m stablemoe_ds.api.api_reference > docs/api.md``
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import stablemoe_ds

HEAD = """# Python API

<!-- Generated: python -m stablemoe_ds.api.api_reference > docs/api.md -->

`import stablemoe_ds` provides these names. Each is imported when it is first used. Everything else in the package is
internal and may change. There is a complete example program for each task: [open a model](../examples/open_model.py) ·
[an MoE layer in a plain torch model](../examples/moe_layer.py) · [the same on several
processes](../examples/moe_layer_on_several.py) · [inspect a table](../examples/routing_table.py) ·
[let a larger model follow one](../examples/table_transfer.py) · [read a run](../examples/load_run.py).

The letters at the end of a name are the shape of the tensor: B sequences, S positions, D width, N experts, K experts
per token, L MoE layers, V ids.
"""


def api_reference() -> str:
    """The whole reference as Markdown."""
    parts = [HEAD]
    for name in stablemoe_ds.__all__:
        parts += _described(name, getattr(stablemoe_ds, name))
    return "\n".join(parts).rstrip() + "\n"


def _described(name: str, thing: Any) -> Iterator[str]:
    """Heading, signature and docstring; of a class its public methods and properties as well."""
    yield f"## {name}\n"
    if not inspect.isclass(thing):
        yield f"{_signature(name, thing)}\n{_text(thing)}\n"
        return
    yield f"{_text(thing)}\n"
    if words := inspect.cleandoc(getattr(vars(thing).get("__init__"), "__doc__", None) or ""):
        yield f"{_signature(name, thing.__init__)}\n{_markdown(words)}\n"
    for member, value in vars(thing).items():
        value = getattr(value, "__func__", value)  # of a class method
        if member == "forward":
            yield f"### layer(...)\n\n{_signature('layer', value)}\n{_text(value)}\n"
        elif member.startswith("_") or not inspect.getdoc(value):
            continue
        elif inspect.isfunction(value):
            yield f"### {name}.{member}\n\n{_signature(member, value)}\n{_text(value)}\n"
        elif isinstance(value, property) or hasattr(value, "func"):
            yield f"### {name}.{member}\n\nProperty. {_text(value)}\n"


def _signature(name: str, function: Any) -> str:
    """As Python code, annotations as they were written."""
    whole = inspect.signature(function)
    kept = [parameter for parameter in whole.parameters.values() if parameter.name not in ("self", "cls")]
    line = name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(whole.replace(parameters=kept)))
    if len(line) > 110:
        line = re.sub(r", (?=\*?\*?\w+(?::| =|,|\)))", ",\n    ", line.replace("(", "(\n    ", 1)).replace(
            ") ->", "\n) ->"
        )
    return f"```python\n{line}\n```\n"


def _text(thing: Any) -> str:
    return _markdown(inspect.getdoc(thing) or "")


def _markdown(docstring: str) -> str:
    """Roles and double backticks of Sphinx as Markdown has them; what is raised is a paragraph of its own."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    return re.sub(r"\n+(Raises? )", r"\n\n\1", text)


if __name__ == "__main__":
    print(api_reference(), end="")
