"""What jsonargparse says of a bad configuration, in one line that names key, value and remedy."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple


class Known(NamedTuple):
    """The names that a configuration knows.

    Attributes:
        sections: by the prefix of each section, as ``"data."``, its keys.
        options: by each class of a part, the options that it takes.
        classes: by each field that names a class, the classes it may name.
    """

    sections: Mapping[str, Collection[str]]
    options: Mapping[str, Collection[str]]
    classes: Mapping[str, list[str]]

    @property
    def keys(self) -> Mapping[str, str]:
        """By each key of a section, the prefix of the last that has it."""
        return {key: prefix for prefix, keys in self.sections.items() for key in keys}


UNKNOWN_KEY = re.compile(
    r"(?:Parser key \"(?P<part>\w+)\": Does not .*?)?Option '(?P<option>[\w.]+)' is not accepted"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"
    r"|nrecognized arguments: --(?P<argument>[\w.]+)"
)
UNKNOWN_OPTION = re.compile(r"class_path '(?:\w+\.)*(\w+)': Option '(\w+)' is not accepted")
UNKNOWN_CLASS = re.compile(
    r'key "(?:\w+\.)*(\w+)":\s.*?Expected a dot import path string: (\w+)', re.DOTALL
)
NO_MAPPING = re.compile(r"Parser key \"([\w.]+)\": Unable to load config '([^']*)'")
KEY = re.compile(r'Parser key "([^"]+)":')
EXPECTED = re.compile(r"Expected an? (.+?)(?=\. Got value| - |; | Given value|$)")
VALUE = re.compile(r"G(?:ot|iven) value: (.*?)(?= - Expected| Given value|$)")
TYPES = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'str'>": "text",
    "<class 'bool'>": "true or false", "<class 'NoneType'>": "null",
    "<class 'list'>": "a list, as '[a, b]'", "<class 'dict'>": "keys and values",
}  # fmt: skip

# what names a class, and how; jsonargparse takes it for options of the base class otherwise
PARTS = (
    "model.vision_encoder", "model.connector", "model.adapter", "data.task", "data.align",
    "data.replay", "evaluate.task",
)  # fmt: skip
PART = "{class_path: NAME, init_args: {OPTION: VALUE}}"


def explain(message: str, known: Known) -> str:
    """An error of jsonargparse in one line, with the nearest valid key, class or value."""
    message = " ".join(message.split())
    if "AdaLoRA does not work when `total_step` is None" in message:
        return (
            "AdaLoraConfig needs total_step; give a large number, say 1000: the steps of the stage "
            "take its place."
        )
    if (found := UNKNOWN_OPTION.search(message)) and found[1] in known.options:
        hint = did_you_mean(found[2], known.options[found[1]])
        if found[2] in known.keys:  # of a section, not of a part
            hint = f" Did you mean {known.keys[found[2]] + found[2]!r}?"
        return f"unknown key {found[2]!r} of {found[1]}.{hint}"
    if found := UNKNOWN_KEY.search(message):
        return unknown_key(".".join(filter(None, found.groups())), known)
    if found := UNKNOWN_CLASS.search(message):
        if (names := known.classes.get(found[1])) is None:
            return f"{found[1]} is {found[2]!r}; write its keys below it, or null."
        return f"{found[1]}: unknown class {found[2]!r}.{did_you_mean(found[2], names)}"
    if found := NO_MAPPING.search(message):
        return no_mapping(found[1], found[2])
    return _bad_value(message) or message


def bad_part(mapping: Mapping) -> str | None:
    """What is wrong with how a part of a configuration is written, before its options are read."""
    for path in PARTS:
        section, name = path.split(".")
        part = mapping.get(section)
        part = part.get(name) if isinstance(part, Mapping) else None
        if isinstance(part, list):
            return f"{path} is a list; write one part, as {PART}."
        if not isinstance(part, Mapping):
            continue
        if "class_path" not in part:
            has = f"has {', '.join(map(str, part))} but no" if part else "is empty, it has no"
            return f"{path} {has} class_path; write {PART}, or null for none."
        if beside := [key for key in part if key not in ("class_path", "init_args", "dict_kwargs")]:
            return f"{path} has {', '.join(map(str, beside))} beside class_path; write {PART}."
        if not isinstance(part.get("init_args", {}), Mapping):
            return (
                f"{path}.init_args is {part['init_args']!r}; write keys below it, or leave it out."
            )
    return None


def no_mapping(key: str, value) -> str:
    """Of a section that holds something else than keys."""
    value = "empty" if value is None else repr(value)
    return f"{key} is {value}; write its keys below it, or leave {key} out."


def unknown_key(key: str, known: Known) -> str:
    """A dotted key that no section has, with the nearest that its own has, or else another."""
    prefix, parts = "", key.split(".")
    while parts[0] in known.sections.get(prefix, ()) and parts[1:]:
        prefix += parts.pop(0) + "."
    here = known.sections.get(prefix, ())
    near = [name for name in here if parts[0] in name.split("_")]
    near = near or difflib.get_close_matches(parts[0], here, n=1, cutoff=0.55)
    if near and near != parts[:1]:
        return f"unknown key {parts[0]!r}. Did you mean {near[0]!r}?"
    of_parts = set().union(*known.options.values())
    every = known.keys.keys() | of_parts | {"class_path", "init_args"}
    wrong = next((part for part in key.split(".") if part not in every), None)
    if wrong is None:  # every word exists, only not here
        wrong = key.split(".")[-1]
        if wrong in known.keys:
            return f"unknown key {key!r}. Did you mean {known.keys[wrong] + wrong!r}?"
        return f"unknown key {key!r}: {wrong} is an option of a part, write it under its init_args."
    near = difflib.get_close_matches(wrong, known.keys, n=1, cutoff=0.7)
    near = near or difflib.get_close_matches(wrong, every, n=1, cutoff=0.5)
    return f"unknown key {wrong!r}.{did_you_mean(wrong, found) if (found := near or here) else ''}"


def _bad_value(message: str) -> str | None:
    """``model.gate is 'after_images'; use ...``: of the key inside all others, where it ends."""
    keys = list(KEY.finditer(message))
    inner = message[keys[-1].end() :] if keys else message
    value, expected = VALUE.search(inner), EXPECTED.findall(inner)
    if not (keys and value and expected):
        # a part that refused its options says so in its own words
        own = re.search(r"Errors: - (.+?) - Expected a <class 'NoneType'>", message)
        return own and own[1]
    if "Subtypes:" not in inner:
        expected = expected[:1]  # the others belong to a key around it
    words, types = [], []
    for one in dict.fromkeys(expected):
        literal = re.fullmatch(r"typing\.Literal\[(.+)\]", one)
        words += re.findall(r"'([^']*)'", literal[1]) if literal else []
        types += [] if literal else [TYPES.get(one, one)]
    if "accepted by the base class" in inner:
        types.insert(0, "keys below it ({} takes the defaults)")
    near = difflib.get_close_matches(value[1], words, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    name = ".".join(key[1] for key in keys)
    if value[1] == "auto" and name.endswith(".r"):
        hint = " For a search set model.rank: auto."
    return f"{name} is {value[1]!r}; use {_either(words + types)}.{hint}"


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def did_you_mean(word: str, known) -> str:
    """`` Did you mean 'x'?``, or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(set(known)))}."
