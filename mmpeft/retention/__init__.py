"""Did the bridge keep its words? Base and bridge on the same text, with proof and statistics."""

import importlib

_EXPORTS = {
    "RetentionError": "sides",
    "Sides": "sides",
    "open_sides": "sides",
    "retain": "report",
    "retain_run": "report",
    "retain_pair": "report",
    "render": "terminal",
    "render_page": "page",
    "write": "report",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    """Import a public name on first use: lm-eval and scipy cost seconds."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
