"""Two-stage Mixture-of-Experts whose routing is learned first and never moves again.

These names are the Python API (docs/api.md). Each is imported when it is first used, so that ``import stablemoe_ds``
itself loads nothing; modules below are the package's own and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablemoe_ds.api.opened_model import OpenedModel, open_model
    from stablemoe_ds.api.plain_layer import MoELayer, MoEReport
    from stablemoe_ds.api.processes import average_gradients, join_processes
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.errors import UserError
    from stablemoe_ds.tables.table import RoutingTable

__all__ = [
    "MoELayer",
    "MoEReport",
    "OpenedModel",
    "RoutingTable",
    "UserError",
    "average_gradients",
    "join_processes",
    "load_run",
    "open_model",
]
_HOMES = {
    "MoELayer": "api.plain_layer",
    "MoEReport": "api.plain_layer",
    "OpenedModel": "api.opened_model",
    "RoutingTable": "tables.table",
    "UserError": "errors",
    "average_gradients": "api.processes",
    "join_processes": "api.processes",
    "load_run": "config.load",
    "open_model": "api.opened_model",
}
"""The module below this package that each name comes from."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
