"""Published checkpoints become bridges: LLaVA, BLIP-2 and InstructBLIP in transformers' format.

The vision tower and the LLM stay where they are and are named by the checkpoint's directory, like
the frozen parts of any bridge; what is between them is copied into a connector. The result takes an
adapter, trains, saves and loads as every other bridge.
"""

import torch
from PIL import Image

from mmpeft import checkpoint, vlm
from mmpeft.weights import first_line

# BLIP-2 and InstructBLIP have no chat format: words follow each other as they are, and what the
# assistant wrote ends with END, the token their LLM was trained to stop at.
BLIP_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + END }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
# Templates of VLMs read lists of parts; text suites give strings.
AS_PARTS = (
    "{% set chat = namespace(messages=[]) %}{% for message in messages %}"
    "{% if message['content'] is string %}{% set chat.messages = chat.messages + "
    "[{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}] %}"
    "{% else %}{% set chat.messages = chat.messages + [message] %}{% endif %}"
    "{% endfor %}{% set messages = chat.messages %}"
)


def import_bridge(cls, name: str, *, dtype="float32", adapter=None, gate="none", revision=None):
    """Build a bridge of class ``cls`` from a checkpoint directory or hub name.

    Raises:
        ValueError: a type or variant that cannot be imported, or weights that are missing.
    """
    from mmpeft.encoder import TransformersEncoderConfig
    from mmpeft.starter import resolve

    directory = resolve(name)
    name = checkpoint.absolute(name)
    config = vlm.load_config(directory, revision)
    if config.vision_config.model_type == "pixtral":
        raise ValueError(
            f"{name} has a Pixtral encoder, whose rows of patches have marks between them; it "
            "cannot be imported."
        )
    tensors = vlm.read_connector(directory, config, revision=revision)
    if config.model_type == "llava":
        connector, state = _mlp(name, config, tensors)
        tokens = {"default": "patch", "full": "all"}[config.vision_feature_select_strategy]
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
    else:
        connector, state = _qformer(name, config, tensors)
        tokens, layers = "all", None
    encoder = TransformersEncoderConfig(
        name, layers=layers, dtype=dtype, tokens=tokens, revision=revision
    )
    model = checkpoint.assemble(
        cls, encoder, connector, {"name": name, "revision": revision, "dtype": dtype}, adapter, gate
    )
    model.config.processor = {"name": name, "revision": revision}
    _fill(name, model.connector, state)
    _require_class_token(name, model, config)
    return model


def _mlp(name, config, tensors):
    """LLaVA's projector: config of the connector, and its weights by our names."""
    from mmpeft.connectors.mlp import MLPConnectorConfig

    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"{name} has projector_hidden_act {config.projector_hidden_act!r}; only 'gelu' can be "
            "imported."
        )
    hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
    state = {}
    for theirs, ours in (("linear_1", "layers.0"), ("linear_2", "layers.2")):
        for kind in ("weight", "bias"):
            if kind == "bias" and not bias:  # none is one of zeros
                state[f"{ours}.bias"] = torch.zeros(hidden_size)
            elif f"{theirs}.{kind}" in tensors:
                state[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
            else:
                raise ValueError(f"{name} lacks the weight {theirs}.{kind} of its connector.")
    return MLPConnectorConfig(standardize=False, hidden_size=hidden_size), state


def _qformer(name, config, tensors):
    """BLIP-2's and InstructBLIP's Q-Former, queries and projection."""
    from mmpeft.connectors.qformer import QFormerConnectorConfig

    theirs, instruction = config.qformer_config, config.model_type == "instructblip"
    for field, needed in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-12)):
        if getattr(theirs, field) != needed:
            raise ValueError(
                f"the Q-Former of {name} has {field} {getattr(theirs, field)!r}; only {needed!r} "
                "can be imported."
            )
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "cross_attention_frequency", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    connector = QFormerConnectorConfig(
        standardize=False, num_query_tokens=config.num_query_tokens, instruction=instruction,
        tokenizer=f"{name}/qformer_tokenizer" if instruction else None,
        **{field: getattr(theirs, field) for field in names},
    )  # fmt: skip
    return connector, tensors


