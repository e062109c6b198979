"""Levers of ``speed:`` in a recipe that act on the model, each with a reason where it stays off."""

import math
import sys
from contextlib import nullcontext

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft.attention import serve_packed_rows
from mmpeft.language_model import attention_window, context_length

# compiling takes about a minute, which so many steps win back
STEPS_WORTH_COMPILING = 200


def can_pack(model, max_length: int | None) -> bool:
    """Whether samples may share a row; prepares the LLM for it, or says why not.

    ``max_length`` is the longest sample in tokens; ``None`` is the LLM's context.
    """
    window = attention_window(model.language_model.config)
    longest = max_length or context_length(model.language_model.config) or math.inf
    if window is not None and longest > window:
        why_not = (
            f"samples may be longer than the window of {window} tokens that this LLM attends to; "
            "lower data.max_length"
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


def compile_layers(model, mode: str, steps: int, device="cpu") -> bool:
    """``torch.compile`` the LLM's layers, one by one, for rows of any length.

    They take part where :func:`compiled` says so.

    Args:
        mode: ``on``, ``off`` or ``auto``: on where ``steps`` are enough to win back its cost.

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
