"""The presets: true sizes against published figures, one step of each in small, one table of all.

`python -m tests.test_presets` writes docs/presets.md anew.
"""

import json
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import pytest

import mmpeft
from mmpeft import cli, config

from .conftest import assistant

CONFIGS = Path(str(files("mmpeft.configs")))
STARTER = ("easy_vqa_align", "quickstart", "text_e2e", "tiny_cpu")
PRESETS = ("llava_v1", "llava_v1_5", "minigpt4", "instructblip", "mplug_owl", "nextgpt_image",
           "siglip_smollm2")  # fmt: skip
PINNED = {"lmsys--vicuna-7b-v1.3": ["refs/pr/4"], "lmsys--vicuna-7b-v1.5": ["refs/pr/13"]}
TABLE = Path(__file__).resolve().parent.parent / "docs" / "presets.md"


# -------------------------------------------------------------------- the hub, without a network


def fill_hub(folder: Path) -> Path:
    """A hub cache with what is in published/: the config files of the presets' models."""
    for model in (Path(__file__).parent / "published").iterdir():
        own = folder / f"models--{model.name}"
        for revision in ("main", *PINNED.get(model.name, [])):
            (own / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            (own / "refs" / revision).write_text("0" * 40)
        shutil.copytree(model, own / "snapshots" / ("0" * 40))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fill_hub(tmp_path / "hub")))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The plan of every preset that names models of the hub."""
    from huggingface_hub import constants

    from mmpeft.plan import plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(fill_hub(tmp_path_factory.mktemp("hub"))))
        return {name: plan(CONFIGS / f"{name}.yaml") for name in PRESETS}


def parameters(report) -> dict:
    return {part["part"]: part["parameters"] for part in report["parts"]}


def trained(report, stage) -> dict:
    return {part["part"]: part[stage] for part in report["parts"] if part[stage]}


# -------------------------------------------------------------------------------- at true size

# To two digits those of OpenCLIP's docs/model_profile.csv, see the test below.
CLIP_L_224, CLIP_L_336, CLIP_H, SIGLIP = 303_179_776, 303_507_456, 632_076_800, 93_520_128
EVA_G = 985_952_256  # ViT-g/14 without its last block (BLIP-2, arXiv 2301.12597, section 3.4)
# LLaMA 7B has 6.7B parameters (arXiv 2302.13971, table 2); 6,738,415,616 exactly.
LLAMA_7B = 6_738_415_616


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def lora(r, *shapes, layers=32):
    return layers * sum(r * (inputs + outputs) for inputs, outputs in shapes)


ATTENTION = [(4096, 4096)] * 4
MLP = [(4096, 11008), (4096, 11008), (11008, 4096)]

# preset: encoder, connector, LLM, adapter; trained in align, in instruct; tokens of an image
TRUE_SIZE = {
    # one linear layer, 4.2M (arXiv 2304.08485, section 4.1: 1024 to 4096); LoRA r = 64 on all
    # linear layers, LLaVA's default in llava/train/train.py
    "llava_v1": ((CLIP_L_224, linear(1024, 4096), LLAMA_7B, lora(64, *ATTENTION, *MLP)),
                 4_198_400, 4_198_400 + 159_907_840, 256),
    # two layers with GELU (arXiv 2310.03744, section 3.3; "mlp2x_gelu" in the scripts): 20.98M;
    # LoRA r = 128
    "llava_v1_5": ((CLIP_L_336, linear(1024, 4096) + linear(4096, 4096), LLAMA_7B,
                    lora(128, *ATTENTION, *MLP)), 20_979_712, 20_979_712 + 319_815_680, 576),
    # frozen Q-Former of 105M behind EVA-g (BLIP-2 without its text part), one layer 768 to 4096
    # trains: 3.1M (arXiv 2304.10592, section 3)
    "minigpt4": ((EVA_G, 105_162_240 + linear(768, 4096), LLAMA_7B, 0), 3_149_824, 3_149_824, 32),
    # "188M" trained (arXiv 2305.06500, on downstream tasks; Q-Former of arXiv 2301.12597, 3.1):
    # 188,834,560 with the layer to the LLM. Here without the last feed-forward block for text,
    # which nothing reads
    "instructblip": ((EVA_G, 188_834_560 - 4_723_968, LLAMA_7B, 0), None, 184_110_592, 32),
    # 64 queries (their configuration_mplug_owl.py), six layers of width 1024, an end token; LoRA
    # r = 8 on q and v: 4.2M. "About 7.2B" in all (arXiv 2304.14178, section 4.1)
    "mplug_owl": ((CLIP_L_224, 81_473_536, LLAMA_7B, lora(8, *ATTENTION[:2])),
                  81_473_536, 81_473_536 + 4_194_304, 65),
    # linear 4M, LoRA 33M (arXiv 2309.05519, table 1)
    "nextgpt_image": ((CLIP_H, linear(1024, 4096), LLAMA_7B, lora(32, *ATTENTION)),
                      4_198_400, 4_198_400 + 33_554_432, 1),
    # SmolLM2-360M (arXiv 2502.02737) has 361,821,120 parameters; 16 patches of 768 channels become
    # a token; a newline
    "siglip_smollm2": ((SIGLIP, linear(16 * 768, 960) + linear(960, 960) + 960,
                        361_821_120,
                        lora(16, *[(960, 960)] * 2, *[(960, 320)] * 2, *[(960, 2560)] * 3)),
                       12_720_960, 12_720_960 + 8_683_520, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_true_size_is_the_published_one(plans, name):
    report = plans[name]
    parts, align, instruct, tokens = TRUE_SIZE[name]
    assert tuple(parameters(report).values()) == parts
    assert report["stages"] == (["instruct"] if align is None else ["align", "instruct"])
    assert align is None or sum(trained(report, "align").values()) == align
    assert sum(trained(report, "instruct").values()) == instruct
    assert report["images"]["min_tokens"] == tokens
    for stage in report["stages"]:
        assert not {"vision encoder", "language model"} & set(trained(report, stage))


def test_encoders_have_the_published_sizes():
    """image_mparams of github.com/mlfoundations/open_clip, docs/model_profile.csv."""
    clip_projection = 1024 * 768  # part of CLIP's tower there
    block = 4 * 1408**2 + 2 * 1408 * 6144 + (3 + 1 + 4) * 1408 + 6144
    head, key_bias = (1408 + 1) * 1024, 39 * 1408  # transformers gives EVA's keys a bias of 0
    for ours, published in (
        (CLIP_L_224 + clip_projection, 303.97), (CLIP_L_336 + clip_projection, 304.29),
        (CLIP_H, 632.08), (SIGLIP, 93.52), (EVA_G - key_bias + block + head, 1012.59),
    ):  # fmt: skip
        assert round(ours / 1e6, 2) == published


def test_what_the_papers_say_in_all(plans):
    total = {name: sum(parameters(report).values()) for name, report in plans.items()}
    assert round(total["mplug_owl"] / 1e9, 1) in (7.1, 7.2)  # "about 7.2B"
    assert 0.004 < 37_752_832 / total["nextgpt_image"] < 0.01  # "only 1% of parameters"
    assert round(total["siglip_smollm2"] / 1e6, -2) == 500  # SmolVLM-500M


def test_high_resolution_has_a_budget_that_holds(plans):
    images = plans["siglip_smollm2"]["images"]
    assert (images["mode"], images["min_tokens"]) == ("tiles", 64)
    # 3 x 3 tiles behind a thumbnail, and a newline behind each of 24 lines
    assert images["max_tokens"] == 64 * 10 + 24 <= images["max_image_tokens"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_header_says_what_the_plan_says(plans, name):
    from mmpeft.plan import size

    header = text(name).split("\n\n")[0].replace("\n# ", " ")
    memory, stages = plans[name]["memory"], plans[name]["stages"]
    assert f" {size(memory['weights'])} of weights (" in header
    states = max(memory[stage] for stage in stages)
    assert f" {size(states)} of gradients and AdamW states" in header


# ------------------------------------------------------------------------------------ the files


def text(name):
    return (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", [*PRESETS, *STARTER])
def test_a_header_tells_launch_hardware_and_origin(name):
    header = text(name).split("\n\n")[0]
    assert f"mmpeft train configs/{name}.yaml\n" in header and "\n# Needs: " in header
    if name in PRESETS:
        assert re.search(r"# Source: .*arXiv \d{4}\.\d{5}", header, re.DOTALL)
        assert "\n# Differs: " in header and "\n# Data: " in header


def test_every_config_is_a_preset_or_a_starter():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PRESETS, *STARTER}


# -------------------------------------------------------------------------- one step, in small


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 32, "patch_size": 4}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
QFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4}  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Random models of the presets' kinds, a few thousand parameters each, saved to disk."""
    return SmallModels(tmp_path_factory.mktemp("small"))


