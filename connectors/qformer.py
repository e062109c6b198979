"""The Q-Former: learned queries that read the features through a BERT with cross-attention.

Plain as in BLIP-2 (arXiv 2301.12597, section 3.1), fed the instruction as in InstructBLIP (arXiv
2305.06500, section 2.3), frozen behind one trained linear layer as in MiniGPT-4 (arXiv 2304.10592,
section 3), or frozen with LoRA. The modules are transformers' own, under upstream's names.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmpeft.connector import Connector, ConnectorConfig

_EPS = 1e-12  # of every LayerNorm, in BERT and in every published Q-Former


@dataclass
class QFormerConnectorConfig(ConnectorConfig):
    """N = num_query_tokens, for any grid and any prefix tokens.

    With H = hidden_size, I = intermediate_size, L layers of which C = ceil(L / frequency) have
    cross-attention, and F = 2 * H * I + I + 3 * H for a feed-forward block: N * H + 2 * H
    + L * (4 * H^2 + 6 * H + F) + C * (2 * H^2 + 2 * D_vision * H + 6 * H) + (H + 1) * D_llm
    parameters, and (vocab_size + max_position_embeddings) * H + (L - 1) * F more with
    ``instruction``: the last layer's text is never read, so its feed-forward block does not exist.

    ``freeze`` trains the last linear layer alone, (H + 1) * D_llm. ``lora_r`` trains that and
    r * (4 * L * H + C * (3 * H + D_vision)) in LoRA.

    A Q-Former that is neither frozen nor carries LoRA trains whole, and ``pretrained`` or
    ``text_encoder`` are only where a new bridge starts; loaded bridges do not need them.

    Attributes:
        num_query_tokens: learned queries, and tokens out.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in BERT-base.
        cross_attention_frequency: every so many layers, from the first on, attend to the features.
        instruction: feed the instruction in; it and the queries attend to each other.
        vocab_size, max_position_embeddings: of the instruction (30523 in InstructBLIP).
        text_encoder: name or directory of a BERT whose first layers, and embeddings if
            ``instruction``, the Q-Former starts from, queries and text alike; cross-attention
            starts afresh.
        pretrained: name or directory of a BLIP-2 or InstructBLIP model (safetensors) whose Q-Former
            and queries it starts from. It was trained on features as they come: set
            ``standardize: false``. The last linear layer always starts afresh.
        freeze: keep the pretrained Q-Former and its queries as they are.
        lora_r: rank of LoRA on query and value of all attention of the pretrained Q-Former, which
            itself stays frozen; 0 is none.
        lora_alpha: LoRA's scale is lora_alpha / lora_r.
        tokenizer: name or directory of the instruction's tokenizer; ``None`` is that of
            ``text_encoder``, or the folder ``qformer_tokenizer`` of ``pretrained``.
    """

    num_query_tokens: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    instruction: bool = False
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    text_encoder: str | None = None
    pretrained: str | None = None
    freeze: bool = False
    lora_r: int = 0
    lora_alpha: int = 16
    tokenizer: str | None = None

    def __post_init__(self):
        for name in ("num_query_tokens", "cross_attention_frequency", *_SIZES):
            if getattr(self, name) < 1:
                raise ValueError(f"qformer: {name} is {getattr(self, name)}; at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"qformer: num_attention_heads {self.num_attention_heads} does not divide "
                f"hidden_size {self.hidden_size}."
            )
        if self.pretrained and self.text_encoder:
            raise ValueError("qformer: set pretrained or text_encoder, not both: each is a start.")
        if (self.freeze or self.lora_r) and not self.pretrained:
            option = "freeze" if self.freeze else "lora_r"
            raise ValueError(
                f"qformer: {option} keeps a Q-Former as it is, which only makes sense for one that "
                "has learned; set pretrained."
            )
        if self.pretrained and self.standardize:
            raise ValueError(
                "qformer: a pretrained Q-Former expects features as the encoder gives them; set "
                "standardize: false."
            )
        if self.instruction and not (self.tokenizer or self.text_encoder or self.pretrained):
            raise ValueError(
                "qformer: instruction needs a tokenizer; set text_encoder, pretrained or tokenizer."
            )

    @property
    def freezes(self) -> bool:
        return self.freeze or self.lora_r > 0

    def build(self, vision_size, llm_size):
        return QFormerConnector(self, vision_size, llm_size)


class QFormerConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.num_query_tokens, config.hidden_size).normal_(std=0.02)
        )
        self.qformer = _qformer(config, vision_size)
        self.language_projection = nn.Linear(config.hidden_size, llm_size)
        nn.init.normal_(self.language_projection.weight, std=0.02)
        nn.init.zeros_(self.language_projection.bias)
        if config.instruction:
            self.instruction_tokenizer = _tokenizer(config)
        if config.freezes:
            if not self.query_tokens.is_meta:
                self._read_pretrained()
            own = [f"qformer.{name}" for name, _ in self.qformer.named_parameters()]
            if config.lora_r:
                _inject_lora(self.qformer, config)
                own = [
                    f"qformer.{n}" for n, _ in self.qformer.named_parameters() if "lora_" not in n
                ]
            self.frozen, self.frozen_source = frozenset(["query_tokens", *own]), config.pretrained
            self.requires_grad_(True)

    def initialize(self):
        if self.query_tokens.is_meta or self.config.freezes:
            return
        if self.config.pretrained:
            self._read_pretrained()
        elif self.config.text_encoder:
            self._read_text_encoder()

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        return self.config.num_query_tokens

    def output_grid(self, grid):
        return None

    def project(self, features, grid, instruction=None):
        queries = self.query_tokens.expand(len(features), -1, -1)  # (B, N, H)
        text = self._text(queries, instruction) if self.config.instruction else {}
        states = self.qformer(
            query_embeds=queries, encoder_hidden_states=features, **text
        ).last_hidden_state  # (B, N + T, H)
        return self.language_projection(states[:, : queries.shape[1]])

    def _text(self, queries, instruction):
        """The Q-Former's further arguments for instructions of T tokens, or for none."""
        if instruction is None:
            return {"input_ids": None}
        input_ids, attention_mask = instruction["input_ids"], instruction["attention_mask"]
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"the instruction has {input_ids.shape[1]} tokens; the Q-Former takes {limit}. "
                "Shorten it."
            )
        if len(input_ids) != len(queries):
            raise ValueError(f"{len(input_ids)} instructions for {len(queries)} images.")
        seen = attention_mask.new_ones(queries.shape[:2])
        return {"input_ids": input_ids, "attention_mask": torch.cat([seen, attention_mask], 1)}

    def _read_pretrained(self):
        """Q-Former and queries of a BLIP-2 or InstructBLIP model; every tensor must be there."""
        source = self.config.pretrained
        theirs = _read_config(source, "pretrained", ("blip-2", "instructblip"))
        if theirs.qformer_config.encoder_hidden_size != self.vision_size:
            raise ValueError(
                f"pretrained: dimensions cannot meet: the Q-Former of {source} reads "
                f"{theirs.qformer_config.encoder_hidden_size} channels, the vision encoder gives "
                f"{self.vision_size}; use the encoder it was trained with."
            )
        wanted = {"num_query_tokens": self.config.num_query_tokens}
        self._require_same("pretrained", source, theirs, wanted)
        wanted = {"cross_attention_frequency": self.config.cross_attention_frequency}
        wanted |= self._bert_options()
        self._require_same("pretrained", source, theirs.qformer_config, wanted)
        names = {"query_tokens": ["query_tokens"]}
        for name in self.qformer.state_dict():
            # BLIP-2 keeps this norm beside the embeddings, InstructBLIP in them
            tail = name.removeprefix("embeddings.") if "layernorm" in name else name
            names[f"qformer.{name}"] = [f"qformer.{tail}", f"qformer.embeddings.{tail}"]
        self._load(source, "pretrained", names)

    def _read_text_encoder(self):
        """BERT's layers for queries and text alike, and its embeddings if there is text."""
        source = self.config.text_encoder
        theirs = _read_config(source, "text_encoder", ("bert",))
        if theirs.num_hidden_layers < self.config.num_hidden_layers:
            raise ValueError(
                f"text_encoder: {source} has {theirs.num_hidden_layers} layers, fewer than "
                f"num_hidden_layers {self.config.num_hidden_layers}."
            )
        wanted = self._bert_options()
        del wanted["num_hidden_layers"]
        self._require_same("text_encoder", source, theirs, wanted)
        names = {}
        for name in self.qformer.state_dict():
            if "crossattention" in name:
                continue
            bert = name.replace("_query.", ".").replace("attention.attention", "attention.self")
            if "layernorm" in name:
                bert = f"embeddings.LayerNorm.{name.rpartition('.')[2]}"
            # checkpoints of the first BERTs call a norm's weight and bias gamma and beta
            old = bert.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            names[f"qformer.{name}"] = [bert, f"bert.{bert}", old, f"bert.{old}"]
        self._load(source, "text_encoder", names)

    def _bert_options(self) -> dict:
        """What the BERT in a Q-Former must agree on with the weights it is given."""
        wanted = {name: getattr(self.config, name) for name in _SIZES}
        if self.config.instruction:
            for name in ("vocab_size", "max_position_embeddings"):
                wanted[name] = getattr(self.config, name)
        return wanted | {"hidden_act": "gelu", "layer_norm_eps": _EPS}

    def _require_same(self, option, source, theirs, wanted):
        for name, ours in wanted.items():
            if (found := getattr(theirs, name)) != ours:
                remedy = f"set {name}: {found}" if hasattr(self.config, name) else "it cannot serve"
                raise ValueError(f"{option}: {source} has {name} {found}, not {ours}; {remedy}.")

    @torch.no_grad()
    def _load(self, source, option, names):
        """Fill the entries of our state dict from the first of their names that is in the files."""
        state, weights = self.state_dict(), _Weights(source, option)
        for name, candidates in names.items():
            found = next((c for c in candidates if c in weights), None)
            if found is None:
                hint = ""
                if option == "pretrained" and self.config.instruction:
                    hint = " (instruction needs an InstructBLIP model)"
                raise ValueError(f"{option}: {source} has no weight {candidates[0]}{hint}.")
            tensor = weights[found]
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{option}: {found} of {source} has shape {tuple(tensor.shape)}, not "
                    f"{tuple(state[name].shape)}."
                )
            state[name].copy_(tensor)


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _qformer(config, vision_size):
    """transformers' Q-Former, fresh, without the parts that nothing reads."""
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerConfig, Blip2QFormerModel
    from transformers.models.instructblip.modeling_instructblip import (
        InstructBlipQFormerConfig,
        InstructBlipQFormerModel,
    )

    options = {name: getattr(config, name) for name in _SIZES} | {
        "cross_attention_frequency": config.cross_attention_frequency,
        "encoder_hidden_size": vision_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": _EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if not config.instruction:
        return Blip2QFormerModel._from_config(
            Blip2QFormerConfig(**options), attn_implementation="sdpa"
        )
    qformer = InstructBlipQFormerModel._from_config(
        InstructBlipQFormerConfig(**options), attn_implementation="sdpa"
    )
    last = qformer.encoder.layer[-1]
    last.intermediate, last.output = nn.Identity(), _Skip()
    return qformer


class _Skip(nn.Module):
    """In place of a feed-forward block's second half: the block gives back what went in."""

    def forward(self, hidden_states, input_tensor):
        return input_tensor


def _inject_lora(qformer, config):
    from peft import LoraConfig, inject_adapter_in_model

    # BERT's pair in peft: query and value, of self- and cross-attention
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha,
        target_modules=r"encoder\.layer\.\d+\.(cross)?attention\.attention\.(query|value)",
    )  # fmt: skip
    inject_adapter_in_model(lora, qformer)


