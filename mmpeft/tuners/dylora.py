"""DyLoRA: LoRA that is trained once and deployed at any rank (arXiv 2210.07558, section 4)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from mmpeft.tuners.base import Tuner, register
from mmpeft.tuners.merging import MergingLayer
from mmpeft.tuners.options import check_options


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
        frozen: the loss of a step reaches direction b alone, not those before it (the paper's FRZ
            mode; an optimizer with momentum still moves these a little).
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
        check_options(self, r=1)
        if self.rank is not None and not 1 <= self.rank <= self.r:
            raise ValueError(f"DyLoraConfig: rank is {self.rank}; it must lie in 1 to r, {self.r}.")


class DyLoraLayer(MergingLayer):
    """A linear layer and its factors; the identity at the start, for B is 0.

    Which rank is in use is asked in the forward, by ``training``: a bridge's ``train()`` switches
    the adapter back on by attribute, after a step's rank was drawn.

    Attributes:
        rank: of the factors in use outside training steps.
        drawn: that of the current training step; ``None`` before one is drawn.
    """

    adapter_layer_names = ("dylora_A", "dylora_B", "dylora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DyLoraConfig):
        super().__init__(base_layer, adapter_name)
        into, out = _get_in_out_features(base_layer)
        self.config, self.rank, self.drawn = config, config.rank or config.r, None
        down, up = nn.Linear(into, config.r, bias=False), nn.Linear(config.r, out, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)  # as peft starts LoRA
        nn.init.zeros_(up.weight)
        self.dylora_A = nn.ModuleDict({adapter_name: down})
        self.dylora_B = nn.ModuleDict({adapter_name: up})
        self.dylora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(config.lora_dropout)})
        # tensors, since compiled code is made anew for every other number: (r,) each, the scale
        # of every direction in use and 0 where it is cut
        self.register_buffer("dylora_deployed", torch.empty(config.r), persistent=False)
        self.register_buffer("dylora_step", torch.empty(config.r), persistent=False)
        self.deploy(self.rank)

    def deploy(self, rank: int) -> None:
        """Use this rank outside of training steps, and in them until one is drawn."""
        self.rank = rank
        self._cut(self.dylora_deployed, rank)
        if self.drawn is None:
            self._cut(self.dylora_step, rank)

    def draw(self, rank: int) -> None:
        """Use this rank in training."""
        self.drawn = rank
        self._cut(self.dylora_step, rank)

    def _cut(self, scales: Tensor, rank: int) -> None:
        scales.zero_()[:rank] = self.config.lora_alpha / rank

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``(B, T, in)`` to ``(B, T, out)``."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        down, up = self._factors()
        cut = self.dylora_step if self.training else self.dylora_deployed
        cut = cut.to(down.dtype)
        if self.training and self.config.frozen:
            last = (cut != 0) & ~F.pad(cut[1:] != 0, (0, 1))  # the highest rank in use
            down = torch.where(last[:, None], down, down.detach())
            up = torch.where(last, up, up.detach())
        x = self.dylora_dropout[self.adapter_name](self._cast_input_dtype(x, down.dtype))
        added = F.linear(F.linear(x, down) * cut, up)
        return output + self.close(added).to(output.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A ``(r, in)`` and B ``(out, r)``."""
        name = self.adapter_name
        return self.dylora_A[name].weight, self.dylora_B[name].weight

    def adapted_parameters(self) -> dict[str, Tensor]:
        """The weight with the update of the deployed rank."""
        (down, up), weight = self._factors(), self.base_layer.weight
        down, up = down[: self.rank], up[:, : self.rank]
        change = up @ down * (self.config.lora_alpha / self.rank)  # (out, in)
        change = change if isinstance(self.base_layer, nn.Linear) else change.T  # Conv1D
        return {"weight": weight + change.to(weight.dtype)}


class DyLoraModel(Tuner):
    """DyLoRA on a language model."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoraLayer
    merges = True

    def set_rank(self, rank: int) -> None:
        """Deploy another rank; saved with the adapter.

        Raises:
            ValueError: it is not between 1 and r, or the adapter is merged.
        """
        self._known(rank)
        if any(layer.merged for layer in self._layers()):
            raise ValueError("the adapter is merged; unmerge it before another rank is deployed.")
        self._config.rank = rank
        for layer in self._layers():
            layer.deploy(rank)

    def as_lora(self, rank: int | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The adapter cut to a rank as plain LoRA: peft's config, and its state by peft's names.

        At the scale that it has, see :mod:`mmpeft.adapter_scale`.

        Raises:
            ValueError: it is not between 1 and r.
        """
        config, state, paths = self._config, {}, []
        rank = (config.rank or config.r) if rank is None else self._known(rank)
        for path, layer in self.model.named_modules():
            if isinstance(layer, DyLoraLayer):
                paths.append(path)
                down, up = layer._factors()
                state[f"base_model.model.{path}.lora_A.weight"] = down[:rank].detach().clone()
                up = layer.dial * up[:, :rank].detach()
                state[f"base_model.model.{path}.lora_B.weight"] = up
        conv = not isinstance(self.model.get_submodule(paths[0]).base_layer, nn.Linear)
        lora = LoraConfig(
            r=rank, lora_alpha=config.lora_alpha, target_modules=paths, fan_in_fan_out=conv,
            task_type=config.task_type,
        )  # fmt: skip
        return lora, state

    def begin_step(self, step: int, steps: int) -> None:
        """Draw the rank of this step."""
        rank = int(torch.randint(1, self._config.r + 1, ()))
        for layer in self._layers():
            layer.draw(rank)

    @property
    def _config(self) -> DyLoraConfig:
        return self.peft_config[self.active_adapters[0]]

    def _known(self, rank: int) -> int:
        if not 1 <= rank <= self._config.r:
            raise ValueError(f"rank {rank} must lie in 1 to r, {self._config.r}.")
        return rank

    def _layers(self):
        return (module for module in self.model.modules() if isinstance(module, DyLoraLayer))


register(DyLoraConfig, DyLoraModel)
