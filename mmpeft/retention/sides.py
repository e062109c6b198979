"""The two sides of every comparison: the LLM as it was (base) and as it was tuned (bridge).

Wherever the two share weights they are one model with the adapter off and on. Two full checkpoints
take turns in memory.
"""

import gc
import hashlib
import json
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from mmpeft.gate import gate_behind
from mmpeft.language_model import context_length
from mmpeft.weights import readable

SIDES = ("base", "bridge")


class RetentionError(ValueError):
    """The comparison would prove nothing, so no report is made; the message says why."""


@dataclass
class Prompt:
    """Words, with a picture between `before` and `words` if there is one."""

    words: str
    before: str = ""
    picture: object = None  # PIL image


class Sides:
    """Contract of a pair of models that can be compared.

    Attributes:
        kind: "bridge", "adapter" or "checkpoints".
        tokenizer: shared by both sides.
        chat: object with `apply_chat_template`: processor or tokenizer.
        gate: the bridge's gate, None for models that have none.
        sees: the tuned side can look at pictures.
        adapted: the tuned side's LLM is another; else pictures alone make a difference.
        alternates: both sides can be asked about one batch at once, at no cost.
        packs: the architecture runs packed rows (see score.py); None until tried.
        window: tokens of its sliding attention window, if it has one; known once `packs` is.
    """

    kind: str
    tokenizer = None
    chat = None
    gate: str | None = None
    sees = False
    adapted = True
    alternates = True
    packs: bool | None = None
    window: int | None = None

    def on(self, side: str):
        """Context in which the returned model is the named side, in eval mode, without autograd."""
        raise NotImplementedError

    def identity(self, side: str) -> dict:
        """`{"name", "sha256"}` of the side's weights."""
        raise NotImplementedError

    def look(self, before: str, picture) -> dict:
        """Model inputs (one row) of `before` followed by the picture; needs `sees`."""
        raise NotImplementedError

    def start(self) -> str:
        """What stands before a picture that would come first.

        LLMs rest attention on the first token of a text, whatever it is (attention sink: Xiao et
        al. 2023, arXiv 2309.17453); a picture in its place makes even the base fail.
        """
        return self.tokenizer.decode([start_token(self.tokenizer)])

    def options(self, rows: int, pictures: bool) -> dict:
        """Further arguments of a forward of `rows` rows behind a picture, or of text."""
        return {}

    @property
    def chats(self) -> bool:
        """There is a chat template."""
        return self.chat.chat_template is not None

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """A chat as the string the model reads."""
        return self.chat.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def text_config(self, side: str):
        """Config of the side's language model. Holds no model: two must not meet in memory."""
        with self.on(side) as model:
            return model.config.get_text_config()

    def context(self) -> int | None:
        """Tokens that both sides can read at once; None: no limit is known."""
        return context_length(self.text_config("base"))

    def dtype(self) -> str:
        with self.on("base") as model:
            return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")

    def config(self, model, side: str):
        """What decides, beside the weights, how the side computes."""
        return model.config

    def setting(self, side: str) -> dict:
        """All that the answers of a side depend on, besides the questions."""
        with self.on(side) as model:
            weight = model.get_input_embeddings().weight
            device = weight.device
            cuda = device.type == "cuda"
            return {
                "side": side,
                "sha256": self.identity(side)["sha256"],
                "config": hash_config(self.config(model, side)),
                "ends": str(getattr(model.generation_config, "eos_token_id", None)),
                "gate": None if side == "base" else self.gate,  # one base for bridges of any gate
                "dtype": str(weight.dtype),
                "attention": model.config.get_text_config()._attn_implementation,
                "device": torch.cuda.get_device_name(device) if cuda else device.type,
                # bfloat16 sums round differently with the number of threads
                "threads": None if cuda else torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }


class BridgeSides(Sides):
    """A bridge against its own LLM: the same weights, adapter off, if there is one."""

    kind = "bridge"
    sees = True

    def __init__(self, model, processor, name: str = "bridge"):
        self.model, self.chat, self.tokenizer = model, processor, processor.tokenizer
        self.name = name
        self.gate = model.config.gate
        self.adapted = hasattr(model.language_model, "peft_config")

    @contextmanager
    def on(self, side):
        context = self.model.disable_adapter() if side in ("base", "control") else nullcontext()
        with evaluation(self.model), context:
            yield self.model

    def config(self, model, side):
        return model.config.get_text_config() if side == "base" else model.config

    def identity(self, side):
        base = self.model.config.identities["language_model"]
        if side == "base":
            return base
        return {
            "name": self.name,
            "sha256": hash_weights(
                self.model.connector.state_dict(), adapter_state(self.model.language_model),
                base["sha256"], self.model.config.identities["vision_encoder"]["sha256"],
            ),
        }  # fmt: skip

    def render(self, messages, add_generation_prompt=True):
        # not the processor's own method, which refuses words that spell its image token
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat.chat_template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def look(self, before, picture):
        text = (before or self.start()) + self.chat.image_token
        inputs = self.chat(
            images=picture, text=text, return_tensors="pt",
            add_special_tokens=self.chat.add_special_tokens,  # as in its chats
        )  # fmt: skip
        return dict(inputs.to(self.model.device))

    def options(self, rows, pictures):
        seen = torch.full((rows, 1), pictures, device=self.model.device)
        return {"adapter_mask": gate_behind(self.gate, seen)}


