"""Values of a method's options, checked wherever a config is made, in Python, too."""

import dataclasses
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


def check_options(config, **least: float) -> None:
    """Refuse words that a ``Literal`` field does not have, and numbers below their least.

    ``None`` is left alone.

    Raises:
        ValueError: there is one.
    """
    method, kinds = type(config).__name__, get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        kind = kinds[name]
        either = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        words = [word for one in either if get_origin(one) is Literal for word in get_args(one)]
        value = getattr(config, name)
        if words and value is not None and value not in words:
            raise ValueError(
                f"{method}: {name} {value!r} is unknown; choose one of {', '.join(words)}."
            )
        if name in least and value is not None and value < least[name]:
            raise ValueError(f"{method}: {name} is {value}; it must be {least[name]} or more.")