class SmallModels:
    def __init__(self, root):
        self.root = root

    def _save(self, name, model, processor):
        model.save_pretrained(self.root / name)
        processor.save_pretrained(self.root / name)

    def clip(self):
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))
        self._save("clip", model, CLIPImageProcessor(size=32, crop_size=32))

    def siglip(self):
        from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
        self._save("siglip", model, SiglipImageProcessor(size={"height": 32, "width": 32}))

    def blip2(self):
        from transformers import (
            Blip2Config,
            Blip2ForConditionalGeneration,
            BlipImageProcessor,
            T5Config,
        )

        t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        whole = Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER | {"encoder_hidden_size": 32},
            text_config=t5.to_dict(),
        )
        processor = BlipImageProcessor(size={"height": 32, "width": 32})
        self._save("blip2", Blip2ForConditionalGeneration(whole), processor)

    def instructblip(self):
        from transformers import (
            BertTokenizer,
            BlipImageProcessor,
            InstructBlipConfig,
            InstructBlipForConditionalGeneration,
            LlamaConfig,
        )

        letters = [chr(c) for c in range(33, 127)]
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocab = special + letters + [f"##{c}" for c in letters]
        whole = InstructBlipConfig(
            vision_config=VISION,
            qformer_config=QFORMER | {"encoder_hidden_size": 32} | {"vocab_size": len(vocab)},
            text_config=LlamaConfig(**TEXT).to_dict(),
        )
        processor = BlipImageProcessor(size={"height": 32, "width": 32})
        self._save("instructblip", InstructBlipForConditionalGeneration(whole), processor)
        tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
        tokenizer.save_pretrained(self.root / "instructblip" / "qformer_tokenizer")

    def open_clip(self):
        import open_clip
        from safetensors.torch import save_file

        own = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8,
                           "patch_size": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2,
                         "layers": 1},
        }  # fmt: skip
        folder = self.root / "open_clip"
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": own, "preprocess_cfg": open_clip.get_model_preprocess_cfg(
                open_clip.CLIP(**own))})
        )  # fmt: skip
        save_file(open_clip.CLIP(**own).state_dict(), folder / "open_clip_model.safetensors")

    def __getitem__(self, kind):
        if not (self.root / kind).is_dir():
            getattr(self, kind)()
        return str(self.root / kind)


