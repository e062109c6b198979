"""Starts of LoRA that come out of the frozen weights or out of what the LLM reads; W stays W.

``init_lora_weights`` of a ``LoraConfig``, made by peft:

- ``pissa``, ``pissa_niter_N``: the principal part of W (Meng et al. 2024, arXiv 2404.02948).
- ``olora``: of its QR decomposition (Buyukakyuz 2024, arXiv 2406.01775).
- ``corda``: of W in the directions of its inputs (Yang et al. 2024, arXiv 2406.05223); ``ipm``
  takes the strongest, of what is to be learned, ``kpm`` the weakest, of replay that is to be kept.
- ``eva``: A from the principal inputs, B is 0 (Paischer et al. 2024, arXiv 2410.07170).

The first three subtract their start B0 A0 from W, as peft has them. Here B0 and A0 are kept beside
B and A and the layer adds B A - B0 A0: the same function, but without the adapter it is the base.
"""

import copy
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import (
    initialize_lora_eva_weights,
    prepare_layer_inputs_fn_language_modeling,
)
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from tqdm import tqdm

from mmpeft.data import Collator
from mmpeft.streaming import some

FROM_WEIGHTS = ("pissa", "olora")
FROM_DATA = ("eva", "corda")
ADAPTER = "default"
EVA_TOKENS = 4  # tokens of a batch for each component that EVA looks for
EVA_ROUNDS = 50  # times through the samples in which EVA must settle


def start_of(adapter) -> str | None:
    """``pissa``, ``olora``, ``corda`` or ``eva``, where a peft config asks for one of them."""
    how = getattr(adapter, "init_lora_weights", None)
    if not isinstance(how, str):
        return None
    kind = how.lower().partition("_")[0]
    return kind if kind in FROM_WEIGHTS + FROM_DATA else None


def check(config) -> None:
    """Refuse a recipe whose start lacks its data.

    Raises:
        ValueError: CorDA is to preserve knowledge, and there are no rows of text to see it in; or
            a rank is looked for, with trials that begin before the data is seen.
    """
    if config.model.rank == "auto" and (how := start_of(config.model.adapter)) in FROM_DATA:
        raise ValueError(
            f"model.rank: auto tries ranks of plain starts, adapter has init_lora_weights {how!r}; "
            "look for the rank without, then set model.rank to it."
        )
    if preserves(config.model.adapter) and config.data.replay is None:
        raise ValueError(
            "adapter: corda_method 'kpm' preserves what the LLM does on rows of text, of which "
            "there are none; set data.replay (mmpeft replay writes one), or corda_method: ipm."
        )


def preserves(adapter) -> bool:
    """Whether it is CorDA's knowledge-preserved mode."""
    options = getattr(adapter, "corda_config", None)
    return start_of(adapter) == "corda" and options is not None and options.corda_method == "kpm"


class KeptStart(LoraVariant):
    """LoRA that adds ``B A - B0 A0``, with the start ``B0 A0`` as it was."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Keep the factors as they are now; they are saved, and never trained."""
        for name in ("A", "B"):
            if not hasattr(module, f"lora_start_{name}"):
                setattr(module, f"lora_start_{name}", BufferDict(persistent=True))
            factor = getattr(module, f"lora_{name}")[adapter_name].weight
            getattr(module, f"lora_start_{name}")[adapter_name] = factor.detach().clone()

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs):
        a, b, a0, b0 = _factors(module, active_adapter)
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, a.dtype))
        # B A - B0 A0 by way of small differences: exactly 0 at the start, and no rounding of B0 A0
        added = F.linear(F.linear(x, a), b - b0) + F.linear(F.linear(x, a - a0), b0)
        return result + module.scaling[active_adapter] * added

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight + _delta(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = KeptStart.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight - _delta(module, active_adapter)).to(orig_weight.dtype)