def _fill(name, connector, state) -> None:
    """Copy weights into a connector; each of its own must be there."""
    buffers = {key for key, _ in connector.named_buffers()}
    ours = {key: value for key, value in connector.state_dict().items() if key not in buffers}
    for key, value in ours.items():
        if key not in state:
            raise ValueError(f"{name} lacks the weight {key} of its connector.")
        if state[key].shape != value.shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(state[key].shape)}, its config says "
                f"{tuple(value.shape)}."
            )
        value.copy_(state[key])


def _require_class_token(name, model, config) -> None:
    """Refuse a tower of which upstream, taking off one token, drops a patch or keeps a register."""
    if config.model_type != "llava" or config.vision_feature_select_strategy == "full":
        return
    encoder = model.vision_encoder
    parameter = next(encoder.parameters())
    blank = torch.zeros(1, 3, *model.layout.size, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad():
        _, prefixes = encoder.feature_maps(blank)
    found = prefixes[0].shape[1] if prefixes else 0
    if found != 1:
        raise ValueError(
            f"{name}: vision_feature_select_strategy 'default' drops one token, but the vision "
            f"tower has {found} that are no patches; such a checkpoint cannot be imported."
        )


# ----------------------------------------------------------------------------------- processor


def _require_one_size(name: str, image_processor, size) -> None:
    """Refuse a processor that leaves oblong pictures oblong."""
    blank = Image.new("RGB", (90, 50))
    found = tuple(image_processor(blank, return_tensors="pt")["pixel_values"].shape[-2:])
    if found != (wanted := tuple(size)):
        raise ValueError(
            f"{name}: its processor makes {found[0]} x {found[1]} pixels of a picture of 90 x 50, "
            f"and the encoder takes {wanted[0]} x {wanted[1]}; it cannot be imported."
        )


def processor_of(cls, model, max_length: int | None = None, chat_template: str | None = None):
    """The ``BridgeProcessor`` (``cls``) of an imported bridge, from the checkpoint's own.

    Its image processor, tokenizers and chat template are upstream's, so that pixels and tokens are
    those that the checkpoint was trained on. LLaVA's template ends an answer with a space where the
    training had EOS: to train on, ``chat_template="vicuna"`` teaches the end as well.

    Raises:
        ValueError: the checkpoint lacks its processor's files.
    """
    from transformers import AutoProcessor

    from mmpeft.chat_template import load_template
    from mmpeft.language_model import context_length, load_tokenizer
    from mmpeft.starter import resolve

    source = model.config.processor
    try:
        upstream = AutoProcessor.from_pretrained(
            resolve(source["name"]), revision=source["revision"]
        )
        tokenizer = load_tokenizer(source["name"], source["revision"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source['name']}: its processor cannot be loaded: {first_line(error)}"
        ) from error
    _require_one_size(source["name"], upstream.image_processor, model.layout.resolutions[0][:2])
    images_first = hasattr(upstream, "num_query_tokens")  # BLIP-2 and InstructBLIP
    image_mark = None
    if chat_template is not None:
        template = load_template(chat_template)
    elif images_first:
        template = BLIP_TEMPLATE.replace("END", repr(_end(model, tokenizer)))
    elif template := upstream.chat_template:
        template, image_mark = AS_PARTS + template, upstream.image_token
    processor = cls(
        upstream.image_processor, tokenizer, num_image_tokens=model.layout.resolutions[0].tokens,
        max_length=max_length or context_length(model.config.text_config), chat_template=template,
        add_special_tokens=True, image_mark=image_mark, images_first=images_first,
    )  # fmt: skip
    processor.qformer_tokenizer = getattr(upstream, "qformer_tokenizer", None)
    if processor.qformer_tokenizer is not None:
        limit = model.connector.config.max_position_embeddings
        processor.qformer_tokenizer.model_max_length = limit
    return processor


def _end(model, tokenizer) -> str:
    """The text of the token at which the LLM stops."""
    eos = model.generation_config.eos_token_id
    return tokenizer.decode([eos[0] if isinstance(eos, list) else eos])
