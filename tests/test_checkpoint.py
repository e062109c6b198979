"""Checkpoints: what was trained, nothing else, back to the bit or refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mmpeft
from mmpeft import adapters, checkpoint
from mmpeft.connectors.linear import LinearConnectorConfig
from mmpeft.connectors.mlp import MLPConnectorConfig

from .conftest import assistant, model_inputs, user


def few_steps(model, processor, images, steps=3):
    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    processor.tokenizer.padding_side = "right"
    chats = [[user(images[0], "a"), assistant("yes")], [user(images[1], "b"), assistant("no")]]
    batch = model_inputs(processor, chats, add_generation_prompt=False)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return batch


@pytest.mark.parametrize("connector", [LinearConnectorConfig(), MLPConnectorConfig()])
@pytest.mark.parametrize(
    ("gate", "adapter"), [("sample", "lora"), ("none", "lora"), ("none", None)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_save_load_gives_the_same_logits(
    make_bridge, images, tmp_path, connector, gate, adapter, dtype
):
    model, processor = make_bridge(gate, adapter, connector, dtype)
    batch = few_steps(model, processor, images)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = mmpeft.load(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    if gate == "none" and adapter and dtype == "float32":
        merged = loaded.merge_adapter()(**batch).logits
        torch.testing.assert_close(merged, model(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture
def saved(tiny, tmp_path):
    model, processor = tiny
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_only_what_was_trained_is_saved(saved):
    keys = set(load_file(saved / "adapter/adapter_model.safetensors"))
    assert keys and all("lora_" in key for key in keys)
    assert all("layers" in k or k.startswith(("feature_", "output_scale"))
               for k in load_file(saved / "connector.safetensors"))  # fmt: skip
    weights = {p.name for p in saved.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert not weights
    adapter_config = json.loads((saved / "adapter/adapter_config.json").read_text())
    assert adapter_config["task_type"] == "CAUSAL_LM"


def test_another_base_model_is_refused_by_name(make_bridge, llm_dir, tmp_path):
    other = tmp_path / "llm"
    shutil.copytree(llm_dir, other)
    model, _ = make_bridge(language_model=str(other))
    model.save_pretrained(tmp_path / "run")
    changed = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    changed.save_pretrained(other)
    with pytest.raises(ValueError, match=r"trained on language_model .*llm.*now has weights"):
        mmpeft.BridgeForConditionalGeneration.from_pretrained(tmp_path / "run")


def test_another_precision_is_the_same_base(saved):
    model = mmpeft.BridgeForConditionalGeneration.from_pretrained(saved, dtype="bfloat16")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["connector.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("problem", ["misses", "has unexpected", "has other shapes"])
def test_keys_must_match_exactly(saved, file, problem):
    state = load_file(saved / file)
    name = sorted(state)[0]
    tensor = state.pop(name)
    if problem == "has unexpected":
        state |= {name: tensor, "stray": torch.zeros(1)}
    elif problem == "has other shapes":
        state[name] = torch.zeros(1, 1, 1)
    save_file(state, saved / file)
    with pytest.raises(ValueError, match=problem):
        mmpeft.load(saved)


def test_an_absent_adapter_is_noticed(saved):
    (saved / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="the model has an adapter, but .* is missing"):
        mmpeft.load(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"connector": {"class_path": "os.system", "init_args": {}}}, "no ConnectorConfig"),
        ({"connector": {"class_path": "evil.Payload", "init_args": {}}}, "import evil before"),
        ({"connector": {"class_path": "mmpeft.connectors.mlp.MLPConnectorConfig",
                        "init_args": {"x": 1}}}, "unknown options"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    ],
)  # fmt: skip
def test_a_checkpoint_cannot_choose_code_to_run(saved, edit, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(ValueError, match=message):
        mmpeft.load(saved)


def test_pickled_weights_are_refused(make_bridge, llm_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickled weights only"):
        make_bridge(language_model=str(tmp_path))


def test_what_is_on_no_hub_is_not_looked_for_there(make_bridge):
    for path in ("/nope", "./nope", "../nope"):
        with pytest.raises(FileNotFoundError, match="no run at .*nope: it does not exist"):
            checkpoint.find_checkpoint(path)
    with pytest.raises(ValueError, match="'/nope' does not exist; put the folder back, or a link"):
        make_bridge("none", language_model="/nope")
    for adapter in ("lora", ["lora"]):
        with pytest.raises(ValueError, match="adapter is .*lora.*; give one peft config"):
            adapters.attach_adapter(torch.nn.Linear(1, 1), adapter)


def test_paths_without_a_bridge(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mmpeft.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no finished bridge.*--resume"):
        mmpeft.load(tmp_path)


def test_unknown_language_model(make_bridge):
    with pytest.raises(ValueError, match="language_model 'nobody/nothing' cannot be loaded"):
        make_bridge(language_model="nobody/nothing")


def test_what_was_merged_is_not_lost_without_a_word(make_bridge, images, tmp_path):
    model, processor = make_bridge("none", "lora")
    few_steps(model, processor, images)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the language model, .* save before"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_adapter_stays_of_a_bridge_saved_there_before(make_bridge, images, tmp_path):
    with_one, processor = make_bridge("none", "lora")
    few_steps(with_one, processor, images)
    with_one.save_pretrained(tmp_path)
    without, _ = make_bridge("none", adapter=None)
    without.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = mmpeft.load(tmp_path)
    assert not hasattr(loaded.language_model, "peft_config")


def test_the_idioms_of_transformers(saved):
    from transformers import AutoModelForImageTextToText

    for options in ({"dtype": "auto"}, {"torch_dtype": torch.float32}, {"device_map": None}):
        AutoModelForImageTextToText.from_pretrained(saved, **options)
    loaded = mmpeft.BridgeForConditionalGeneration.from_pretrained(saved, torch_dtype="bfloat16")
    assert loaded.language_model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="leave out device_map"):
        AutoModelForImageTextToText.from_pretrained(saved, device_map="auto")
    with pytest.raises(ValueError, match="push_to_hub is not carried out"):
        loaded.save_pretrained(saved, push_to_hub=True)


def test_local_parts_are_found_from_another_folder(
    make_bridge, encoder_dir, llm_dir, tmp_path, monkeypatch
):
    from mmpeft.encoder import TimmEncoderConfig

    monkeypatch.chdir(Path(llm_dir).parent)
    encoder = TimmEncoderConfig(os.path.relpath(encoder_dir), image_size=64)
    llm = f"./{Path(llm_dir).name}"
    model = mmpeft.BridgeForConditionalGeneration.from_parts(encoder, MLPConnectorConfig(), llm)
    assert encoder.name == os.path.relpath(encoder_dir)  # the caller's own is left
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    mmpeft.BridgeForConditionalGeneration.from_pretrained("saved")
    shutil.copytree(encoder_dir, "vit")  # a folder without a slash in its name
    TimmEncoderConfig("vit", image_size=64).build()
    with pytest.raises(ValueError, match="cannot be loaded by timm"):
        TimmEncoderConfig(str(llm_dir), image_size=64).build()


def test_float16_is_not_taken_for_other_weights(saved, make_bridge, tmp_path):
    with pytest.raises(ValueError, match="in float32; whether .* between float16"):
        mmpeft.load(saved, dtype="float16")
    half, processor = make_bridge("none", dtype="float16")
    for part in (half, processor):
        part.save_pretrained(tmp_path / "half")
    assert mmpeft.load(tmp_path / "half", dtype=torch.float16)[0].language_model.dtype.itemsize == 2
    with pytest.raises(ValueError, match="trained on a language model in float16"):
        mmpeft.load(tmp_path / "half", dtype="float32")