# preset: kind of small encoder; options of its connector; image tokens
SMALL = {
    "llava_v1": ("clip", {}, 64),
    "llava_v1_5": ("clip", {}, 64),
    "minigpt4": ("blip2", QFORMER, 32),
    "instructblip": ("instructblip", QFORMER | {"vocab_size": 193}, 32),
    "mplug_owl": ("clip", {"num_query_tokens": 4, "num_hidden_layers": 1, "num_attention_heads": 4},
                  5),
    "nextgpt_image": ("open_clip", {"pretrained": None}, 1),
    "siglip_smollm2": ("siglip", {}, 4),
}  # fmt: skip


@pytest.fixture
def data(tmp_path, images, jsonl):
    images[0].save(tmp_path / "0.png")
    rows = [
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": "0.png"},
                                         {"type": "text", "text": f"what is {i}"}]},
            assistant("a word"),
        ]}
        for i in range(2)
    ]  # fmt: skip
    return str(jsonl(rows))


@pytest.mark.parametrize("name", PRESETS)
def test_one_step_of_each_stage_in_small(name, small, data, llm_dir, tmp_path, capsys):
    kind, options, tokens = SMALL[name]
    parsed, _ = config.load(CONFIGS / f"{name}.yaml")
    encoder, connector = "model.vision_encoder.init_args.", "model.connector.init_args."
    overrides = {"output_dir": tmp_path / "run", "model.language_model": llm_dir,
                 "data.max_length": "null", "data.task.init_args.train": data,
                 "model.dtype": "float32", encoder + "dtype": "float32",
                 encoder + "name": small[kind]}  # fmt: skip
    if kind == "open_clip":
        overrides |= {encoder + "name": f"local-dir:{small[kind]}", encoder + "pretrained": "null"}
        options = {}
    if getattr(parsed.model.connector, "pretrained", None):
        overrides[connector + "pretrained"] = small[kind]
    overrides |= {connector + key: value for key, value in options.items()}
    if parsed.data.align is not None:
        overrides["data.align.init_args.train"] = data
    stages = [stage for stage in config.STAGES if getattr(parsed, stage) is not None]
    for stage in stages:
        own = {"max_steps": 1, "use_cpu": "true", "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 1, "logging_steps": 1}  # fmt: skip
        overrides |= {f"{stage}.{key}": value for key, value in own.items()}
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    assert cli.main(["train", str(CONFIGS / f"{name}.yaml"), *arguments]) == 0
    said = capsys.readouterr().err
    assert re.search(rf"images: {tokens}\b", said)
    assert [f"stage {stage}\n" in said for stage in config.STAGES] == [
        stage in stages for stage in config.STAGES
    ]
    model, _ = mmpeft.load(tmp_path / "run")
    assert model.config.gate == (parsed.model.gate or "none")
    assert hasattr(model.language_model, "peft_config") == (parsed.model.adapter is not None)


@pytest.mark.starter
def test_tiny_cpu_runs(starter_path, tmp_path):
    for asset in ("vit-small-saliency", "smollm2-135m-instruct", "easy-vqa"):
        starter_path(asset)
    steps = [f"--{stage}.max_steps=1" for stage in config.STAGES]
    recipe = str(CONFIGS / "tiny_cpu.yaml")
    assert cli.main(["train", recipe, f"--output_dir={tmp_path / 'run'}", *steps]) == 0
    assert (tmp_path / "run" / "checkpoint" / "connector.safetensors").is_file()


# --------------------------------------------------------------------------------- mmpeft plan


def plan_command(*arguments, capsys):
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_plan_is_a_table(plans):
    from mmpeft.plan import render

    lines = render(plans["llava_v1"]).splitlines()
    assert lines[0] == (
        "llava_v1: openai/clip-vit-large-patch14 -> Linear -> lmsys/vicuna-7b-v1.3 with Lora"
    )
    assert lines[1].split() == ["part", "parameters", "align", "trains", "share", "instruct",
                                "trains", "share"]  # fmt: skip
    assert lines[3].split() == ["connector", "4,198,400", "4,198,400", "0.06%", "4,198,400",
                                "0.06%"]  # fmt: skip
    assert lines[6].split()[:2] == ["all", "7,205,701,632"]
    assert lines[7] == "images: fixed, 256 tokens an image, 224 x 224 pixels"
    assert lines[8].startswith("memory: 14.")


def test_plan_takes_overrides_and_prints_json(hub, capsys):
    code, out, _ = plan_command(
        str(CONFIGS / "llava_v1.yaml"), "--model.adapter", "null", "--align", "null", "--json",
        capsys=capsys,
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and report["schema"] == "mmpeft.plan/1" and report["stages"] == ["instruct"]
    assert set(report) == {"schema", "recipe", "stages", "parts", "memory", "images"}
    assert report["parts"][3] == {
        "part": "adapter", "name": None, "parameters": 0, "instruct": 0
    }  # fmt: skip
    assert report["images"]["sizes"] == [[224, 224, 256]]
    weights = 2 * (LLAMA_7B + CLIP_L_224) + 4 * 4_198_400  # bfloat16; the connector in float32
    assert report["memory"] == {"weights": weights, "instruct": 12 * 4_198_400}


def test_plan_is_what_training_prints(recipe, capsys):
    """The same counts for real parts as for empty ones."""
    from mmpeft.adapters import freeze_plan, set_trainable
    from mmpeft.plan import build_empty
    from mmpeft.train import build

    parsed, _ = config.load(recipe)
    real, empty = build(parsed)[0], build_empty(config.load(recipe)[0].model)
    for model in (real, empty):
        set_trainable(model, connector=True, adapter=True)
    assert freeze_plan(real) == freeze_plan(empty)
    assert str(real.layout) == str(empty.layout)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [p.dtype for p in real.parameters()] == [p.dtype for p in empty.parameters()]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help"])
    examples = capsys.readouterr().out.split("\nexamples")[1]
    assert stop.value.code == 0 and examples.count("mmpeft plan configs/") == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.language_model", "nobody/nothing"], "config of language_model 'nobody/nothing'"),
        (["--model.vision_encoder.init_args.name", "nobody/nothing"], "nobody/nothing"),
        (["--model.gaet", "none"], "Did you mean 'gate'"),
        (["--model.resolution.max_image_tokens", "100"], "smallest image takes 256 tokens"),
    ],
)
def test_a_mistake_is_one_line(hub, capsys, overrides, message):
    code, out, err = plan_command(str(CONFIGS / "llava_v1.yaml"), *overrides, capsys=capsys)
    assert code == 2 and not out
    assert err.startswith("mmpeft: error: ") and message in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------- the table