def _factors(module: LoraLayer, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ``(r, in)``, B ``(out, r)``, and both as they began."""
    own = module.lora_A[name].weight, module.lora_B[name].weight
    return *own, module.lora_start_A[name], module.lora_start_B[name]


def _delta(module: LoraLayer, name: str) -> Tensor:
    a, b, a0, b0 = _factors(module, name)
    return transpose(module.scaling[name] * (b @ a - b0 @ a0), module.fan_in_fan_out)


def wrap(language_model: nn.Module, config, new: bool = True):
    """``get_peft_model``, with W left as it is where the start comes out of it.

    Args:
        config: a peft config with full paths as targets.
        new: make the start; else its weights follow, from a checkpoint.

    Raises:
        ValueError: the start cannot be had for a layer.
    """
    how = start_of(config)
    if how == "eva":  # peft fills these in only where nothing else is set
        config.eva_config = config.eva_config or EvaConfig()
    elif how == "corda":
        config.corda_config = config.corda_config or CordaConfig()
    if how is None or how == "eva":
        wrapped = get_peft_model(language_model, config)
        if new and getattr(config, "use_dora", False):
            _exact_magnitudes(wrapped)
        return wrapped
    if type(config) is not LoraConfig:
        raise ValueError(
            f"adapter: init_lora_weights {how!r} serves a LoraConfig; set init_lora_weights: true."
        )
    named, config.init_lora_weights = config.init_lora_weights, True
    wrapped = get_peft_model(language_model, config)
    wrapped.peft_config[ADAPTER].init_lora_weights = named
    for name, layer in lora_layers(wrapped).items():
        if type(layer) is not Linear or layer.lora_variant:
            raise ValueError(
                f"adapter: init_lora_weights {how!r} serves plain LoRA on linear layers; {name} is "
                f"{type(layer).__name__} {list(layer.lora_variant) or ''}. Set init_lora_weights: "
                "true."
            )
        if new and how in FROM_WEIGHTS and layer.get_base_layer().weight.device.type != "meta":
            _take(name, layer, how, named)
        layer.lora_variant[ADAPTER] = KeptStart()
        KeptStart.init(layer, ADAPTER)
    return wrapped


@torch.no_grad()
def _exact_magnitudes(language_model: nn.Module) -> None:
    """DoRA's magnitudes as float32 norms of W, by which its forward divides.

    peft takes them in W's own type: of bfloat16 they are off by up to 0.3%, and the start is not
    the base.
    """
    for layer in lora_layers(language_model).values():
        weight = layer.get_base_layer().weight
        plain = type(layer) is Linear and weight.dtype in (torch.bfloat16, torch.float16)
        for name, magnitude in layer.lora_magnitude_vector.items() if plain else ():
            if not layer.lora_B[name].weight.any():  # at its start
                norms = transpose(weight.float(), layer.fan_in_fan_out).norm(dim=1)
                magnitude.weight.copy_(norms)


def lora_layers(language_model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA's layers by their path."""
    found = language_model.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, LoraLayer)}


def _take(name: str, layer: LoraLayer, how: str, named: str) -> None:
    """Have peft make the start, which changes W, and put W back."""
    base = layer.get_base_layer()
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    own, shapes = base.weight.data, (a.shape, b.shape)
    base.weight.data = own.clone()
    try:
        if how == "olora":
            if layer.fan_in_fan_out:  # peft takes it for (out, in) all the same
                base.weight.data = own.T.contiguous()
            layer.olora_init(ADAPTER)
        else:
            getattr(layer, f"{how}_init")(ADAPTER, named)
    finally:
        base.weight.data = own
    made = (layer.lora_A[ADAPTER].weight.shape, layer.lora_B[ADAPTER].weight.shape)
    if made != shapes:
        raise ValueError(
            f"adapter: init_lora_weights {named!r} has no start of rank {layer.r[ADAPTER]} for "
            f"{name}, {type(base).__name__} {tuple(own.shape)}; lower r, or set true."
        )


# ------------------------------------------------------------------------- starts out of data


@torch.no_grad()
def start_from_data(model, config, data, cache=None) -> None:
    """Give a new adapter the start that its config takes out of training samples, if it does.

    For CorDA ``kpm`` these are replay, else samples of stage instruct (of a stream the first).
    Runs before that stage: by then the connector is aligned, and image tokens are what they will
    be.

    Args:
        model: the bridge, whose adapter is untrained.
        config: the :class:`~mmpeft.config.RunConfig`; ``data.start_samples`` is their number.
        data: the :class:`~mmpeft.training_data.TrainingData`.
        cache: a :class:`~mmpeft.feature_cache.FeatureCache` to take features from.
    """
    adapter = config.model.adapter
    how = start_of(adapter)
    if how not in FROM_DATA:
        return
    dataset = data.replay if preserves(adapter) else data.instruct
    drawn = some(dataset, config.data.start_samples)
    if isinstance(drawn, list):
        drawn.sort()  # as the rows lie, like those of a stream
    samples = [dataset[index] for index in tqdm(drawn, desc=f"{how} reads")]
    model.to(config.instruct.device).eval()
    ask = _Ask(model, cache)
    if how == "eva":
        eva(model.language_model, samples, ask)
    else:
        corda(model.language_model, samples, ask)
    print(f"adapter: starts by {how} from {len(samples)} samples.", file=sys.stderr)


