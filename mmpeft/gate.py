"""The gate: where the adapter acts.

``none``: everywhere, as plain PEFT does. ``sample``: only in rows that hold an image, so a row of
text alone passes through the base LLM to the bit.

The gate sits on the adapter's own contribution: where it is shut, what is added to the frozen
layer's output is an exact 0.
"""

import torch
from torch import Tensor, nn

GATES = ("none", "sample")


def gate_mask(gate: str, mm_token_type_ids: Tensor, packed=None) -> Tensor | None:
    """Where the adapter acts, from the token types of the whole sequence, cached part included.

    Args:
        mm_token_type_ids: ``(B, T)``, 1 at image positions.
        packed: the :class:`~mmpeft.packing.PackedRow` where a row holds several samples.

    Returns:
        ``(B, 1)`` bool, or ``(1, T)`` for a packed row, or ``None`` for "everywhere".
    """
    if gate == "none":
        return None
    images = mm_token_type_ids == 1
    return images.any(dim=1, keepdim=True) if packed is None else packed.spread(images)


class Gate:
    """Holds the mask of the current forward and applies it in hooks on the adapter layers.

    The mask stays until the next forward, so that activation checkpointing recomputes with it.
    """

    def __init__(self, language_model: nn.Module, gate: str):
        """Hook every LoRA layer of a peft model.

        Raises:
            ValueError: the gate is unknown, or the adapter is of a kind whose contribution does
                not come from one place (DoRA rescales the whole weight; IA3 multiplies).
        """
        if gate not in GATES:
            raise ValueError(f"gate {gate!r} is unknown; choose one of {', '.join(GATES)}.")
        self.mask: Tensor | None = None
        if gate != "none":
            for name, contribution in _adapter_contributions(language_model):
                contribution.register_forward_hook(self._close)
                contribution.gate_name = name

    def _close(self, module, inputs, output: Tensor) -> Tensor:
        """``(B, T, out)``: zero where the mask, ``(B, 1)`` or ``(B, T)``, is false."""
        if self.mask is None:
            return output
        if self.mask.shape[0] != output.shape[0]:
            raise ValueError(
                f"the gate was set for {self.mask.shape[0]} rows, {module.gate_name} got "
                f"{output.shape[0]}: call the language model through the bridge."
            )
        return torch.where(self.mask.unsqueeze(-1), output, torch.zeros_like(output))


def _adapter_contributions(language_model):
    """The modules whose output a plain LoRA layer adds to its frozen layer."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = False
    for name, layer in language_model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        variants = getattr(layer, "lora_variant", {})
        # ParamWrapper (target_parameters) adds to the weight: its lora_B is never called
        plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
        if not plain or len(variants) or len(layer.lora_embedding_B):
            raise ValueError(
                f"gate 'sample' serves plain LoRA on linear layers; {name} is "
                f"{type(layer).__name__} {list(variants) or ''}. Use gate 'none' with this adapter."
            )
        for adapter, module in layer.lora_B.items():
            found = True
            yield f"{name}.lora_B.{adapter}", module
    if not found:
        raise ValueError("gate 'sample' needs an adapter: add one, or use gate 'none'.")