def table(plans) -> str:
    """docs/presets.md, from the recipes, their plans and their headers."""
    lines = [
        "# Presets",
        "",
        "One published system a recipe: `mmpeft train configs/NAME.yaml`. The header of each says "
        "what it\nneeds, where its figures come from and what differs from the original; "
        "`mmpeft plan configs/NAME.yaml`\nprints these counts.",
        "",
        "| preset | encoder | connector | LLM | tokens an image | align trains | instruct trains "
        "| of all | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in plans.items():
        encoder, connector, llm, _ = (part["name"] for part in report["parts"])
        images = report["images"]
        tokens = sorted({images["min_tokens"], images["max_tokens"]})
        counts = [_million(sum(trained(report, stage).values())) if stage in report["stages"]
                  else "" for stage in config.STAGES]  # fmt: skip
        share = sum(trained(report, "instruct").values()) / sum(parameters(report).values())
        source = re.search(r"arXiv (\d{4}\.\d{5})", text(name))[1]
        lines.append(
            f"| [{name}](../configs/{name}.yaml) | {encoder} | {connector} | {llm} "
            f"| {' to '.join(map(str, tokens))} | {' | '.join(counts)} "
            f"| {share:.2%} | [{source}](https://arxiv.org/abs/{source}) |"
        )
    return "\n".join(lines) + "\n"


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def test_the_table_in_the_docs_is_the_plans(plans):
    assert TABLE.read_text() == table(plans)


if __name__ == "__main__":
    from huggingface_hub import constants

    from mmpeft.plan import plan

    constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HUB_CACHE = str(fill_hub(Path(folder)))
        TABLE.write_text(table({name: plan(CONFIGS / f"{name}.yaml") for name in PRESETS}))
