"""The starter assets: what can go wrong while one is made, and what the real ones are."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from mmpeft import starter
from mmpeft.starter import fetch

NAME = "tiny"
METADATA = "Metadata-Version: 2.1\nName: mmpeft-test-asset\nVersion: 1.0\n"
TAGS = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(folder: Path, text: str = "hello") -> fetch.Wheel:
    """A valid wheel in `folder` that pip can find through PIP_FIND_LINKS, and its pin."""
    folder.mkdir(exist_ok=True)
    file = folder / "mmpeft_test_asset-1.0-py3-none-any.whl"
    with ZipFile(file, "w") as wheel:
        wheel.writestr("mmpeft_test_asset/hello.txt", text)
        wheel.writestr("mmpeft_test_asset-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("mmpeft_test_asset-1.0.dist-info/WHEEL", TAGS)
        wheel.writestr("mmpeft_test_asset-1.0.dist-info/RECORD", "")
    return fetch.Wheel("mmpeft-test-asset", "1.0", fetch.sha256(file), file.stat().st_size)


def convert(wheel, out, report):
    """The smallest converter; counts its calls beside the cache."""
    report("unpack")
    (out / "hello.txt").write_bytes(wheel.read("mmpeft_test_asset/hello.txt"))
    with (Path(os.environ["MMPEFT_HOME"]) / "calls").open("a") as log:
        log.write("x")
    return {"length": (out / "hello.txt").stat().st_size}


def register(monkeypatch, wheel, convert=convert, disk_bytes=1000):
    asset = starter.Asset("a test asset", "MIT", wheel, convert, disk_bytes)
    monkeypatch.setitem(starter.ASSETS, NAME, asset)


def left_over(home: Path) -> list[str]:
    """What is in the cache besides lock files."""
    folder = home / "starter"
    return [x.name for x in folder.iterdir() if x.suffix != ".lock"] if folder.exists() else []


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and a pip that sees one local folder and no index."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return tmp_path / "home"


def test_import_is_light():
    code = (
        "import sys, mmpeft.starter\n"
        "print({'torch', 'transformers', 'timm', 'tqdm', 'filelock'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_unknown_name_suggests_and_lists():
    with pytest.raises(ValueError, match=r"'easy-vga'; did you mean 'easy-vqa'\?") as caught:
        starter.path("starter:easy-vga")
    assert all(name in str(caught.value) for name in starter.available())


def test_resolve_leaves_other_names_alone(tmp_path):
    assert starter.resolve("org/model") == "org/model"
    assert starter.resolve(str(tmp_path)) == str(tmp_path)


def test_made_once_with_manifest(home, tmp_path, monkeypatch, capfd):
    wheel = make_wheel(tmp_path / "links")
    register(monkeypatch, wheel)
    folder = starter.path(NAME)
    assert starter.resolve(f"starter:{NAME}") == str(folder)
    assert (home / "calls").read_text() == "x"
    assert left_over(home) == [folder.name]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["name"] == NAME and manifest["licence"] == "MIT"
    assert manifest["source"] == {"package": "mmpeft-test-asset", "version": "1.0"}
    assert manifest["wheel"]["sha256"] == wheel.sha256
    assert manifest["verified"] == {"length": 5}
    assert manifest["files"] == {"hello.txt": fetch.sha256(folder / "hello.txt")}
    streams = capfd.readouterr()
    assert streams.out == "" and "download" in streams.err and f"starter:{NAME}" in streams.err

    monkeypatch.setattr(starter, "download", None)  # the second call must not get that far
    assert starter.path(NAME) == folder


def test_progress_can_be_silenced(home, tmp_path, monkeypatch, capfd):
    register(monkeypatch, make_wheel(tmp_path / "links"))
    starter.path(NAME, progress=False)
    assert capfd.readouterr() == ("", "")


def test_wrong_hash_found_by_pip(home, tmp_path, monkeypatch):
    pinned = make_wheel(tmp_path / "links")
    other = make_wheel(tmp_path / "links", "tampered")
    register(monkeypatch, pinned)
    with pytest.raises(starter.StarterError) as caught:
        starter.path(NAME, progress=False)
    for part in ("mmpeft-test-asset 1.0", pinned.sha256, other.sha256):
        assert part in str(caught.value)
    assert not isinstance(caught.value, starter.DownloadError)
    assert left_over(home) == []


def test_wrong_hash_found_without_pip(home, tmp_path, monkeypatch):
    pinned = make_wheel(tmp_path / "links")
    other = make_wheel(tmp_path / "links", "tampered")

    def careless(wheel, requirements, folder, log, progress):
        log.touch()
        shutil.copy(next((tmp_path / "links").iterdir()), folder)
        return 0

    monkeypatch.setattr(fetch, "_pip_download", careless)
    register(monkeypatch, pinned)
    with pytest.raises(starter.StarterError, match=f"{pinned.sha256}, got {other.sha256}"):
        starter.path(NAME, progress=False)
    assert left_over(home) == []


def test_no_network(home):
    with pytest.raises(starter.DownloadError, match=r"easy-vqa 1\.0.*network.*PIP_FIND_LINKS"):
        starter.path("easy-vqa", progress=False)
    assert left_over(home) == []


def test_no_pip(home, tmp_path, monkeypatch):
    register(monkeypatch, make_wheel(tmp_path / "links"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(starter.StarterError, match="ensurepip"):
        starter.path(NAME, progress=False)
    assert left_over(home) == []


def test_too_little_space_is_seen_before_the_download(home, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7))
    monkeypatch.setattr(starter, "download", None)
    with pytest.raises(starter.StarterError, match=r"850,000,000 bytes needed, 7 available"):
        starter.path("smollm2-135m-instruct", progress=False)
    assert left_over(home) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os 28)")],
    ids=["oserror", "library"],
)
def test_disk_fills_up_during_conversion(home, tmp_path, monkeypatch, error):
    def fill(wheel, out, report):
        (out / "half").write_text("half")
        raise error

    register(monkeypatch, make_wheel(tmp_path / "links"), fill)
    with pytest.raises(starter.StarterError, match="not enough disk space for starter:tiny"):
        starter.path(NAME, progress=False)
    assert left_over(home) == []


def test_disk_fills_up_during_download(home, tmp_path, monkeypatch):
    def out_of_space(wheel, requirements, folder, log, progress):
        log.write_text("ERROR: Exception:\nOSError: [Errno 28] No space left on device\n")
        return 2

    monkeypatch.setattr(fetch, "_pip_download", out_of_space)
    register(monkeypatch, make_wheel(tmp_path / "links"))
    with pytest.raises(starter.StarterError, match="not enough disk space for starter:tiny"):
        starter.path(NAME, progress=False)
    assert left_over(home) == []


def test_failed_verification_leaves_nothing_and_can_be_repeated(home, tmp_path, monkeypatch):
    def refuse(wheel, out, report):
        raise starter.StarterError("logits are off")

    wheel = make_wheel(tmp_path / "links")
    register(monkeypatch, wheel, refuse)
    with pytest.raises(starter.StarterError, match="logits are off"):
        starter.path(NAME, progress=False)
    assert left_over(home) == []
    register(monkeypatch, wheel)
    assert (starter.path(NAME, progress=False) / "hello.txt").read_text() == "hello"


def test_leftovers_of_a_killed_process_are_replaced(home, tmp_path, monkeypatch):
    register(monkeypatch, make_wheel(tmp_path / "links"))
    stale = home / "starter" / f".{NAME}-1.0-1.partial" / "asset"
    stale.mkdir(parents=True)
    (stale / "junk").touch()
    folder = starter.path(NAME, progress=False)
    assert left_over(home) == [folder.name]
    assert not (folder / "junk").exists()


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "file"))
    with pytest.raises(starter.StarterError, match="set MMPEFT_HOME"):
        starter.path("easy-vqa", progress=False)


def test_missing_extra_is_named(home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        starter.StarterError, match=r"package gguf: pip install 'mmpeft\[starter\]'"
    ):
        starter.path("smollm2-135m-instruct", progress=False)


def test_making_an_asset_does_not_move_the_random_stream(home, tmp_path, monkeypatch):
    import torch

    def draw(wheel, out, report):
        torch.rand(3)
        return {}

    register(monkeypatch, make_wheel(tmp_path / "links"), draw)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    starter.path(NAME, progress=False)
    assert torch.equal(torch.rand(1), expected)


PROCESS = """
import sys, time
sys.path.insert(0, {tests!r})
import test_starter as t

