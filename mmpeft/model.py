"""The bridge: frozen vision encoder -> trained connector -> frozen LLM with a gated adapter."""

import copy
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmpeft import adapters, checkpoint
from mmpeft.adapter_scale import require_mergeable, set_scale
from mmpeft.attention import NO_MASK
from mmpeft.gate import Gate, gate_mask
from mmpeft.language_model import as_bias
from mmpeft.layout import ImageLayout, ResolutionConfig
from mmpeft.loss import summed_loss, summed_loss_in_chunks
from mmpeft.packing import PackedRow

IMAGE_INPUTS = (
    "pixel_values", "image_sizes", "image_features", "image_embeds", "qformer_input_ids",
    "qformer_attention_mask",
)  # fmt: skip


class BridgeConfig(PreTrainedConfig):
    """What a bridge is made of, by name; the frozen weights themselves are never in it.

    Attributes:
        text_config: the LLM's own config.
        language_model: ``{"name", "revision", "dtype"}`` of the LLM.
        vision_encoder: ``{"class_path", "init_args"}`` of a ``VisionEncoderConfig``.
        connector: ``{"class_path", "init_args"}`` of a ``ConnectorConfig``.
        gate: where the adapter acts, see :mod:`mmpeft.gate`.
        resolution: fields of a :class:`~mmpeft.layout.ResolutionConfig`.
        adapter_scale: of what the adapter does, 1 is as trained; see :mod:`mmpeft.adapter_scale`.
        identities: weights hash of each frozen part, checked when a checkpoint is loaded.
        processor: ``{"name", "revision"}`` of the published checkpoint whose own image processor,
            tokenizer and template an imported bridge keeps.
    """

    model_type = "mmpeft_bridge"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (the upstream contract)

    text_config: dict | PreTrainedConfig | None = None
    language_model: dict | None = None
    vision_encoder: dict | None = None
    connector: dict | None = None
    gate: str = "none"
    adapter_scale: float = 1.0
    resolution: dict | None = None
    identities: dict | None = None
    processor: dict | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            text_config = dict(self.text_config)
            self.text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        super().__post_init__(**kwargs)


class BridgeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model whose text path is the base LLM, provably where the gate is shut.

    Build one with :meth:`from_parts` or :meth:`from_hf`, load one with :meth:`from_pretrained`.
    """

    config_class = BridgeConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)
    supervised_logits = True
    logits_chunk: int | None = None  # only where projects_last()
    text_kl = None  # a mmpeft.text_kl.TextKL, while a stage with such a term trains
    merged = False  # whether the LLM's weights hold an adapter
    compiled_layers = 0  # see mmpeft.speed

    def __init__(self, config: BridgeConfig, vision_encoder, connector, language_model):
        super().__init__(config)
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.language_model = language_model
        self.generation_config = language_model.generation_config
        resolution = ResolutionConfig(**(config.resolution or {}))
        self.layout = ImageLayout(resolution, vision_encoder, connector)
        if resolution.mode != "fixed":
            connector.add_newline()
        self._gate = Gate(language_model, config.gate)
        self.post_init()

    def init_weights(self):
        """Nothing to initialise: every part arrives with its weights."""

    @classmethod
    def from_parts(
        cls, vision_encoder, connector, language_model: str, *, adapter=None, gate="none",
        dtype="float32", revision=None, resolution=None,
    ):  # fmt: skip
        """Build an untrained bridge.

        Args:
            vision_encoder: a ``VisionEncoderConfig``.
            connector: a ``ConnectorConfig``.
            language_model: name or directory of a causal LM, or ``starter:NAME``.
            adapter: a peft config such as ``LoraConfig(r=16)``; ``None`` trains no adapter.
            gate: where the adapter acts, see :mod:`mmpeft.gate`.
            dtype: floating type of the frozen LLM.
            resolution: a ``ResolutionConfig``; ``None`` shows every picture at the encoder's size.
        """
        return checkpoint.assemble(
            cls, vision_encoder, connector,
            {"name": language_model, "revision": revision, "dtype": dtype}, adapter, gate,
            resolution,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls, name: str, *, adapter=None, gate="none", dtype="float32", revision=None
    ) -> "BridgeForConditionalGeneration":
        """Build a bridge from a published LLaVA, BLIP-2 or InstructBLIP (decoder LLM) checkpoint.

        Its vision tower and LLM are the frozen parts, its projector or Q-Former the connector.

        Args:
            name: directory or hub name, in transformers' format, safetensors.
            adapter: a peft config, to go on from there; ``None`` adds none.
            gate: where the adapter acts, see :mod:`mmpeft.gate`.
            dtype: floating type of the frozen parts.
        """
        from mmpeft.hf import import_bridge

        return import_bridge(cls, name, adapter=adapter, gate=gate, dtype=dtype, revision=revision)

    # -------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        pixel_values: Tensor | None = None,  # (tiles, 3, H, W), in reading order over the batch
        image_sizes: Tensor | None = None,  # (images, 2), height and width after resizing
        attention_mask: Tensor | None = None,  # (B, T), or (B, 1, T, T)
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values=None,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        labels: Tensor | None = None,  # (B, T), -100 where nothing is to be learned
        mm_token_type_ids: Tensor | None = None,  # (B, T), 1 at image positions
        adapter_mask: Tensor | None = None,  # (B, 1) or (B, T), where the adapter acts, if known
        image_features=None,  # instead of pixel_values: as encode_images returns them
        image_embeds: Tensor | None = None,  # (image tokens, D), instead of either
        qformer_input_ids: Tensor | None = None,  # (images, Tq), for connectors that read the text
        qformer_attention_mask: Tensor | None = None,  # (images, Tq)
        packed: PackedRow | None = None,  # how the one row is made of samples
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One pass. Without ``mm_token_type_ids`` the batch is text only.

        In training mode with ``labels`` the vocabulary projection runs at supervised positions
        only and ``logits`` is ``None``, unless the attribute ``supervised_logits`` is off. A row of
        several samples comes with ``packed``, and its LLM from :func:`serve_packed_rows`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if image_embeds is None and (pixel_values is not None or image_features is not None):
            image_embeds = self.get_image_features(
                pixel_values, image_sizes, image_features, qformer_input_ids, qformer_attention_mask
            )  # (image tokens, D)
        if image_embeds is not None:
            inputs_embeds = self._place_images(inputs_embeds, image_embeds, mm_token_type_ids)
        elif mm_token_type_ids is not None and adapter_mask is None and mm_token_type_ids.any():
            raise ValueError("mm_token_type_ids marks image positions but no image was passed.")

        if adapter_mask is None:
            adapter_mask = self._adapter_mask(
                mm_token_type_ids, attention_mask, past_key_values, inputs_embeds, packed
            )
        shut = adapter_mask is not None and not adapter_mask.all()
        if shut:
            adapters.require_one_adapter(self.language_model)  # others are not gated
        self._gate.mask = adapter_mask if shut else None
        self._gate.length = inputs_embeds.shape[1]
        if packed is not None:
            attention_mask, kwargs = NO_MASK, kwargs | {"packed": packed}
        call = kwargs | {
            "inputs_embeds": inputs_embeds,
            "attention_mask": as_bias(self.language_model, attention_mask, inputs_embeds.dtype),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if labels is None:
            return self.language_model(**call, logits_to_keep=logits_to_keep)
        call = {"use_cache": False} | call
        return self._learn(call, labels, num_items_in_batch, mm_token_type_ids)

    def _learn(
        self, call: dict, labels: Tensor, num_items_in_batch, mm_token_type_ids: Tensor | None
    ) -> CausalLMOutputWithPast:
        """The LLM's outputs for ``call`` with the loss: nats per learned token.

        Their number, ``num_items_in_batch``, is counted over all accumulated micro-batches and
        processes, so that the gradient does not depend on how a batch was cut.
        """
        supervised = F.pad(labels[:, 1:] != -100, (0, 1))  # (B, T): where the next is learned
        targets = labels[:, 1:][supervised[:, :-1]]  # (n,)
        only = self.training and self.supervised_logits
        chunk = self.logits_chunk or len(targets)
        chunked = only and len(targets) > chunk
        kept = None
        if self.training and self.text_kl is not None:
            kept = self.text_kl.ask_base(self, call, supervised, mm_token_type_ids, chunked)
        with self._project_only(supervised, chunked) if only else nullcontext() as hidden:
            outputs = self.language_model(**call)
        if chunked:
            states, project = hidden[0], self.get_output_embeddings()  # (n, D)
            total = summed_loss_in_chunks(project, states, targets, chunk)
        else:
            states, project = outputs.logits[0] if only else outputs.logits[supervised], None
            total = summed_loss(states, targets)  # of (n, V)
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        outputs.loss = total / count
        if kept is not None:
            outputs.loss = outputs.loss + self.text_kl.term(*kept, states, project)
        if only:
            outputs.logits = None
        return outputs

    def encode_images(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list:
        """The frozen encoder's features, one ``(tiles, K + P, D_vision)`` tensor per image."""
        if self.layout.config.mode != "native":
            sizes = self.layout.sizes(image_sizes, len(pixel_values))
            counts = [self.layout.tiles(size) for size in sizes]
            if sum(counts) != len(pixel_values):
                raise ValueError(
                    f"image_sizes stands for {sum(counts)} tiles, pixel_values has "
                    f"{len(pixel_values)}; make both with BridgeProcessor."
                )
            return list(self.vision_encoder(pixel_values).split(counts))
        features = [None] * len(pixel_values)
        sizes = self.layout.sizes(image_sizes, len(pixel_values))
        for size in dict.fromkeys(sizes):
            own = [i for i, other in enumerate(sizes) if other == size]
            encoded = self.vision_encoder(pixel_values[own, :, : size[0], : size[1]])
            for i, image in zip(own, encoded.split(1), strict=True):
                features[i] = image
        return features

    def get_image_features(
        self, pixel_values=None, image_sizes=None, image_features=None, qformer_input_ids=None,
        qformer_attention_mask=None,
    ) -> Tensor:  # fmt: skip
        """Images, as pixels or as :meth:`encode_images` gives them, to ``(image tokens, D)``.

        The tokens of all images in reading order; the connector runs once for each grid.
        """
        if image_features is None:
            image_features = self.encode_images(pixel_values, image_sizes)
        sizes = self.layout.sizes(image_sizes, len(image_features))
        if qformer_input_ids is not None and qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        texts = {"input_ids": qformer_input_ids, "attention_mask": qformer_attention_mask}
        embeds = [None] * len(image_features)
        native = self.layout.config.mode == "native"
        for size in dict.fromkeys(sizes if native else [self.layout.size]):
            own = [i for i, other in enumerate(sizes) if not native or other == size]
            tiles = [len(image_features[i]) for i in own]
            instruction = None
            if qformer_input_ids is not None:
                each = torch.tensor(tiles, device=qformer_input_ids.device)
                instruction = {k: v[own].repeat_interleave(each, 0) for k, v in texts.items()}
            features = torch.cat([image_features[i] for i in own])  # (tiles, K + P, D_vision)
            grid = self.vision_encoder.grid_of(*size)
            tokens = self.connector(features, grid, instruction)  # (tiles, N, D)
            for i, image in zip(own, tokens.split(tiles), strict=True):
                embeds[i] = self.layout.arrange(image, sizes[i])  # (n, D)
        return torch.cat(embeds)

    def _place_images(self, inputs_embeds, image_embeds, mm_token_type_ids):
        """Put the image tokens where ``mm_token_type_ids`` is 1."""
        if mm_token_type_ids is None:
            raise ValueError("images need mm_token_type_ids; make the inputs with BridgeProcessor.")
        positions = mm_token_type_ids == 1  # (B, T)
        if int(positions.sum()) != len(image_embeds):
            raise ValueError(
                f"the images give {len(image_embeds)} image tokens, but mm_token_type_ids marks "
                f"{int(positions.sum())} positions."
            )
        return inputs_embeds.masked_scatter(
            positions.unsqueeze(-1), image_embeds.to(inputs_embeds.dtype)
        )

    def _adapter_mask(
        self, mm_token_type_ids, attention_mask, past_key_values, inputs_embeds, packed
    ):
        if self.config.gate == "none":
            return None
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "with a KV cache the gate must know which rows hold an image: pass adapter_mask "
                "(B, 1), as generate does (mmpeft.gate.gate_behind)."
            )
        if mm_token_type_ids is None:
            return inputs_embeds.new_zeros(inputs_embeds.shape[0], 1, dtype=torch.bool)
        return gate_mask(self.config.gate, mm_token_type_ids, packed, attention_mask)

    @contextmanager
    def _project_only(self, positions: Tensor, first: bool = False):
        """Inside, the LLM's vocabulary projection sees ``positions`` (B, T) only: (1, n, V).

        With ``first`` only the first of them; yields a list that then holds what it would have
        seen, ``(n, D)``.
        """
        hidden = []

        def choose(_, args):
            chosen = args[0][positions]  # (n, D)
            if first:
                hidden.append(chosen)
            return (chosen[: 1 if first else None].unsqueeze(0),)

        hook = self.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            yield hidden
        finally:
            hook.remove()

    @torch.no_grad()
    def projects_last(self) -> bool:
        """Whether the LLM's logits are its vocabulary projection, not scaled or capped after it."""
        self._gate.mask = None
        table = self.get_input_embeddings().weight
        embeds = torch.linspace(-1, 1, table.shape[1]).to(table)[None, None]  # (1, 1, D)
        with self._project_only(torch.ones(1, 1, dtype=torch.bool), True) as hidden:
            logits = self.language_model(inputs_embeds=embeds, use_cache=False).logits
        return torch.equal(logits[0], self.get_output_embeddings()(hidden[0]))

    # ------------------------------------------------------------------------------- generate

    # of a static cache: upstream would read how to mask off the bridge's config, which does not say
    # (a mask of None would let rows see their padding). The LLM makes its own.
    create_masks_for_generate = staticmethod(lambda attention_mask=None, **_: attention_mask)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """As upstream; images enter at prefill only, the gate is told at every step."""
        token_types = kwargs.get("mm_token_type_ids")  # (B, all so far)
        if token_types is not None and token_types.shape[1] < input_ids.shape[1]:
            ahead = input_ids.shape[1] - token_types.shape[1]  # words that assisted decoding tries
            kwargs["mm_token_type_ids"] = token_types = F.pad(token_types, (0, ahead))
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if token_types is None:
            token_types = input_ids.new_zeros(input_ids.shape[0], 1)
        inputs["adapter_mask"] = self._mask_of_step(token_types, inputs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, **options):
        """As upstream, but images are not cut into chunks: they are encoded by now, all at once."""
        images = any(model_kwargs.get(name) is not None for name in IMAGE_INPUTS)
        if images and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "images enter in one piece: leave out prefill_chunk_size, or pass text alone."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, **options)

    def stop_at(self, ends: list[int]) -> None:
        """End replies at these tokens, too; the LLM's own ``generation_config`` stays as it is."""
        own = self.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own] * (own is not None)
        if new := [token for token in ends if token not in own]:
            self.generation_config = copy.deepcopy(self.generation_config)
            self.generation_config.eos_token_id = [*own, *new]

    def _mask_of_step(self, token_types: Tensor, inputs: dict) -> Tensor | None:
        """The gate's mask of the tokens that ``inputs`` holds, the last of ``token_types``."""
        mask = gate_mask(self.config.gate, token_types)
        if mask is None or mask.shape[1] == 1:
            return mask
        given = inputs.get("inputs_embeds")
        given = inputs["input_ids"] if given is None else given
        return mask[:, -given.shape[1] :]

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        """As upstream, but repeats the images row by row: a row may hold none or several."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        embeds = images.pop("image_embeds")
        if embeds is None and any(
            images[k] is not None for k in ("pixel_values", "image_features")
        ):
            embeds = self.get_image_features(**images)
        if embeds is not None and expand_size > 1:
            per_row = (kwargs["mm_token_type_ids"] == 1).sum(1)
            rows = embeds.split(per_row.tolist())
            embeds = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if embeds is None else kwargs | {"image_embeds": embeds}

    # ---------------------------------------------------------------------------- the adapter

    @contextmanager
    def disable_adapter(self):
        """Inside, the LLM is the untouched base; images still enter through the connector.

        Raises:
            ValueError: the adapter was merged.
        """
        self._require_base()
        if not hasattr(self.language_model, "peft_config"):
            yield
            return
        # peft turns requires_grad on when it switches the adapter back on: put it back as it was
        before = [(p, p.requires_grad) for p in self.language_model.parameters()]
        try:
            with self.language_model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)

    def replace_adapter(self, adapter, new: bool = True) -> None:
        """Take the adapter off and put an untrained one on: a peft config, see :meth:`from_parts`.

        The gate is as it was. Without ``new``, weights follow and no start is made.

        Raises:
            ValueError: the adapter was merged.
        """
        self._require_base()
        base = self.language_model
        if hasattr(base, "peft_config"):
            base = base.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config  # else peft takes the new one for a second
        self.language_model = adapters.attach_adapter(base, adapter, new)
        self.config.adapter_scale = 1.0
        self._gate = Gate(self.language_model, self.config.gate)
        self.train(self.training)

    def _require_base(self) -> None:
        if self.merged:
            raise ValueError(
                "the adapter was merged into the language model, so its base is gone; load the "
                "checkpoint again."
            )

    def set_adapter_scale(self, scale: float) -> None:
        """Scale what the adapter does, from 0, the base, over 1, as trained; checkpoints keep it.

        Raises:
            ValueError: the scale is below 0 or not finite, or the adapter cannot be scaled.
        """
        set_scale(self.language_model, scale)
        self.config.adapter_scale = float(scale)

    def merge_adapter(self):
        """Fold the adapter into the LLM's weights, in place; only for gate ``none``.

        Raises:
            ValueError: there is a gate, or the method, its scale or the LLM does not allow it.
        """
        if self.config.gate != "none":
            raise ValueError(
                f"a gated adapter (gate {self.config.gate!r}) cannot be merged: the base must "
                "stay reachable for rows without an image. Keep it beside the LLM, or train with "
                "gate none."
            )
        if hasattr(self.language_model, "peft_config"):
            adapters.require_own_weights(self.language_model)
            require_mergeable(self.language_model)
            self.language_model = self.language_model.merge_and_unload()
            self.merged = True
        return self

    # ----------------------------------------------------------------------- a PreTrainedModel

    def train(self, mode: bool = True):
        """Frozen parts stay in eval mode; only connector and adapter switch."""
        super().train(mode)
        self.vision_encoder.eval()
        self.language_model.eval()
        own = adapters.adapter_parameters(self.language_model)
        learns = any(parameter.requires_grad for parameter in own)  # else it drops out nothing
        adapters.set_adapter_mode(self.language_model, mode and learns)
        for module in self.language_model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode  # it recomputes only in training mode; no dropout of its own
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("the base LLM's vocabulary is never touched: images need no token of it.")

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write what was trained, the config and the identities of the frozen parts.

        Options of transformers about large weights have nothing to change.

        Raises:
            ValueError: ``push_to_hub``; the adapter was merged, is not the only one, or has a scale
                that :meth:`set_adapter_scale` did not give it.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub is not carried out; upload the folder with huggingface_hub's "
                "upload_folder."
            )
        checkpoint.save(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a bridge from a folder or the hub; see :func:`mmpeft.checkpoint.load_model`."""
        for key in ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(key, None)  # the Auto classes pass these on; a bridge has no remote code
        if "torch_dtype" in kwargs:  # its name before
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if kwargs.pop("device_map", None) not in (None, "cpu"):
            raise ValueError("a bridge is loaded whole: leave out device_map, and use .to().")
        hub = {key: kwargs.pop(key) for key in checkpoint.HUB_OPTIONS if key in kwargs}
        directory = checkpoint.find_checkpoint(pretrained_model_name_or_path, **hub)
        return checkpoint.load_model(cls, directory, **kwargs)


AutoConfig.register(BridgeConfig.model_type, BridgeConfig, exist_ok=True)
AutoModelForImageTextToText.register(BridgeConfig, BridgeForConditionalGeneration, exist_ok=True)