class _Ask:
    """Runs the bridge on samples, padded, for what its layers then see."""

    def __init__(self, model, cache=None):
        self.model, self.cache, self.collate = model, cache, Collator(0)

    def batch(self, samples: list[dict]) -> dict:
        batch = self.collate(samples)
        del batch["labels"]
        device = self.model.get_input_embeddings().weight.device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch if self.cache is None else self.cache.resolve(batch)

    def __call__(self, batch: dict) -> None:
        self.model(**batch, logits_to_keep=1)


def corda(language_model: nn.Module, samples: Iterable[dict], ask) -> None:
    """Start CorDA from the inputs of the adapted layers, one sample at a time (peft's own code)."""
    layers = lora_layers(language_model)
    own = copy.deepcopy(language_model.peft_config[ADAPTER])
    own.target_modules = {f"{name}.base_layer" for name in layers}
    own.rank_pattern = {f"{name}.base_layer": layer.r[ADAPTER] for name, layer in layers.items()}

    def read():
        for sample in tqdm(samples, desc="corda", unit="sample"):
            ask(ask.batch([sample]))

    with language_model.disable_adapter():
        preprocess_corda(language_model, own, read)
    for name, layer in layers.items():
        _take(name, layer, "corda", "corda")
        KeptStart.init(layer, ADAPTER)


def eva(language_model: nn.Module, samples: list[dict], ask) -> None:
    """Start EVA from the inputs of the adapted layers (peft's own code); may move ranks.

    Raises:
        ValueError: too few tokens, or no convergence.
    """
    layers = lora_layers(language_model)
    config = language_model.peft_config[ADAPTER]
    least = round(EVA_TOKENS * config.eva_config.rho * max(x.r[ADAPTER] for x in layers.values()))
    batches = _eva_batches(samples, least, config.eva_config.use_label_mask, ask)
    contributions = {name: layer.lora_B[ADAPTER] for name, layer in layers.items()}
    dtype = next(iter(contributions.values())).weight.dtype
    asked = 0

    def read(_, inputs):
        nonlocal asked
        asked += 1
        if asked > EVA_ROUNDS * len(batches) + 1:
            raise ValueError(
                f"EVA has not settled in {EVA_ROUNDS} rounds of {len(samples)} samples; raise "
                "data.start_samples, or lower eva_config.tau."
            )
        ask({key: value for key, value in inputs.items() if key != "positions"})

    initialize_lora_eva_weights(
        language_model, batches, forward_fn=read,
        prepare_model_inputs_fn=lambda inputs, _: inputs["positions"].nonzero(),
        prepare_layer_inputs_fn=prepare_layer_inputs_fn_language_modeling,
        gather_distributed_inputs=False,
    )  # fmt: skip
    for name, layer in lora_layers(language_model).items():
        layer.lora_A[ADAPTER].to(dtype)
        made, was = layer.lora_B[ADAPTER], contributions[name]
        if made is not was:  # the module stays, since the gate hooks on it
            was.weight, was.in_features = nn.Parameter(made.weight.to(dtype)), made.in_features
            layer.lora_B[ADAPTER] = was
        if config.use_dora:  # made anew with the rank, in the type of the LLM
            layer.lora_magnitude_vector[ADAPTER].to(dtype)
    if config.use_dora:
        _exact_magnitudes(language_model)


def _eva_batches(samples: list[dict], least: int, learned: bool, ask) -> list[dict]:
    """Batches of ``least`` tokens and more that count, which ``positions`` ``(B, T)`` marks."""
    groups, used = [[]], [0]
    for sample in samples:
        if used[-1] >= least:
            groups.append([])
            used.append(0)
        groups[-1].append(sample)
        used[-1] += int(_counting(sample, learned).sum())
    if used[-1] < least and len(groups) > 1:
        rest = groups.pop()
        groups[-1] += rest
    elif used[-1] < least:
        raise ValueError(
            f"EVA wants {least} tokens at least ({EVA_TOKENS} for each component it looks for), "
            f"{len(samples)} samples have {used[-1]}; raise data.start_samples, or lower r."
        )
    batches = []
    for group in groups:
        batch = ask.batch(group)
        marks, ids = [_counting(sample, learned) for sample in group], batch["input_ids"]
        positions = torch.stack([F.pad(m, (0, ids.shape[1] - len(m))) for m in marks])
        batches.append(batch | {"positions": positions.to(ids.device)})
    return batches


def _counting(sample: dict, learned: bool) -> Tensor:
    """``(T,)`` bool: the learned tokens of a sample, or all."""
    labels = torch.as_tensor(sample["labels"])
    return labels != -100 if learned else torch.ones_like(labels, dtype=torch.bool)
