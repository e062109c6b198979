"""Levers of ``speed:`` in a recipe that act on the model, each with a reason where it stays off."""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft.attention import serve_packed_rows
from mmpeft.language_model import attention_window, context_length, rope_limit

# compiling takes about a minute, which so many steps win back
STEPS_WORTH_COMPILING = 200


@dataclass
class SpeedConfig:
    """Work that need not be done. Each lever is on by default and switched off by its field.

    All are exact up to rounding; the features of a float32 encoder are rounded on purpose, see
    ``feature_cache_dtype``.

    Attributes:
        feature_cache: keep the frozen encoder's features on disk: on, off, or auto (on where
            reading them is measured to be quicker than encoding).
        feature_cache_dir: folder of the features, shared by runs; null is the user's cache.
        feature_cache_gb: most that the folder may hold, in 10^9 bytes.
        feature_cache_dtype: what features of a float32 encoder are rounded to under on and auto,
            kept or not; float32 takes twice the room and changes nothing. Those of a 16-bit encoder
            stay as they are.
        packing: samples of a batch in one row without padding, none sees another.
        pad_to_multiple_of: length of rows is rounded up, so that few different shapes occur, whose
            kernels are prepared once; 1 does not.
        supervised_logits: the vocabulary projection and the loss at learned positions only.
        logits_chunk: learned positions whose logits exist at a time, for large vocabularies; null
            is all at once.
        compile: torch.compile of the LLM's layers: on, off, or auto (on in stages long enough to
            win back the minute it takes, where a compiler is found).
    """

    feature_cache: Literal["auto", "on", "off"] | bool = "auto"
    feature_cache_dir: str | None = None
    feature_cache_gb: float = 20.0
    feature_cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    packing: bool = True
    pad_to_multiple_of: int = 32
    supervised_logits: bool = True
    logits_chunk: int | None = 2048
    compile: Literal["auto", "on", "off"] | bool = "auto"

    def __post_init__(self):
        for name in ("feature_cache", "compile"):  # YAML reads a bare on or off as true or false
            if isinstance(value := getattr(self, name), bool):
                setattr(self, name, "on" if value else "off")
        for name in ("pad_to_multiple_of", "logits_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"speed.{name} is {value}; it must be 1 or more.")
        if self.feature_cache_gb <= 0:
            raise ValueError(
                f"speed.feature_cache_gb is {self.feature_cache_gb}; it must be above 0. Set "
                "speed.feature_cache: off to keep no features."
            )


def can_pack(model, max_length: int | None) -> bool:
    """Whether samples may share a row; prepares the LLM for it, or says why not.

    ``max_length`` is the longest sample in tokens; ``None`` is the LLM's context.
    """
    config = model.language_model.config
    window, limit = attention_window(config), rope_limit(config)
    longest = max_length or context_length(config) or math.inf
    if window is not None and longest > window:
        why_not = (
            f"samples may be longer than the window of {window} tokens that this LLM attends to; "
            "lower data.max_length"
        )
    elif limit is not None and longest > limit:
        why_not = (
            f"a sample of more than {limit} tokens changes the rotary positions of all that share "
            "its row; lower data.max_length"
        )
    else:
        why_not = serve_packed_rows(model)
    if why_not is not None:
        print(f"packing off: {why_not}.", file=sys.stderr)
    return why_not is None


def choose_logits(model, speed) -> None:
    """Set which logits training makes, or say why they cannot be made in chunks."""
    model.supervised_logits, model.logits_chunk = speed.supervised_logits, speed.logits_chunk
    if model.logits_chunk is not None and not model.projects_last():
        model.logits_chunk = None
        print("logits_chunk off: this LLM changes its logits after projecting.", file=sys.stderr)


def compile_layers(
    model, mode: str, steps: int, device="cpu", packed_checkpointing: bool = False
) -> bool:
    """``torch.compile`` the LLM's layers, one by one, for rows of any length.

    They take part where :func:`compiled` says so.

    Args:
        mode: ``on``, ``off`` or ``auto``: on where ``steps`` are enough to win back its cost.
        packed_checkpointing: rows are packed and activations checkpointed. Attention over packed
            rows is not compiled, and with it torch leaves out a whole layer that is checkpointed;
            a line says so.

    Raises:
        ValueError: ``on``, but it cannot be done.
    """
    if mode == "off" or (mode == "auto" and steps < STEPS_WORTH_COMPILING):
        return False
    modules = model.language_model.modules()
    layers = [layer for layer in modules if isinstance(layer, GradientCheckpointingLayer)]
    problem = _compiler_problem(device) if layers else "this LLM's layers are not marked as such."
    if problem is not None:
        if mode == "on":
            raise ValueError(
                f"speed.compile is on, but torch cannot compile here: {problem} Install a C++ "
                "compiler, or set speed.compile: off."
            )
        print(f"compile off: torch cannot compile here: {problem}", file=sys.stderr)
        return False
    if packed_checkpointing:
        print(
            "compile: of packed rows, layers with activation checkpointing are not compiled.",
            file=sys.stderr,
        )
    if not model.compiled_layers:
        for layer in layers:
            layer.compile(dynamic=True)
        model.compiled_layers = len(layers)
    return True


def compiled(model, on: bool):
    """A context: inside, compiled layers run compiled, or as if they were not."""
    if not model.compiled_layers:
        return nullcontext()
    return torch.compiler.set_stance("default" if on else "force_eager")


def _compiler_problem(device) -> str | None:
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, missing headers, an unknown platform
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
