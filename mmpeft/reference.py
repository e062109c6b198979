"""docs/recipe.md, every key of a recipe, out of the dataclasses that read it.

python -m mmpeft.reference > docs/recipe.md
"""

import dataclasses
import inspect
import json
import re
import sys
import types
import typing

from docstring_parser import parse
from peft import PeftConfig
from transformers import TrainingArguments

from mmpeft import config
from mmpeft.compare import grid
from mmpeft.connector import ConnectorConfig
from mmpeft.encoder import VisionEncoderConfig
from mmpeft.speed import SpeedConfig
from mmpeft.stage import StageConfig
from mmpeft.task import Task

SECTIONS = {
    "": config.RunConfig, "model": config.ModelConfig, "model.resolution": config.ResolutionConfig,
    "data": config.DataConfig, "align and instruct": StageConfig,
    "retention": config.RetentionConfig, "rank_search": config.RankSearchConfig,
    "speed": SpeedConfig,
}  # fmt: skip
PARTS = {
    "Vision encoders (`model.vision_encoder`)": VisionEncoderConfig,
    "Connectors (`model.connector`)": ConnectorConfig,
    "Adapters (`model.adapter`)": PeftConfig,
    "Tasks (`data.task`, `data.align`, `data.replay`)": Task,
}
GRID = {"Top level": grid.GridConfig, "`evaluate`": grid.ScoreConfig, "`retain`": grid.RetainConfig}
LIBRARY = (TrainingArguments, PeftConfig)
HEAD = """# Recipe keys

Made from the code by `python -m mmpeft.reference`. A recipe is YAML; any key can be given on the
command line, too: `--data.max_length 1024`. A part is named by its class:
`connector: {class_path: MLPConnectorConfig, init_args: {hidden_size: 512}}`. Adapters of peft have
peft's own keys; which there are, and what each does, is in [methods.md](methods.md). What a grid of
runs is made of stands at the end.
"""


def reference() -> str:
    """The page, as Markdown."""
    text = [HEAD]
    for name, cls in SECTIONS.items():
        text += [
            f"\n## {f'`{name}`' if name else 'Top level'}\n",
            f"\n{summary(cls)}\n",
            table(cls),
        ]
        if cls is StageConfig:
            text.append("\nAnd every key of transformers' `TrainingArguments`.\n")
    for title, base in PARTS.items():
        text.append(f"\n## {title}\n")
        for cls in config._subclasses(base):
            if cls.__module__.startswith("mmpeft.") and (base is not Task or "name" in vars(cls)):
                text += [f"\n### `{cls.__name__}`\n", f"\n{summary(cls)}\n", table(cls)]
    text.append("\n## Grids (`mmpeft compare GRID.yaml`)\n")
    for name, cls in GRID.items():
        text += [f"\n### {name}\n", f"\n{summary(cls)}\n", table(cls)]
    plain = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", "".join(text))  # docstrings are no Markdown
    return re.sub(r"(?<!`)``(?!`)", "`", plain)


def summary(cls) -> str:
    """The first sentence on a class; of a task's file where its class has none."""
    own = _parsed(cls).short_description
    return own or inspect.getdoc(sys.modules[cls.__module__]).split("\n")[0]


def table(cls) -> str:
    """A row a key, in the order of the class; a library's keys only where we say more of them."""
    said, theirs = {}, {}
    for base in reversed(cls.__mro__):
        if base in LIBRARY:
            theirs = {f.name: f.default for f in dataclasses.fields(base)}
        elif dataclasses.is_dataclass(base) and base.__module__.startswith("mmpeft."):
            said |= {
                one.arg_name: " ".join(one.description.split()) for one in _parsed(base).params
            }
    fields = [f for f in dataclasses.fields(cls) if f.init]
    rows = [
        f"| `{f.name}` | {_type(f.type)} | {_default(f)} | {said.get(f.name, '')} |\n"
        for f in fields
        if f.name in said or f.name not in theirs or f.default != theirs[f.name]
    ]
    if not rows:
        return ""
    return "\n| key | type | default | |\n|---|---|---|---|\n" + "".join(rows)


def _parsed(cls):
    text = inspect.getdoc(cls) if "__doc__" in vars(cls) and cls.__doc__ else ""
    return parse(f"\n\n{text}" if text.startswith("Attributes:") else text)


def _type(kind) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return ", ".join(map(_type, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is not None:
        return str(kind).replace("typing.", "")
    return getattr(kind, "__name__", str(kind))


def _default(field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "needed"
    if dataclasses.is_dataclass(value):
        return "see below"
    return f"`{json.dumps(value, default=str)}`"  # which is YAML


if __name__ == "__main__":
    print(reference(), end="")
