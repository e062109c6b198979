"""Parts inside a checkpoint: the class of a config and its options, as JSON."""

import dataclasses
import importlib
import sys


def to_spec(part) -> dict:
    """A part's config as ``{"class_path", "init_args"}``, parts within it likewise."""
    cls = type(part)
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {f.name: _plain(getattr(part, f.name)) for f in dataclasses.fields(part)},
    }


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_spec(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def from_spec(spec: dict, base: type):
    """The part's config back.

    A checkpoint may only name classes of mmpeft, or of modules the caller has imported: loading
    never imports, and so never runs, code that a checkpoint chooses.

    Raises:
        ValueError: another module, no subclass of ``base``, or unknown options.
    """
    path = spec["class_path"]
    module, _, name = path.rpartition(".")
    if module.startswith("mmpeft."):
        importlib.import_module(module)
    elif module not in sys.modules:
        raise ValueError(f"the checkpoint uses {path}; import {module} before loading it.")
    cls = getattr(sys.modules[module], name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"the checkpoint names {path}, which is no {base.__name__}.")
    known = {f.name for f in dataclasses.fields(cls)}
    options = spec.get("init_args", {})
    if unknown := sorted(set(options) - known):
        raise ValueError(f"the checkpoint sets unknown options {unknown} of {path}.")
    return cls(**{name: _built(value, base) for name, value in options.items()})


def _built(value, base: type):
    if isinstance(value, dict) and value.keys() == {"class_path", "init_args"}:
        return from_spec(value, base)
    return [_built(one, base) for one in value] if isinstance(value, list) else value
