"""Every PEFT method keeps the bridge's promises: one test for all."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmpeft import BridgeForConditionalGeneration
from mmpeft.adapter_steps import steps_of
from mmpeft.adapters import REFUSED, adapter_parameters, attach_adapter, set_trainable
from mmpeft.gate import GATES
from mmpeft.trainer import _by_decay
from mmpeft.tuners.adamix import AdaMixConfig
from mmpeft.tuners.adaptive_prefix import AdaptivePrefixConfig
from mmpeft.tuners.bitfit import BitFitConfig
from mmpeft.tuners.bottleneck import BottleneckConfig
from mmpeft.tuners.dylora import DyLoraConfig
from mmpeft.tuners.from_peft import TRANSLATIONS
from mmpeft.tuners.full import FullTuningConfig
from mmpeft.tuners.llama_adapter import LlamaAdapterConfig
from mmpeft.tuners.mam import MAMConfig
from mmpeft.tuners.prefix import PrefixConfig
from mmpeft.tuners.prefix_propagation import PrefixPropagationConfig
from mmpeft.tuners.prompt import PromptConfig, PTuningConfig
from mmpeft.tuners.propelt import ProPELTConfig

from .conftest import model_inputs, user

TARGETS = ["q_proj", "v_proj", "down_proj"]


def of_peft(peft_type, **options):
    """A config of peft's by its type."""
    return lambda: CONFIGS[peft_type](target_modules=["q_proj", "o_proj"], **options)


NAMED = {  # by the papers, and what stands beside them
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "ia3 by default": IA3Config,
    "lokr (KronA)": lambda: LoKrConfig(r=4, target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "ln tuning": LNTuningConfig,
    "dylora": lambda: DyLoraConfig(r=4, target_modules=TARGETS),
    "houlsby": lambda: BottleneckConfig(bottleneck_size=8),
    "parallel": lambda: BottleneckConfig(bottleneck_size=8, placement="parallel"),
    "adamix": lambda: AdaMixConfig(bottleneck_size=8),
    "adamix on lora": lambda: AdaMixConfig(kind="lora", bottleneck_size=4, target_modules=TARGETS),
    "propelt": lambda: ProPELTConfig(),
    "propelt on lora": lambda: ProPELTConfig(kind="lora", target_modules=TARGETS),
    "bitfit": lambda: BitFitConfig(add_biases=True),
    "full": FullTuningConfig,
    "partial": lambda: FullTuningConfig(target_modules=["down_proj"]),
    "p-tuning v2": lambda: PrefixConfig(num_virtual_tokens=3),
    "prefix": lambda: PrefixConfig(num_virtual_tokens=3, hidden_size=8),
    "adaptive prefix": lambda: AdaptivePrefixConfig(num_virtual_tokens=3),
    "prompt": lambda: PromptConfig(num_virtual_tokens=3),
    "p-tuning": lambda: PTuningConfig(num_virtual_tokens=3),
    "prefix propagation": lambda: PrefixPropagationConfig(num_virtual_tokens=3),
    "llama-adapter": lambda: LlamaAdapterConfig(num_virtual_tokens=3),
    "mam": lambda: MAMConfig(),
}
OTHERS = {  # what else peft has
    peft_type.lower(): of_peft(peft_type, **options)
    for peft_type, options in {
        "ADAMSS": {}, "BEFT": {}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4},
        "DEFT": {}, "DELORA": {}, "FOURIERFT": {"n_frequency": 16}, "FROD": {}, "GLORA": {},
        "GRALORA": {"r": 4}, "HIRA": {}, "HRA": {}, "MISS": {"r": 4}, "OFT": {"oft_block_size": 4},
        "OSF": {}, "PEANUT": {}, "PSOFT": {"r": 4}, "PVERA": {}, "RANDLORA": {},
        "ROAD": {"group_size": 4}, "SHIRA": {"r": 2}, "SUPERTUNING": {}, "TINYLORA": {},
        "UNILORA": {}, "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2}, "VERA": {},
        "WAVEFT": {"n_frequency": 16},
    }.items()
}  # fmt: skip
METHODS = NAMED | OTHERS
GATED = [(method, gate) for method in METHODS for gate in GATES[1:]]
GENERATE = {"max_new_tokens": 6, "do_sample": False, "output_logits": True,
            "return_dict_in_generate": True}  # fmt: skip


