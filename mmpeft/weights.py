"""Safetensors files of a model directory or hub name, and what is wrong with them in one line."""

import json
from contextlib import contextmanager
from pathlib import Path


def first_line(error: Exception) -> str:
    """What a library says is wrong, without what it adds below."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weight_map(index: str | Path) -> dict[str, str]:
    """Tensor names to shards, from a ``model.safetensors.index.json``.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return dict(json.loads(Path(index).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards; fetch it again.") from error


def weight_files(name: str, revision: str | None = None) -> list[str]:
    """The safetensors files of a directory or hub name, one or all shards.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    def find(file):
        return cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    if single := find("model.safetensors"):
        return [single]
    index = find("model.safetensors.index.json")
    if index is None:
        raise ValueError(
            f"{name} has no model.safetensors; only safetensors are read. {NO_SAFETENSORS}"
        )
    weight_map(index)
    try:
        files, _ = get_checkpoint_shard_files(name, index, revision=revision)
    except OSError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{name} lacks the shard {Path(file).name}; download it again.")
    return files


NO_SAFETENSORS = (
    "Give a revision that has them (on the hub often an open pull request, refs/pr/N), or convert "
    "the pickled weights where you trust them."
)


@contextmanager
def readable(name: str):
    """Inside, weights come from safetensors or not at all, and what is wrong is one line.

    Libraries that fall back on pickles (timm, open_clip, peft) are kept from it.

    Raises:
        ValueError: a safetensors file is cut short or is none, or weights are pickled.
    """
    import torch
    from safetensors import SafetensorError

    def refuse(*args, **kwargs):
        raise ValueError(
            f"{name} holds pickled weights only, and a pickle can run code when it is read. "
            f"{NO_SAFETENSORS}"
        )

    torch_load, torch.load = torch.load, refuse
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a safetensors file is damaged, or a pointer instead of the file, or a pickle "
            f"by that name ({first_line(error)}); fetch it again."
        ) from error
    finally:
        torch.load = torch_load
