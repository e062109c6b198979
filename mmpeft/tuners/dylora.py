"""DyLoRA: LoRA that is trained once and deployed at any rank (arXiv 2210.07558, section 4)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from mmpeft.tuners.base import Layer, Tuner, register


@dataclass
class DyLoraConfig(PeftConfig):
    """Low-rank updates whose first b directions are of use for every b up to r.

    Each step draws one b from 1 to r for all layers, and trains the factors cut to it, scaled by
    ``lora_alpha / b``.

    Attributes:
        r: the largest rank.
        lora_alpha: what is added is scaled by ``lora_alpha / rank``.
        lora_dropout: on the layer's input.
        target_modules: as for LoRA.
        frozen: a step trains direction b alone and leaves those before it (the paper's FRZ mode).
        rank: what is deployed; ``None`` is r. See :meth:`DyLoraModel.set_rank`.
    """

    method: ClassVar[str] = "MMPEFT_DYLORA"

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    frozen: bool = False
    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        if self.r < 1:
            raise ValueError(f"DyLoraConfig: r is {self.r}; it must be 1 or more.")
        if self.rank is not None and not 1 <= self.rank <= self.r:
            raise ValueError(f"DyLoraConfig: rank is {self.rank}; it must lie in 1 to r, {self.r}.")


class DyLoraLayer(Layer):
    """A linear layer and its factors; the identity at the start, for B is 0.

    Attributes:
        rank: of the factors in use outside training.
        drawn: that of the current training step.
    """

    adapter_layer_names = ("dylora_A", "dylora_B", "dylora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DyLoraConfig):
        super().__init__(base_layer, adapter_name)
        from peft.tuners.tuners_utils import _get_in_out_features

        into, out = _get_in_out_features(base_layer)
        self.config = config
        self.rank, self.drawn = config.rank or config.r, config.r
        down, up = nn.Linear(into, config.r, bias=False), nn.Linear(config.r, out, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)  # as peft starts LoRA
        nn.init.zeros_(up.weight)
        self.dylora_A = nn.ModuleDict({adapter_name: down})
        self.dylora_B = nn.ModuleDict({adapter_name: up})
        self.dylora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(config.lora_dropout)})

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A ``(b, in)``, B ``(out, b)`` and the scale of the rank in use."""
        rank = self.drawn if self.training else self.rank
        down = self.dylora_A[self.adapter_name].weight[:rank]
        up = self.dylora_B[self.adapter_name].weight[:, :rank]
        if self.training and self.config.frozen:
            down = torch.cat([down[:-1].detach(), down[-1:]])
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], 1)
        return down, up, self.config.lora_alpha / rank

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``(B, T, in)`` to ``(B, T, out)``."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        down, up, scale = self.factors()
        x = self.dylora_dropout[self.adapter_name](self._cast_input_dtype(x, down.dtype))
        return output + self.close(F.linear(F.linear(x, down), up) * scale).to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of the deployed rank to the weight, in place."""
        weight, change = self.base_layer.weight, self._change()
        if safe_merge and not change.isfinite().all():
            raise ValueError("the adapter holds values that are not finite.")
        weight.data += change.to(weight.dtype)
        self.merged_adapters = [self.adapter_name]

    def unmerge(self) -> None:
        """Take it out again."""
        self.base_layer.weight.data -= self._change().to(self.base_layer.weight.dtype)
        self.merged_adapters = []

    @torch.no_grad()
    def _change(self) -> Tensor:
        rank = self.rank
        down = self.dylora_A[self.adapter_name].weight[:rank]
        up = self.dylora_B[self.adapter_name].weight[:, :rank]
        change = up @ down * (self.config.lora_alpha / rank)  # (out, in)
        return change if isinstance(self.base_layer, nn.Linear) else change.T  # Conv1D


class DyLoraModel(Tuner):
    """DyLoRA on a language model."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoraLayer
    merges = True

    def set_rank(self, rank: int) -> None:
        """Deploy another rank; saved with the adapter.

        Raises:
            ValueError: it is not between 1 and r.
        """
        config = self.peft_config[self.active_adapters[0]]
        if not 1 <= rank <= config.r:
            raise ValueError(f"rank {rank} must lie in 1 to r, {config.r}.")
        config.rank = rank
        for layer in self._layers():
            layer.rank = rank

    def as_lora(self, rank: int | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The adapter cut to a rank as plain LoRA: peft's config, and its state by peft's names."""
        config = self.peft_config[self.active_adapters[0]]
        rank, state, paths = rank or config.rank or config.r, {}, []
        for path, layer in self.model.named_modules():
            if isinstance(layer, DyLoraLayer):
                paths.append(path)
                down = layer.dylora_A[layer.adapter_name].weight[:rank]
                up = layer.dylora_B[layer.adapter_name].weight[:, :rank]
                state[f"base_model.model.{path}.lora_A.weight"] = down.detach().clone()
                state[f"base_model.model.{path}.lora_B.weight"] = up.detach().clone()
        conv = not isinstance(self.model.get_submodule(paths[0]).base_layer, nn.Linear)
        lora = LoraConfig(
            r=rank, lora_alpha=config.lora_alpha, target_modules=paths, fan_in_fan_out=conv,
            task_type=config.task_type,
        )  # fmt: skip
        return lora, state

    def begin_step(self, step: int, steps: int) -> None:
        """Draw the rank of this step."""
        rank = int(torch.randint(1, self.peft_config[self.active_adapters[0]].r + 1, ()))
        for layer in self._layers():
            layer.drawn = rank

    def _layers(self):
        return (module for module in self.model.modules() if isinstance(module, DyLoraLayer))


register(DyLoraConfig, DyLoraModel)
