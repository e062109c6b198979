"""Recipes: typed, overridable, and strict about names."""

import os
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from mmpeft import config
from mmpeft.stage import StageConfig

SHIPPED = sorted(Path(str(files("mmpeft.configs"))).glob("*.yaml"))

RECIPE = """
output_dir: {output_dir}
model:
  vision_encoder: {{class_path: TimmEncoderConfig, init_args: {{name: {encoder}, image_size: 64}}}}
  connector: {{class_path: MLPConnectorConfig}}
  language_model: {llm}
  adapter: {{class_path: LoraConfig, init_args: {{r: 4, target_modules: [q_proj, v_proj]}}}}
  gate: sample
data:
  task: {{class_path: Messages, init_args: {{train: {data}, test: {data}}}}}
align: {{max_steps: 4, per_device_train_batch_size: 2, use_cpu: true, save_steps: 2}}
instruct:
  max_steps: 8
  per_device_train_batch_size: 2
  use_cpu: true
  save_steps: 2
  logging_steps: 1
  connector_learning_rate: 1e-4
  adapter_learning_rate: 1e-2
speed: {{feature_cache: off}}
"""


def write_recipe(folder, **values):
    values = {"output_dir": folder / "run", "encoder": "e", "llm": "l", "data": "d"} | values
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(**values))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_opens_with_its_launch_command(path):
    parsed, resolved = config.load(path)
    assert parsed.model.gate in ("none", "sample", None)
    assert f"mmpeft train configs/{path.name}" in path.read_text().split("\n\n")[0]
    again = Path(parsed.output_dir).name  # the resolved recipe is a recipe, too
    assert again in resolved


def test_scientific_notation_is_a_float_and_the_command_line_wins(tmp_path):
    parsed, _ = config.load(
        write_recipe(tmp_path),
        ["--instruct.max_steps", "3", "--model.adapter.init_args.r", "2", "--model.gate=none"],
    )
    assert parsed.instruct.connector_learning_rate == 1e-4
    assert isinstance(parsed.instruct.connector_learning_rate, float)
    assert (parsed.instruct.max_steps, parsed.model.adapter.r, parsed.model.gate) == (3, 2, "none")


def test_replay_on_the_command_line(tmp_path):
    replay = ["--data.replay", "Messages", "--data.replay.init_args.train", "replay.jsonl"]
    parsed, _ = config.load(write_recipe(tmp_path), [*replay, "--data.replay_share", "0.3"])
    assert (parsed.data.replay.train, parsed.data.replay_share) == ("replay.jsonl", 0.3)
    assert parsed.data.task.train == "d"
    with pytest.raises(ValueError, match="set model.adapter and instruct"):
        config.load(write_recipe(tmp_path), [*replay, "--instruct", "null"])