class AdapterSides(Sides):
    """A causal LM against itself with a peft adapter; text only."""

    kind = "adapter"

    def __init__(self, model, tokenizer, names: tuple[str, str] = ("base", "adapter")):
        self.model, self.chat, self.tokenizer, self.names = model, tokenizer, tokenizer, names
        self._base = None

    @contextmanager
    def on(self, side):
        context = self.model.disable_adapter() if side == "base" else nullcontext()
        with evaluation(self.model), context:
            yield self.model

    def identity(self, side):
        from mmpeft.adapters import adapter_parameters

        if self._base is None:
            adapter = {id(parameter) for parameter in adapter_parameters(self.model)}
            frozen = {n: p for n, p in self.model.named_parameters() if id(p) not in adapter}
            self._base = hash_weights(frozen)
        if side == "base":
            return {"name": self.names[0], "sha256": self._base}
        return {
            "name": self.names[1],
            "sha256": hash_weights(adapter_state(self.model), self._base),
        }


class CheckpointSides(Sides):
    """Two full checkpoints, one in memory at a time; the tuned one may see."""

    kind = "checkpoints"
    alternates = False

    def __init__(self, base: str, tuned: str, dtype: str = "auto", device: str | None = None):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING,
        )

        self.names = {"base": base, "bridge": tuned}
        self._dtype, self._device = dtype, device or default_device()
        self._classes, self._identities = {}, {}
        for side, name in self.names.items():
            sees = AutoConfig.from_pretrained(name).model_type in SEEING
            self._classes[side] = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            self.sees = sees  # the tuned side comes last
        self.tokenizer = self._tokenizer(base)
        self.chat = self.tokenizer
        self._processor = None
        if self.sees and _compresses(AutoConfig.from_pretrained(tuned)):
            self.sees = False
            print(f"{tuned}: its positions behind a picture are not those of its tokens; only mode "
                  "text is measured", file=sys.stderr)  # fmt: skip
        if self.sees:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(tuned)
        other = self._processor.tokenizer if self._processor else self._tokenizer(tuned)
        check_vocabularies(self.tokenizer, other, base, tuned)
        self._loaded = (None, None)

    @staticmethod
    def _tokenizer(name):
        from transformers import AutoTokenizer

        return with_padding(AutoTokenizer.from_pretrained(name))

    @contextmanager
    def on(self, side):
        if self._loaded[0] != side:
            self._loaded = (None, None)
            gc.collect()  # the other side leaves memory before this one comes
            with readable(self.names[side]):
                model = self._classes[side].from_pretrained(
                    self.names[side], dtype=self._dtype, use_safetensors=True
                )
            self._loaded = (side, model.to(self._device).eval())
        with evaluation(self._loaded[1]):
            yield self._loaded[1]

    def context(self):
        from transformers import AutoConfig

        configs = [AutoConfig.from_pretrained(name) for name in self.names.values()]
        known = [context_length(config.get_text_config()) for config in configs]
        return min((length for length in known if length), default=None)

    def identity(self, side):
        if side not in self._identities:
            with self.on(side) as model:
                digest = hash_weights(model.state_dict())
            self._identities[side] = {"name": self.names[side], "sha256": digest}
        return self._identities[side]

    def look(self, before, picture):
        if not before and not self.tokenizer.encode(""):
            before = self.start()
        bos = self.tokenizer.bos_token
        # a chat template wrote it already
        special = {"add_special_tokens": False} if bos and before.startswith(bos) else {}
        inputs = self._processor(
            images=picture, text=before + self._processor.image_token, return_tensors="pt",
            **special,
        )  # fmt: skip
        return dict(inputs.to(self._device))