def _tokenizer(config) -> dict:
    limit = {"model_max_length": config.max_position_embeddings}
    if name := config.tokenizer or config.text_encoder:
        return {"pretrained_model_name_or_path": name, **limit}
    return {
        "pretrained_model_name_or_path": config.pretrained, "subfolder": "qformer_tokenizer",
        **limit,
    }  # fmt: skip


def _read_config(source, option, model_types):
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{option} {source!r} is no local model directory and cannot be had from the hub "
            f"({reason})"
        ) from error
    if config.model_type not in model_types:
        raise ValueError(
            f"{option}: {source} is a {config.model_type} model; it must be "
            f"{' or '.join(model_types)}."
        )
    return config


def _find(source, name) -> str | None:
    """Path of a file of a local folder or, downloaded, of the hub; ``None`` if it is not there."""
    from transformers.utils import cached_file

    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


class _Weights:
    """The tensors of a model's safetensors files, by name; only the shards asked for are opened."""

    def __init__(self, source, option):
        self.source, self.option, self.files = source, option, {}
        if index := _find(source, "model.safetensors.index.json"):
            try:
                self.shards = dict(json.loads(Path(index).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{option}: {index} is no index of shards; fetch it again."
                ) from error
        else:
            self.shards = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _open(self, shard):
        from safetensors import SafetensorError, safe_open

        if shard not in self.files:
            path = _find(self.source, shard)
            if path is None:
                raise ValueError(
                    f"{self.option}: {self.source} misses {shard}; only safetensors are read."
                )
            try:
                self.files[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.option}: {path} is damaged, or a pointer instead of the file "
                    f"({error}); fetch it again."
                ) from error
        return self.files[shard]

    def __contains__(self, name):
        return name in self.shards

    def __getitem__(self, name):
        file = self._open(self.shards[name])
        if name not in set(file.keys()):
            raise ValueError(
                f"{self.option}: {self.shards[name]} of {self.source} misses {name}, which its "
                "index places there; fetch the model again."
            )
        return file.get_tensor(name)
