"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691), P-tuning (Liu et al. 2021, 2103.10385).

Learned embeddings stand in front of every row. They run through the frozen LLM by themselves, once
for all rows; the rows see the keys and values that come of it. Where attention depends on distances
alone this is the LLM with the prompt in front. An LLM with a table of positions gives the prompt
positions 0 to P - 1, and the text those it has without a prompt; in an LLM with attention windows
the prompt stays in sight.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.language_model import embedding_std, load_tokenizer
from mmpeft.tuners.attention_base import FrontTuner, some_tokens
from mmpeft.tuners.base import Kept, register, weights_follow
from mmpeft.tuners.options import check_options


@dataclass
class PromptConfig(PeftConfig):
    """Learned embeddings in front of every row. No identity at the start.

    Attributes:
        num_virtual_tokens: how many, P.
        init: how they begin: as tokens drawn from the ``vocabulary``, ``normal`` (random, as widely
            spread as the LLM's embeddings), or ``text``.
        init_text: what they begin as, cut or repeated to P tokens, with the LLM's own tokenizer.
        target_modules: found by itself.
    """

    method: ClassVar[str] = "MMPEFT_PROMPT"

    num_virtual_tokens: int = 20
    init: Literal["vocabulary", "normal", "text"] = "vocabulary"
    init_text: str | None = None
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, num_virtual_tokens=1)
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(
                f"PromptConfig: init is {self.init!r} and init_text {self.init_text!r}; init: text "
                "needs init_text, and nothing else reads it."
            )


class PromptModel(FrontTuner):
    """Prompt tuning on a language model; the embeddings are ``prompt_embeddings``, ``(P, D)``."""

    prefix = "prompt_"

    def source(self) -> Tensor:
        """The prompt ``(P, D)``."""
        (prompt,) = self.prompt_embeddings.values()
        return prompt

    def compute(self, source: Tensor) -> None:
        """Its keys and values."""
        self.run(source)

    @torch.no_grad()
    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        count, table = config.num_virtual_tokens, model.get_input_embeddings().weight
        if self.device.type == "meta" or config.init == "normal":
            start = torch.randn(count, table.shape[1], device=self.device)
            start *= 1 if self.device.type == "meta" else embedding_std(model)
        elif config.init == "vocabulary" or weights_follow(config):  # or wants no tokenizer
            start = some_tokens(model, count)
        else:
            start = _words(model, config.init_text, count)
        self.prompt_embeddings = nn.ParameterDict({adapter_name: nn.Parameter(start.float())})


def _words(model, text: str, count: int) -> Tensor:
    """Embeddings ``(count, D)`` of a text.

    Raises:
        ValueError: the LLM's tokenizer cannot be had, or makes no tokens of the text.
    """
    revision = getattr(model.config, "_commit_hash", None)
    try:
        tokenizer = load_tokenizer(model.name_or_path, revision)
    except ValueError as error:
        raise ValueError(
            "PromptConfig: init: text needs the LLM's own tokenizer; set init: vocabulary, or "
            f"mend this: {error}"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"PromptConfig: init_text {text!r} has no tokens in {model.name_or_path}; choose "
            "another text."
        )
    ids = (ids * -(-count // len(ids)))[:count]
    embed = model.get_input_embeddings()
    return embed(torch.tensor(ids, device=embed.weight.device))


@dataclass
class PTuningConfig(PeftConfig):
    """Prompt tuning whose embeddings a small network makes; it starts at random, as in peft.

    Attributes:
        num_virtual_tokens: how many, P.
        encoder: ``lstm``, in both directions, with two linear layers behind (the paper's), or
            ``mlp``, of three linear layers.
        hidden_size: of the network; ``None`` is the size of the LLM's embeddings.
        num_layers, dropout: of the LSTM; the latter acts between its layers.
        target_modules: found by itself.
    """

    method: ClassVar[str] = "MMPEFT_P_TUNING"

    num_virtual_tokens: int = 20
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden_size: int | None = None
    num_layers: int = 2
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, num_virtual_tokens=1, hidden_size=1, num_layers=1)
        if self.encoder == "mlp" and (self.num_layers, self.dropout) != (2, 0.0):
            raise ValueError(
                f"PTuningConfig: num_layers {self.num_layers} and dropout {self.dropout} are of "
                "the lstm encoder; leave them out for mlp."
            )


class PromptEncoder(nn.Module):
    """Makes the prompt ``(P, D)`` of embeddings of its own."""

    def __init__(self, config: PTuningConfig, width: int, device):
        super().__init__()
        hidden = config.hidden_size or width
        self.tokens = nn.Parameter(torch.randn(config.num_virtual_tokens, width, device=device))
        self.lstm, sizes = None, (width, hidden, hidden, width)
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(
                width, hidden, config.num_layers, dropout=config.dropout, bidirectional=True,
                device=device,
            )  # fmt: skip
            sizes = (2 * hidden, 2 * hidden, width)
        linear = [nn.Linear(into, out, device=device) for into, out in pairwise(sizes)]
        between = [part for layer in linear for part in (layer, nn.ReLU())]
        self.mlp = nn.Sequential(*between[:-1])

    def forward(self) -> Tensor:
        tokens = self.tokens if self.lstm is None else self.lstm(self.tokens)[0]
        return self.mlp(tokens)


class PTuningModel(FrontTuner):
    """P-tuning on a language model."""

    prefix = "prompt_"

    def source(self) -> Tensor:
        """The prompt ``(P, D)``."""
        (encoder,) = self.prompt_encoder.values()
        return self._encoded.get(encoder.parameters(), encoder)

    def compute(self, source: Tensor) -> None:
        """Its keys and values."""
        self.run(source)

    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        width = model.get_input_embeddings().weight.shape[1]
        encoder, self._encoded = PromptEncoder(config, width, self.device), Kept()
        self.prompt_encoder = nn.ModuleDict({adapter_name: encoder})


register(PromptConfig, PromptModel)
register(PTuningConfig, PTuningModel)