def open_sides(base: str, tuned: str, dtype: str = "auto", device: str | None = None) -> Sides:
    """The pair of a base LLM and a peft adapter folder, or of two full checkpoints.

    Args:
        base, tuned: local folders, hub names, or `starter:NAME`.
        dtype: floating type both are run in; "auto" is what each was saved in.

    Raises:
        ValueError: one cannot be loaded, or they cannot be compared: an adapter may have changed
            the base's own weights, so that the base would not come back with it switched off.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mmpeft.tuners  # noqa: F401 (importing them makes peft know them)
    from mmpeft.starter import resolve
    from mmpeft.trial import is_base_when_off, probe

    base, tuned = str(resolve(base)), str(resolve(tuned))
    device = device or default_device()
    try:
        if not (Path(tuned) / "adapter_config.json").is_file():
            return CheckpointSides(base, tuned, dtype, device)
        PeftConfig.from_pretrained(tuned)  # says at once what is wrong with it
        with readable(base):
            llm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
        before = probe(llm)
        with readable(tuned):  # peft would read a pickle where there is nothing else
            model = PeftModel.from_pretrained(llm, tuned).eval()
        if not is_base_when_off(model, before):
            raise ValueError(
                f"{tuned!r} changes the weights of {base!r} itself (init_lora_weights such as "
                "pissa, or bias), so switched off it is not the base; merge it (peft's "
                "merge_and_unload, then save_pretrained) and compare the two checkpoints"
            )
        model = model.to(device)
        return AdapterSides(model, with_padding(AutoTokenizer.from_pretrained(base)), (base, tuned))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{base!r} against {tuned!r}: one of them is no local model folder, no peft adapter "
            f"and cannot be had from the hub ({reason})"
        ) from error


def check_vocabularies(tokenizer, other, base: str, tuned: str) -> None:
    """Raises ValueError: the tuned side would read other words than the base."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    numbers = other.get_vocab()
    for word, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if word not in added and numbers.get(word) != number:
            raise ValueError(
                f"{base!r} and {tuned!r} do not share a vocabulary (token {word!r} is {number} and "
                f"{numbers.get(word)}), so the same questions cannot be put to both"
            )


def _compresses(config) -> bool:
    """Positions run in three axes behind a picture (M-RoPE, Qwen2-VL and others)."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def with_padding(tokenizer):
    """Batches need some padding token; it is masked, so which one never matters."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_token(tokenizer) -> int:
    """What precedes a text: the token lm-eval puts before an empty context (BOS, else EOS)."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise RetentionError(
            "the tokenizer has neither a BOS nor an EOS token to start a text with"
        )
    return token


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapter_state(language_model) -> dict:
    """The adapter's tensors and scalings, which are not in its state."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    if not hasattr(language_model, "peft_config"):
        return {}
    state = get_peft_model_state_dict(language_model, save_embedding_layers=False)
    for name, layer in language_model.named_modules():
        if isinstance(layer, LoraLayer):
            state[f"{name}.scaling"] = torch.tensor(list(layer.scaling.values()))
        if (dial := getattr(layer, "dial", 1.0)) != 1:
            state[f"{name}.dial"] = torch.tensor(dial)
    return state


def hash_weights(*parts: dict | str) -> str:
    """SHA-256 over the exact bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        for name, tensor in sorted(part.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            tensor = tensor.detach().contiguous().cpu()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# of a config: where it came from and with what it was written, or what is known by other means
NOT_COMPUTED = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")


def hash_config(config) -> str:
    """SHA-256 of what a config says of the computation: of positions, windows, scales, layers."""

    def said(value):
        if not isinstance(value, dict):
            return value
        return {key: said(one) for key, one in value.items() if key not in NOT_COMPUTED}

    text = json.dumps(said(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def evaluation(model):
    """Eval mode without autograd, the training flag put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def paired_logits(sides: Sides, batches: list[dict], what: str):
    """Yield (base, bridge) logits (B, T, V) of every batch; the padding holds nothing of use.

    Both sides run the same batches. Two checkpoints take turns: the base's logits wait on disk.

    Raises:
        RetentionError: a logit of a real position is NaN or infinite; `what` names the batches.
    """

    def run(side, batch):
        with sides.on(side) as model:
            device = model.get_input_embeddings().weight.device
            logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
        kept = batch["attention_mask"].bool().to(logits.device)
        check_finite(logits[kept], f"{side} on {what}")
        return logits

    if sides.alternates:
        for batch in batches:
            yield run("base", batch), run("bridge", batch)
        return
    with tempfile.TemporaryDirectory(prefix="mmpeft-logits-") as folder:
        files = [f"{folder}/{number}.safetensors" for number in range(len(batches))]
        for file, batch in zip(files, batches, strict=True):
            save_file({"logits": run("base", batch).contiguous().cpu()}, file)
        for file, batch in zip(files, batches, strict=True):
            bridge = run("bridge", batch)
            base = load_file(file)["logits"].to(bridge.device)
            words = min(base.shape[-1], bridge.shape[-1])  # a VLM may have added a few tokens
            yield base[..., :words], bridge[..., :words]


def check_finite(logits: torch.Tensor, what: str) -> None:
    if not torch.isfinite(logits).all():
        raise RetentionError(
            f"logits of the {what} are NaN or infinite: nothing measured on them would mean "
            "anything. Look at the loss of the run, or load the model in float32."
        )


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T) that count real tokens only, so that left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
