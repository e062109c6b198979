"""YAML as recipes are read, but nothing in it is lost without a word."""

from pathlib import Path

import yaml


def read_yaml(path, what: str) -> dict:
    """A YAML file as recipes are read: ``1e-3`` is a number.

    Args:
        what: what an error calls the file, where it does not exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, no mapping, or a key twice.
    """
    from jsonargparse import get_loader

    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist.")
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = get_loader("yaml")(text)
    except Exception as error:  # of whichever YAML library is behind it
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no keys.")
    refuse_repeated_keys(text, path)
    return found


def refuse_repeated_keys(text: str, path) -> None:
    """Of a key that is given twice YAML would keep the last. Raises ``ValueError``."""
    try:
        nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    except yaml.YAMLError:
        return  # the parser says so
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        nodes += [value for _, value in node.value]
        seen = set()
        for key, _ in node.value:
            # 2 and "2" are one key wherever keys become text
            if isinstance(key.value, str) and key.value != "<<" and key.value in seen:
                raise ValueError(
                    f"{path} line {key.start_mark.line + 1}: key {key.value!r} is there twice in "
                    "one mapping; leave one."
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
