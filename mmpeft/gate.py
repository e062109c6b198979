"""The gate: where the adapter acts.

- ``none``: everywhere, as plain PEFT does.
- ``sample``: in rows that hold an image; a row of text alone passes through the base LLM to the
  bit.
- ``image_tokens``: at image positions alone, as in Partial-LoRA (InternLM-XComposer2,
  arXiv 2401.16420, section 3.2); every word is read and written by the base.
- ``after_image``: at image positions and behind them; what stands before, a system prompt say, is
  read by the base and its KV cache stays valid whatever follows.

Where the gate is shut, what an adapter adds is an exact 0, and what it replaces is the frozen
layer's own output.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmpeft.adapters import adapted_layers

GATES = ("none", "sample", "image_tokens", "after_image")


def gate_mask(
    gate: str, mm_token_type_ids: Tensor, packed=None, attention_mask: Tensor | None = None
) -> Tensor | None:
    """Where the adapter acts, from the token types of the whole sequence, cached part included.

    Args:
        mm_token_type_ids: ``(B, T)``, 1 at image positions.
        packed: the :class:`~mmpeft.packing.PackedRow` where a row holds several samples.
        attention_mask: ``(B, 1, T, T)`` bool where branches of a row do not see each other;
            ``(B, T)`` and ``None`` say nothing about it.

    Returns:
        ``(B, 1)`` or ``(B, T)`` bool, or ``None`` for "everywhere".
    """
    if gate == "none":
        return None
    images = mm_token_type_ids == 1
    if gate == "image_tokens":
        return images
    if gate == "sample":
        return images.any(dim=1, keepdim=True) if packed is None else packed.spread(images)
    if packed is not None:
        return packed.see(images)
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask (B, 1, T, T) is {attention_mask.dtype}; gate {gate!r} asks who "
                "sees whom: pass it as bool."
            )
        return (attention_mask[:, 0] & images[:, None]).any(-1)  # (B, query, key) -> (B, T)
    return images.cumsum(1) > 0


def gate_behind(gate: str, seen: Tensor) -> Tensor | None:
    """Where the adapter acts on words behind a row that is in the KV cache.

    Args:
        seen: ``(B, 1)`` bool, rows that hold an image.

    Returns:
        ``(B, 1)`` bool, or ``None`` for "everywhere".
    """
    if gate == "none":
        return None
    return torch.zeros_like(seen) if gate == "image_tokens" else seen


class Gate:
    """Holds the mask of the current forward and applies it to the adapter's layers.

    The mask stays until the next forward, so that activation checkpointing recomputes with it.

    Attributes:
        mask: ``(B, 1)`` or ``(B, T)`` bool; ``None`` is open everywhere.
        length: T of the current forward; ``None`` is not known.
    """

    def __init__(self, language_model: nn.Module, gate: str):
        """Put the gate on every layer of a peft model.

        Raises:
            ValueError: the gate is unknown, there is no adapter, or a layer of it does not work on
                rows of tokens.
        """
        if gate not in GATES:
            raise ValueError(f"gate {gate!r} is unknown; choose one of {', '.join(GATES)}.")
        self.mask: Tensor | None = None
        self.length: int | None = None
        if gate == "none":
            return
        layers = list(adapted_layers(language_model))
        if not layers:
            raise ValueError(f"gate {gate!r} needs an adapter: add one, or use gate 'none'.")
        for name, layer in layers:
            self._put_on(name, layer, gate)

    def _put_on(self, name: str, layer: nn.Module, gate: str) -> None:
        from peft.tuners.lora import ParamWrapper

        from mmpeft.tuners.base import Layer

        if isinstance(layer, Layer):  # asks the gate itself
            layer.gate = self
        elif isinstance(layer, ParamWrapper):
            raise ValueError(
                f"gate {gate!r} cannot be on {name}: target_parameters changes the weight itself, "
                "for all rows. Use target_modules, or gate 'none'."
            )
        elif _adds_what_B_gives(layer):
            for adapter, contribution in layer.lora_B.items():
                contribution.register_forward_hook(self._close_contribution)
                contribution.gate_name = f"{name}.lora_B.{adapter}"
        else:
            layer.register_forward_hook(self._choose_output, with_kwargs=True)
            layer.gate_name = name

    def close(
        self, contribution: Tensor, name: str = "an adapter layer", tokens: int = 1
    ) -> Tensor:
        """``(B, T, D)``, what is added: an exact 0 where the gate is shut.

        ``tokens`` is the dimension of T; rows laid end to end, ``(B T, D)`` as in OPT, serve too.
        """
        if self.mask is None:
            return contribution
        return torch.where(self._where(contribution, name, tokens), contribution, 0)

    def choose(
        self, adapted: Tensor, base: Callable[[], Tensor], name: str = "an adapter layer",
        tokens: int = 1,
    ) -> Tensor:  # fmt: skip
        """``(B, T, D)``, what replaces: ``base()`` where the gate is shut."""
        if self.mask is None:
            return adapted
        where, own = self._where(adapted, name, tokens), base()
        return torch.where(where, adapted.to(own.dtype), own)

    def _where(self, output: Tensor, name: str, tokens: int = 1) -> Tensor:
        rows, positions = self.mask.shape
        shape, end_to_end = output.shape, output.dim() == 2
        length = (self.length or shape[0] // rows) if end_to_end else shape[tokens]
        whole = shape[0] == rows * length if end_to_end else shape[0] == rows
        if not whole or positions not in (1, length):
            raise ValueError(
                f"the gate was set for {rows} rows, {name} got {tuple(shape)}: call the "
                "language model through the bridge, and adapt layers that see rows of tokens alone."
            )
        if end_to_end:
            return self.mask.expand(rows, length).reshape(-1, 1)
        return self.mask.view(
            rows, *[1] * (tokens - 1), positions, *[1] * (output.dim() - tokens - 1)
        )

    def _close_contribution(self, module, inputs, output: Tensor) -> Tensor:
        return self.close(output, module.gate_name)

    def _choose_output(self, layer, args, kwargs, output):
        if layer.disable_adapters or self.mask is None:
            return output
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the gate cannot be on {layer.gate_name}, which returns a "
                f"{type(output).__name__}; adapt layers that return a tensor, or use gate 'none'."
            )
        if output.dim() > 3 and self.mask.shape[1] > 1:  # T may be any of them
            raise ValueError(
                f"the gate cannot be on {layer.gate_name}, which returns {tuple(output.shape)} and "
                "does not say which dimension counts tokens; leave it out of target_modules, or "
                "use gate 'sample' or 'none'."
            )
        return self.choose(output, lambda: layer.base_layer(*args, **kwargs), layer.gate_name)


def _adds_what_B_gives(layer: nn.Module) -> bool:
    """Plain LoRA; AdaLoRA multiplies parameters, and DoRA rescales the whole weight."""
    from peft.tuners.lora import LoraLayer

    plain = isinstance(layer, LoraLayer) and not getattr(layer, "lora_variant", {})
    return plain and isinstance(layer.lora_B, nn.ModuleDict)