@pytest.fixture
def bridge(make_bridge):
    """``bridge(method, gate)``: a bridge whose adapter's weights are far from where they began."""

    def make(method, gate="none"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, processor = make_bridge(gate, adapter=METHODS[method]())
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter_parameters(model.language_model):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(0.3 * noise)
        return model, processor

    return make


def mixed(processor, images):
    chats = [[user(images[0], "what?")], [user("only text")], [user("first", images[1], "both")]]
    return model_inputs(processor, chats)


def test_every_method_of_peft_and_ours_is_tried_here_or_refused():
    """A new version of peft brings new methods: each is served, translated or refused by name."""
    tried = {make().peft_type for make in METHODS.values()}
    translated = {config().peft_type for config in TRANSLATIONS}
    others = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"}  # prompts of their own kind
    known = {str(getattr(name, "value", name)) for name in CONFIGS}
    assert known == {str(getattr(n, "value", n)) for n in tried | translated | others} | {*REFUSED}


def test_every_method_of_ours_has_its_line_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    ours = [c.__name__ for name, c in CONFIGS.items() if str(name).startswith("MMPEFT")]
    import mmpeft.tuners

    assert all(hasattr(mmpeft.tuners, name) for name in ours)
    assert len(ours) > 10 and [name for name in ours if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["POLY", "LILY", "SHADOW", "CPT"])
def test_methods_that_break_a_promise_are_refused(make_bridge, name):
    options = {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1],
               "cpt_tokens_type_mask": [1]} if name == "CPT" else {}  # fmt: skip
    with pytest.raises(ValueError, match=f"adapter {CONFIGS[name].__name__} .*; choose another"):
        make_bridge("none", adapter=CONFIGS[name](**options))