def test_the_resolved_recipe_reads_back_the_same(tmp_path):
    _, resolved = config.load(write_recipe(tmp_path))
    again = tmp_path / "again.yaml"
    again.write_text(resolved)
    assert config.load(again)[1] == resolved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gate:", "gaet:", "'gate'"),
        ("max_steps: 8", "max_stpes: 8", "'max_steps'"),
        ("r: 4", "rr: 4", "'r'"),
        ("image_size", "image_sise", "'image_size'"),
        ("align:", "aling:", "'align'"),
        ("MLPConnectorConfig", "MLPConectorConfig", "'MLPConnectorConfig'"),
        ("TimmEncoderConfig", "TimEncoderConfig", "'TimmEncoderConfig'"),
        ("LoraConfig", "LoarConfig", "'LoraConfig'"),
        ("class_path: Messages", "class_path: Mesages", "'Messages'"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path, old, new, message):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=f"Did you mean {message}") as error:
        config.load(path)
    assert "\n" not in str(error.value) and "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "gate: sample",
            "gate: sometimes",
            "model.gate is 'sometimes'; use none, sample, image_tokens, after_image or null.$",
        ),
        ("gate: sample", "gate: samples", "Did you mean 'sample'"),
        ("r: 4", "r: four", "model.adapter.r is 'four'; use a whole number.$"),
        ("gate:", "rank: otto\n  gate:", "model.rank is 'otto'; use auto, a whole number or null."),
        ("data:", "data:\n  fraction: 0", "data.fraction is 0.*; it must lie above 0"),
        ("data:", "data:\n  fraction: 1.5", "data.fraction is 1.5; it must lie above 0"),
        ("data:", "data:\n  replay_share: 1.0", "replay_share is 1.0; it must lie above 0"),
        ("data:", "data:\n  replay: {class_path: Mesages}", "replay: .*Did you mean 'Messages'"),
        ("max_steps: 8", "max_steps: many", "instruct.max_steps is 'many'; use a whole number.$"),
        ("max_steps: 8", "lr_scheduler_type: cosin", "cosin is not a valid SchedulerType"),
        ("output_dir", "  - output_dir", "recipe.yaml"),
        ("{feature_cache: off}", "off", "speed is False; write its keys below it, or leave speed "),
        ("{feature_cache: off}", "", "speed is empty; write its keys below it, or leave"),
        ("{feature_cache: off}", "fast", "speed is 'fast'; write its keys below it"),
        ("gate:", "resolution: [1]\n  gate:", "model.resolution is .1.; write its keys below it"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(tmp_path, old, new, message):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        config.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("init_args: {r: 4, target_modules: [q_proj, v_proj]}", "r: 8",
         "model.adapter has r beside class_path; write {class_path: NAME, init_args: "),
        ("class_path: LoraConfig, init_args: {r: 4,", "class_path: AdaLoraConfig, init_args: {",
         "AdaLoraConfig needs total_step; give a large number"),
        ("class_path: LoraConfig, ", "", "model.adapter has init_args but no class_path; write"),
        ("{class_path: LoraConfig, init_args: {r: 4, target_modules: [q_proj, v_proj]}}", "{}",
         "model.adapter is empty, it has no class_path; write .*, or null for none"),
        ("{class_path: LoraConfig, init_args: {r: 4, target_modules: [q_proj, v_proj]}}",
         "[{class_path: LoraConfig}]", "model.adapter is a list; write one part"),
        ("{r: 4, target_modules: [q_proj, v_proj]}", "null", "model.adapter.init_args is None"),
        ("{class_path: MLPConnectorConfig", "{class_path: MLPConnectorConfig, standardize: false",
         "model.connector has standardize beside class_path"),
        ("Messages, init_args: {train: d, test: d}", "Messages, train: d",
         "data.task has train beside class_path"),
    ],
)  # fmt: skip
def test_how_a_part_is_written_is_said(tmp_path, old, new, message):
    path = write_recipe(tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        config.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_steps", "0", "max_steps is 0; it must be 1 or more, or left out.$"),
        ("per_device_train_batch_size", "0", "size is 0; it must be 1 or more.$"),
        ("gradient_accumulation_steps", "-1", "steps is -1; it must be 1 or more.$"),
        ("save_total_limit", "-1", "save_total_limit is -1; it must be 1 or more.$"),
        ("adapter_learning_rate", "-1", "adapter_learning_rate is -1.0; it must be 0 or more.$"),
        ("kl_weight", "-1", "kl_weight is -1.0; it must be 0 or more.$"),
        ("learning_rate", "0.5", "learning_rate of a stage is 0.5; leave it out: set "
         "connector_learning_rate and adapter_learning_rate.$"),
        ("seed", "3", "seed of a stage is 3; leave it out: set seed of the recipe.$"),
        ("data_seed", "3", "leave it out: set seed of the recipe.$"),
        ("output_dir", "out", "leave it out: set output_dir of the recipe.$"),
        ("label_smoothing_factor", "0.1", "leave it out: the bridge's own loss has no smoothing"),
        ("neftune_noise_alpha", "5", "leave it out: a frozen LLM's embeddings take no noise"),
        ("save_only_model", "true", "leave it out: --resume needs the optimizer"),
        ("eval_strategy", "steps", "leave it out: retention of the recipe watches"),
        ("eval_on_start", "true", "leave it out: retention of the recipe watches"),
        ("ignore_data_skip", "true", "leave it out: --resume would learn from the first samples"),
        ("lr_scheduler_kwargs", '{"min_lr": 1e-4}', "kwargs.min_lr is a .*use .* min_lr_rate"),
        ("lr_scheduler_kwargs", '{"lr_end": 1e-4}', "kwargs.lr_end is a .*use .* min_lr_rate"),
        ("load_best_model_at_end", "true", "leave it out: retention of the recipe keeps the best"),
        ("save_strategy", "best", "save_strategy best needs an evaluation"),
        ("remove_unused_columns", "true", "leave it out: samples are made of rows"),
        ("train_sampling_strategy", "group_by_lenght",
         "'group_by_lenght'; use .* Did you mean 'group_by_length'"),
        ("report_to", "nowhere", "report_to is 'nowhere', whose package is not installed"),
    ],
)  # fmt: skip
def test_a_key_of_transformers_that_would_do_nothing_or_harm_is_refused(
    tmp_path, option, value, message
):
    for stage in ("align", "instruct"):
        with pytest.raises(ValueError, match=message) as error:
            config.load(write_recipe(tmp_path), [f"--{stage}.{option}", value])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--instruct.max_steps", "-1", "--instruct.num_train_epochs", "0"],
         "num_train_epochs is 0.0; it must be above 0.$"),
        (["--data.max_length", "0"], "data.max_length is 0; it must be 1 or more.$"),
        (["--data.chats_per_sample", "0"], "data.chats_per_sample is 0; it must be 1 or more.$"),
        (["--align", "null", "--instruct", "null"], "there is no stage to train; set align"),
        (["--instruct", "yes"], "instruct is .*yes.*; write its keys below it, or null"),
        (["--model.resolution", "tiles"], "resolution"),
        (["--model.adapter.r", "auto"], "use a whole number. For a search set model.rank: auto.$"),
        (["--model.adapter.rank", "auto"], "'rank' of LoraConfig. Did you mean 'model.rank'?"),
    ],
)  # fmt: skip
def test_values_that_train_nothing_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as error:
        config.load(write_recipe(tmp_path), words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data:", "instrukt: {}\ndata:", "unknown key 'instrukt'. Did you mean 'instruct'?"),
        ("gate:", "adaptor: {}\n  gate:", "unknown key 'adaptor'. Did you mean 'adapter'?"),
    ],
)
def test_an_unknown_key_is_refused_though_it_holds_nothing(tmp_path, old, new, message):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_an_unknown_key_like_no_other_lists_those_of_its_section(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("feature_cache: off", "x: 1"))
    with pytest.raises(ValueError, match="unknown key 'x'. Known: compile, .*supervised") as error:
        config.load(path)
    assert "lora_alpha" not in str(error.value)


