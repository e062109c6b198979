"""Parts that cannot meet: one clear line each, and no run folder left behind."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpeft import cli

VISION = "--model.vision_encoder.init_args"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["--model.connector", "IdentityConnectorConfig"],
         ["dimensions cannot meet", "64 channels", "LLM takes 32", "LinearConnectorConfig"]),
        ([f"{VISION}.image_size", "100"], ["100 x 100", "multiples of 16", "96 x 96"]),
        (["--model.resolution.max_image_tokens", "9"],
         ["max_image_tokens is 9", "smallest image takes 16 tokens"]),
        (["--model.resolution.mode", "tiled"], ["fixed, tiles or native", "tiled"]),
        (["--model.resolution.max_image_tokns", "9"], ["max_image_tokns", "Did you mean"]),
        (["--model.resolution.max_image_token", "9"], ["max_image_token'", "Did you mean"]),
        (["--model.encoder.init_args.layers", "[2]"],
         ["unknown key 'encoder'. Did you mean 'vision_encoder'?"]),
        (["--model.vision.init_args.layers", "[2]"],
         ["unknown key 'vision'. Did you mean 'vision_encoder'?"]),
        (["--model.max_image_tokens", "9"], ["Did you mean 'model.resolution.max_image_tokens'"]),
        (["--max_image_tokens", "9"], ["Did you mean 'model.resolution.max_image_tokens'"]),
        (["--model.resolution.max_area", "9"], ["max_area is 9", "set mode to tiles or native"]),
        (["--model.connector.init_args.hidden_sise", "8"],
         ["unknown key 'hidden_sise'", "Did you mean 'hidden_size'"]),
        (["--model.connector.init_args.lora_alpha", "8"],  # is known, of another class
         ["unknown key 'lora_alpha' of MLPConnectorConfig. Known: ", "hidden_size"]),
        (["--data.lora_alpha", "8"],
         ["'data.lora_alpha': lora_alpha is an option of a part", "init_args"]),
        (["--model.connector", "MLPConectorConfig"], ["Did you mean 'MLPConnectorConfig'"]),
        (["--model.connector", "PixelShuffleConnectorConfig",
          "--model.connector.init_args.factor", "3"], ["4 x 4", "3"]),
        (["--model.connector", "PixelShuffleConnectorConfig", f"{VISION}.tokens", "all"],
         ["prefix", "tokens: patch"]),
        (["--model.connector", "IdentityConnectorConfig", "--model.language_model", "WIDE",
          "--model.adapter", "null", "--model.gate", "none"],
         ["stage align has nothing to train", "set align to null"]),
        (["--model.language_model", "TORN"], ["model-00002-of-", "missing"]),
    ],
)  # fmt: skip
def test_one_line_that_names_it(recipe, llm_dir, tmp_path, capsys, overrides, messages):
    places = {"WIDE": wide, "TORN": torn}
    made = [str(places[word](llm_dir, tmp_path)) if word in places else word for word in overrides]
    assert cli.main(["train", str(recipe), *made]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mmpeft: error: ") and len(line) < 500
    assert not [message for message in messages if message not in line], line
    assert not (tmp_path / "run").exists()


def wide(llm_dir, folder):
    """An LLM as wide as the encoder."""
    config = AutoModelForCausalLM.from_pretrained(llm_dir).config
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wide")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(folder / "wide")
    return folder / "wide"


def torn(llm_dir, folder):
    """An LLM in shards, one of which is gone."""
    where = folder / "torn"
    shutil.copytree(llm_dir, where)
    (where / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    model.save_pretrained(where, max_shard_size="20KB")
    index = json.loads((where / "model.safetensors.index.json").read_text())
    (where / sorted(set(index["weight_map"].values()))[1]).unlink()
    return where