@pytest.mark.parametrize("method", METHODS)
def test_connector_and_adapter_train_and_nothing_else(bridge, images, method):
    model, processor = bridge(method)
    set_trainable(model, connector=True, adapter=True)
    steps = steps_of(model.language_model)
    if steps is not None:
        steps.begin_step(0, 10)
    model.train()
    batch = mixed(processor, images)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    adapter = adapter_parameters(model.language_model)
    own = {id(p) for p in [*model.connector.parameters(), *adapter]}
    assert trained <= own and {id(p) for p in model.connector.parameters()} <= trained
    reached = [p for p in adapter if p.grad is not None and p.grad.any()]
    assert len(reached) == len([p for p in adapter if p.requires_grad]) > 0
    assert all(p.grad is not None and p.grad.any() for p in model.connector.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_switched_off_it_is_the_base(bridge, llm_dir, images, method):
    model, processor = bridge(method)
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    batch = model_inputs(processor, [[user("hello")], [user("a rather longer question")]])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert not torch.allclose(model(**batch).logits, base(**batch).logits, atol=1e-3)


@pytest.mark.parametrize(("method", "gate"), GATED)
def test_where_the_gate_is_shut_it_is_the_base(bridge, images, method, gate):
    model, processor = bridge(method, gate)
    batch = mixed(processor, images)
    for training in (False, True):
        model.train(training)
        adapted = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        assert torch.equal(adapted[1], base[1])
        assert all(not torch.allclose(adapted[i], base[i], atol=1e-3) for i in (0, 2))
        before = int(batch["mm_token_type_ids"][2].argmax())
        prefix = batch["attention_mask"][2, :before].bool()
        same = torch.equal(adapted[2, :before][prefix], base[2, :before][prefix])
        assert same is (gate != "sample")


@pytest.mark.parametrize(("method", "gate"), [*GATED, *((name, "none") for name in NAMED)])
def test_cached_generation_of_a_mixed_batch(bridge, images, method, gate):
    model, processor = bridge(method, gate)
    batch = mixed(processor, images)
    cached = torch.stack(model.generate(**batch, **GENERATE).logits)
    whole = torch.stack(model.generate(**batch, **GENERATE, use_cache=False).logits)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
    if gate != "none":
        with model.disable_adapter():
            base = torch.stack(model.generate(**batch, **GENERATE).logits)
        assert torch.equal(cached[:, 1], base[:, 1])


@pytest.mark.parametrize(
    ("method", "gate"), [("lora", "none"), ("prompt", "after_image"), ("adaptive prefix", "sample")]
)
def test_a_static_cache_hides_the_padding(bridge, images, method, gate):
    model, processor = bridge(method, gate)
    batch = mixed(processor, images)
    static = model.generate(**batch, **GENERATE, cache_implementation="static").logits
    whole = model.generate(**batch, **GENERATE, use_cache=False).logits
    torch.testing.assert_close(torch.stack(static), torch.stack(whole), atol=1e-4, rtol=1e-4)


def test_ia3_scales_what_it_does_in_peft(make_bridge, llm_dir):
    def shapes(model):
        found = {n: tuple(p.shape) for n, p in model.named_parameters() if "ia3_l" in n}
        return {name.rpartition("layers.")[2]: shape for name, shape in found.items()}

    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    theirs = shapes(get_peft_model(llm, IA3Config(task_type="CAUSAL_LM")))
    bridge, _ = make_bridge("none", adapter=IA3Config())
    assert shapes(bridge.language_model) == theirs and len(theirs) > 2
    # an LLM that peft's table lacks: keys, values, and what goes into the last layer of the FFN
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    llm.config.model_type = "another"
    assert shapes(attach_adapter(llm, IA3Config())) == theirs


@pytest.mark.parametrize("method", NAMED)
def test_another_adapter_takes_its_place(bridge, images, method):
    model, processor = bridge(method)
    batch = mixed(processor, images)
    with model.disable_adapter():
        base = model(**batch).logits
    model.replace_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(model(**batch).logits, base)  # where LoRA starts
    names = [name for name, _ in model.language_model.named_parameters()]
    assert not [name for name in names if "lora" not in name and "default" in name]


def test_dora_starts_as_a_base_of_16_bits(llm_dir):
    llm = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    base = llm(input_ids=ids).logits
    wrapped = attach_adapter(llm, LoraConfig(r=4, use_dora=True, target_modules=TARGETS))
    assert torch.equal(wrapped(input_ids=ids).logits, base)


@pytest.mark.parametrize("method", ["ia3", "adamix"])
def test_biases_and_scales_do_not_decay(bridge, method):
    model, _ = bridge(method)
    set_trainable(model, connector=False, adapter=True)
    names = {id(p): name for name, p in model.named_parameters()}
    parts = dict(_by_decay(model, adapter_parameters(model.language_model)))
    decaying = [names[id(parameter)] for parameter in parts.get(True, [])]
    assert bool(decaying) is (method == "adamix") and len(parts[False]) > 0
    assert not [name for name in decaying if "bias" in name]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_what_was_trained_and_no_more(bridge, images, tmp_path, method):
    model, processor = bridge(method)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    batch = mixed(processor, images)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = {p.data_ptr() for p in adapter_parameters(model.language_model)}
    assert len(saved) > 0
    frozen = [p for p in model.language_model.parameters() if p.data_ptr() not in ours]
    shapes = {tuple(p.shape) for p in frozen if p.dim() == 2 and p.numel() > 64 * 64}
    assert not any(tuple(v.shape) in shapes for v in saved.values())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("method", NAMED)
def test_the_adapter_folder_alone_is_read_by_peft(bridge, llm_dir, tmp_path, method):
    model, processor = bridge(method)
    model.eval().save_pretrained(tmp_path)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    alone = PeftModel.from_pretrained(llm, tmp_path / "adapter").eval()
    batch = model_inputs(processor, [[user("hello")], [user("a rather longer question")]])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(alone(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_a_new_process_reads_a_method_of_ours(bridge, tmp_path):
    model, _ = bridge("houlsby")
    model.save_pretrained(tmp_path)
    code = (
        "import sys; from mmpeft import BridgeForConditionalGeneration as Bridge; "
        "print(Bridge.from_pretrained(sys.argv[1]).config.gate)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "none"