def test_misspelt_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'max_steps'"):
        config.load(write_recipe(tmp_path), ["--instruct.max_step", "3"])
    with pytest.raises(ValueError, match="Did you mean 'seed'"):
        config.load(write_recipe(tmp_path), ["--sed", "3"])


def test_missing_recipe():
    with pytest.raises(FileNotFoundError, match=r"recipe nope.yaml does not exist"):
        config.load("nope.yaml")


def test_a_model_without_a_part_says_which(tmp_path):
    path = write_recipe(tmp_path)
    lines = [line for line in path.read_text().splitlines() if "MLPConnector" not in line]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="model lacks connector; set it, or model.start_from"):
        config.load(path)


@pytest.mark.parametrize(
    ("cuda", "cores", "processes", "given", "workers"),
    [
        (False, 16, 1, None, 0),
        (True, 16, 1, None, 4),
        (True, 3, 1, None, 2),
        (True, 1, 1, None, 0),
        (True, 16, 8, None, 1),
        (True, 4, 8, None, 0),
        (False, 1, 1, 2, 2),
        (True, 16, 1, 0, 0),
    ],
)
def test_workers_are_for_a_device_that_would_wait(
    monkeypatch, cuda, cores, processes, given, workers
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")  # so that it is put back
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    stage = StageConfig(dataloader_num_workers=given)
    assert stage.dataloader_num_workers == workers
    assert stage.dataloader_persistent_workers == (workers > 0)
    assert stage.dataloader_pin_memory == cuda
    quiet = os.environ.get("TOKENIZERS_PARALLELISM")
    assert quiet == ("false" if workers else None)
    kept = StageConfig(
        dataloader_num_workers=3, dataloader_pin_memory=False, dataloader_persistent_workers=False
    )
    assert not kept.dataloader_pin_memory and not kept.dataloader_persistent_workers


@pytest.mark.parametrize(
    "name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"]
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_reentrant_checkpointing_is_refused(name):
    # prompts and prefixes are shared by layers: torch ended in "backward a second time"
    with pytest.raises(ValueError, match="use_reentrant true .*leave it out"):
        StageConfig(**{name: {"use_reentrant": True}})


@pytest.mark.parametrize(
    "words",
    [["--model.adapter", "BottleneckConfig"], ["--model.adapter=BottleneckConfig"],
     ["--model.adapter", "mmpeft.tuners.BottleneckConfig"],
     ["--model.adapter", '{"class_path": "BottleneckConfig"}']],
)  # fmt: skip
def test_another_class_takes_nothing_over_from_the_recipes(tmp_path, words):
    path = write_recipe(tmp_path)
    before = config.load(path)[0].model.adapter
    found = config.load(path, [*words, "--model.adapter.init_args.bottleneck_size", "7"])[0]
    assert before.target_modules and found.model.adapter.target_modules is None
    assert found.model.adapter.bottleneck_size == 7
    # options of the class that the recipe names are changed one by one, and so is the class alone
    kept = config.load(path, ["--model.adapter.class_path", "BottleneckConfig"])[0].model.adapter
    assert set(kept.target_modules) == before.target_modules
    same = config.load(path, ["--model.adapter", "LoraConfig", "--model.adapter.r", "3"])[0]
    assert same.model.adapter.target_modules == before.target_modules and same.model.adapter.r == 3


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "seed: 3\nseed: 4\n")
    with pytest.raises(ValueError, match=r"recipe.yaml line \d+: key 'seed' is there twice"):
        config.load(path)


def test_the_resolved_recipe_leaves_open_what_the_machine_decides(tmp_path):
    parsed, resolved = config.load(write_recipe(tmp_path))
    assert "dataloader_num_workers" not in resolved and "pin_memory" not in resolved
    assert parsed.instruct.dataloader_num_workers == 0 and not parsed.instruct.dataloader_pin_memory
