"""Tiny random parts on disk, so that every test builds a whole bridge in well under a second."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a bug
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import pytest
import torch
import yaml
from PIL import Image

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory):
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory):
    """A random timm ViT with a class token, 4 x 4 patches."""
    import timm

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=0)
    timm.models.save_for_hf(model, folder, model_args={"img_size": 64}, safe_serialization=True)
    return str(folder)


@pytest.fixture
def make_bridge(llm_dir, encoder_dir):
    """Build a tiny bridge; LoRA's B is filled so that the adapter acts."""
    from peft import LoraConfig

    from mmpeft import BridgeForConditionalGeneration, BridgeProcessor
    from mmpeft.connectors.mlp import MLPConnectorConfig
    from mmpeft.encoder import TimmEncoderConfig

    def make(
        gate="sample", adapter="lora", connector=None, dtype="float32", language_model=None,
        resolution=None,
    ):  # fmt: skip
        torch.manual_seed(1)
        if adapter == "lora":
            adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model = BridgeForConditionalGeneration.from_parts(
            TimmEncoderConfig(encoder_dir, image_size=64), connector or MLPConnectorConfig(),
            language_model or llm_dir, adapter=adapter, gate=gate, dtype=dtype,
            resolution=resolution,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        return model, BridgeProcessor.from_model(model)

    return make


@pytest.fixture
def tiny(make_bridge):
    """(model, processor), gate sample."""
    return make_bridge()


@pytest.fixture(scope="session")
def images():
    """Three different pictures."""
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 256, (3, 48, 80, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


def user(*parts):
    """A user message of text and pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def model_inputs(processor, chats, **kwargs):
    """Chats as a padded batch of tensors."""
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
        **{"add_generation_prompt": True, **kwargs},
    )  # fmt: skip


@pytest.fixture
def jsonl(tmp_path):
    """Write rows to a JSONL file, return its path."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def starter_path():
    """Local directory of a starter asset; skips only when it cannot be downloaded."""
    from mmpeft import starter

    def path(name):
        try:
            return str(starter.path(name))
        except starter.DownloadError as error:
            pytest.skip(f"starter asset {name} cannot be downloaded: {error}")

    return path


@pytest.fixture
def recipe(tmp_path, encoder_dir, llm_dir, jsonl, images):
    """A tiny recipe on disk, with its data."""
    from .test_config import write_recipe

    rows = []
    for i in range(12):
        images[i % 3].save(tmp_path / f"{i}.png")
        question = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"number {i}"}]
        rows.append({"messages": [{"role": "user", "content": question},
                                  assistant("yes" if i % 2 else "a longer no")]})  # fmt: skip
    data = jsonl(rows)
    return write_recipe(tmp_path, encoder=encoder_dir, llm=llm_dir, data=data)


@pytest.fixture
def write_grid(recipe):
    """Write a grid on the tiny recipe, with the keys given."""
    from .compare_sample import AXES

    def write(**keys):
        keys = {
            "recipe": recipe.name, "output_dir": str(recipe.parent / "out"), "axes": AXES,
            "overrides": {"align": None, "instruct.max_steps": 2}, "seeds": [0],
            "exclude": [{"method": "ia3", "rank": 4}, {"method": "ia3", "rank": 2}],
            "evaluate": {"samples": 4},
        } | keys  # fmt: skip
        path = recipe.parent / "grid.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    return write


@pytest.fixture
def in_process(monkeypatch):
    """Run cells here; returns the names of those that were run."""
    from mmpeft.compare import run
    from mmpeft.compare.cell import run_cell

    ran = []

    def start(folder, log, lock):
        ran.append(folder.name)
        run_cell(folder)
        return 0

    monkeypatch.setattr(run, "start", start)
    return ran