def slow(wheel, out, report):
    time.sleep(1)
    return t.convert(wheel, out, report)

wheel = t.fetch.Wheel(*{wheel!r})
t.starter.ASSETS[t.NAME] = t.starter.Asset("a test asset", "MIT", wheel, slow, 1000)
print(t.starter.path(t.NAME, progress=False))
"""


def test_two_processes_at_once(home, tmp_path):
    wheel = make_wheel(tmp_path / "links")
    pin = (wheel.package, wheel.version, wheel.sha256, wheel.size)
    code = PROCESS.format(tests=str(Path(__file__).parent), wheel=pin)
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert (Path(printed[0]) / "hello.txt").read_text() == "hello"
    assert (home / "calls").read_text() == "x"
    assert left_over(home) == [Path(printed[0]).name]


# The real assets.


@functools.cache
def real(name: str) -> Path:
    try:
        return starter.path(name)
    except starter.DownloadError as error:
        pytest.skip(f"cannot download: {error}")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real("smollm2-135m-instruct"))


DEFAULT_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
CHATS = {
    "user": (
        [{"role": "user", "content": " Hi\n"}],
        DEFAULT_SYSTEM + "<|im_start|>user\n Hi\n<|im_end|>\n",
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "turns": (
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "  Two\n"},
            {"role": "user", "content": "{{ three }} <b>"},
        ],
        DEFAULT_SYSTEM + "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n  Two\n"
        "<|im_end|>\n<|im_start|>user\n{{ three }} <b><|im_end|>\n",
    ),
}


@pytest.mark.starter
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_text(tokenizer, chat, prompt):
    messages, expected = CHATS[chat]
    expected += "<|im_start|>assistant\n" * prompt
    render = {"tokenize": False, "add_generation_prompt": prompt}
    assert tokenizer.apply_chat_template(messages, **render) == expected
    parts = [  # the same chat with every content cut in two parts
        m | {"content": [{"type": "text", "text": x} for x in (m["content"][:2], m["content"][2:])]}
        for m in messages
    ]
    assert tokenizer.apply_chat_template(parts, **render) == expected


@pytest.mark.starter
def test_chat_template_refuses_what_it_cannot_show(tokenizer):
    for content, message in (([{"type": "image"}], "part of type image"), (5, "must be")):
        with pytest.raises(Exception, match=message):
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


@pytest.mark.starter
def test_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two\n"},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four"},
    ]
    batch = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    mask = batch["assistant_masks"]
    spoken = [token for token, said in zip(batch["input_ids"], mask, strict=True) if said]
    assert tokenizer.decode(spoken) == "Two\n<|im_end|>Four<|im_end|>"


@pytest.mark.starter
def test_language_model(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    folder = real("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight.shape == (49152, 576) == (len(tokenizer), 576)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 2
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        assert str(Path.home()) not in text and "partial" not in text
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :])


@pytest.mark.starter
@pytest.mark.parametrize(("variant", "size", "crop"), [(0, 224, 0.875), (1, 240, 0.882)])
def test_efficientnet_lite(variant, size, crop):
    import timm
    import torch
    from PIL import Image

    name = f"local-dir:{real(f'efficientnet-lite{variant}')}"
    model = timm.create_model(name, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, size, size) and config["crop_pct"] == crop
    assert list(config["mean"]) == list(config["std"]) == [0.5, 0.5, 0.5]
    assert config["interpolation"] == "bicubic"
    with Image.open(real("photographs") / "china.jpg") as image:
        pixels = timm.data.create_transform(**config)(image)[None]
    with torch.no_grad():
        assert model(pixels).argmax().item() == 698  # ImageNet: palace
        assert model.forward_features(pixels).shape[1] == 1280


@pytest.mark.starter
def test_vit():
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = real("vit-small-saliency")
    processor = AutoImageProcessor.from_pretrained(folder)
    with Image.open(real("photographs") / "flower.jpg") as image:
        pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state
    assert hidden.shape == (1, 257, 384) and hidden.isfinite().all()


@pytest.mark.starter
def test_easy_vqa():
    from PIL import Image

    folder = real("easy-vqa")
    questions = json.loads((folder / "train" / "questions.json").read_text())
    assert len(questions) == 38575
    question, answer, image = questions[0]
    assert question.endswith("?") and answer in (folder / "answers.txt").read_text().split()
    with Image.open(folder / "train" / "images" / f"{image}.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.starter
@pytest.mark.parametrize("name", sorted(starter.available()))
def test_cache_is_what_the_manifest_says(name):
    folder = real(name)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    found = {x.relative_to(folder).as_posix(): x for x in folder.rglob("*") if x.is_file()}
    found.pop("manifest.json")
    assert files == {name: fetch.sha256(file) for name, file in found.items()}


def test_a_changed_weight_fails_the_golden_check(tmp_path):
    """The numeric check is the last guard against a wrong layer mapping: it has to bite."""
    import torch

    from mmpeft.starter import vision

    golden, _ = vision.LITE_GOLDEN[0]
    assert vision._difference("x", torch.tensor(golden), golden) == 0
    for wrong in (golden[::-1], [*golden[:4], float("nan")]):
        with pytest.raises(starter.StarterError, match="off by"):
            vision._difference("x", torch.tensor(wrong), golden)
