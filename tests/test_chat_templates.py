"""Packaged chat templates, marks for templates without them, and whole-text tokenisation."""

import copy
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mmpeft import BridgeProcessor, chat_template, tokenise
from mmpeft.chat_template import load_template, marked_twin, marks_assistant, names

from .conftest import assistant, user

SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [{"role": "user", "content": "Hi"}, assistant("Yes. ")]
TWO = [*ONE, {"role": "user", "content": " Why?\n"}, assistant("So.")]
DATE = {"date_string": "01 Jan 2025"}

# what the published templates make of TWO up to the last question, with the generation prompt
PROMPTS = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes. <|im_end|>\n"
    "<|im_start|>user\n Why?\n<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] Hi [/INST] Yes. </s><s>[INST] Why? [/INST]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi[/INST] Yes.</s>[INST]  Why?\n[/INST]",
    "mistral_v0_2": "<s> [INST] Hi [/INST] Yes. </s> [INST]  Why?\n [/INST]",
    "mixtral": "<s>[INST] Hi [/INST]Yes. </s>[INST]  Why?\n [/INST]",
    "mplug_owl": "<s>The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\n"
    "Human: Hi\nAI: Yes. </s>\nHuman:  Why?\n\nAI:",
    "phi3": "<|user|>\nHi<|end|>\n<|assistant|>\nYes. <|end|>\n<|user|>\n Why?\n<|end|>\n"
    "<|assistant|>\n",
    "plain": "<s>User: Hi\nAssistant: Yes. </s>\nUser:  Why?\n\nAssistant:",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: Hi ASSISTANT: Yes. </s>USER:  Why?\n ASSISTANT:",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\nYes. </s>\n<|user|>\n Why?\n</s>\n<|assistant|>\n",
}
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA_SYSTEM = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 01 Jan 2025\n\n<|eot_id|>"
)
PROMPTS |= {
    "qwen2": f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{PROMPTS['chatml']}",
    "qwen2_5": f"{QWEN}<|im_end|>\n{PROMPTS['chatml']}",
    "qwen3": PROMPTS["chatml"],
    "smollm2": f"{SMOL}<|im_end|>\n{PROMPTS['chatml']}",
    "llama3_1": LLAMA_SYSTEM + PROMPTS["llama3"].removeprefix("<s>"),
    "llama3_2": LLAMA_SYSTEM + PROMPTS["llama3"].removeprefix("<s>"),
}
# where the system message goes
SYSTEMS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi",
    "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
    "llama3_1": "Today Date: 01 Jan 2025\n\nBe brief.<|eot_id|>",
    "mistral_v0_2": "<s> [INST] Be brief.\n\nHi [/INST]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>",
    "plain": "<s>Be brief.\nUser: Hi",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: ",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>",
}
SYSTEMS |= {name: SYSTEMS["chatml"] for name in ("qwen2", "qwen2_5", "qwen3", "smollm2")}


def render(template, chat, mark=True, **kwargs):
    (text,), spans = render_jinja_template(
        [chat], chat_template=template, return_assistant_tokens_mask=mark,
        **{"bos_token": "<s>", "eos_token": "</s>", **DATE, **kwargs},
    )  # fmt: skip
    return text, spans[0] if mark else None


def unmarked(template):
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


@pytest.mark.parametrize("name", names())
def test_a_packaged_template_renders_as_published(name):
    template = load_template(name)
    prompt, _ = render(template, TWO[:-1], add_generation_prompt=True)
    assert prompt == PROMPTS[name]
    if name in SYSTEMS:
        text, _ = render(template, [SYSTEM, *ONE])
        assert SYSTEMS[name] in text and text.count("Be brief.") == 1


@pytest.mark.parametrize("name", names())
def test_marks_hold_all_that_follows_the_generation_prompt(name):
    template = load_template(name)
    text, spans = render(template, TWO)
    assert len(spans) == 2
    for (start, end), turns in zip(spans, (1, 3), strict=True):
        prompt, _ = render(template, TWO[:turns], add_generation_prompt=True)
        assert text[:start] == prompt
        assert re.search(r"(</s>|<\S+>)$", text[start:end])  # the end of the turn is learned
    assert [a.strip() in text[s:e] for a, (s, e) in zip(("Yes.", "So."), spans, strict=True)]


@pytest.mark.parametrize("name", names())
def test_an_unmarked_template_is_marked_by_its_twin(name):
    marked = load_template(name)
    published = unmarked(marked)
    assert marks_assistant(marked) and not marks_assistant(published)
    rendered, _ = render(published, TWO, mark=False)
    tried = []

    def other(template):
        tried.append(template)
        return render(template, TWO)

    expected = render(marked, TWO)[1]
    assert marked_twin(published, rendered, other) == expected
    tried.clear()
    assert marked_twin(published, rendered, other) == expected
    assert len(tried) == 1  # the one that fitted is tried first


def test_no_twin_is_one_clear_error():
    odd = "{% for m in messages %}{{ '%' + m.content }}{% endfor %}"
    rendered, _ = render(odd, TWO, mark=False)
    with pytest.raises(ValueError, match="set model.chat_template to a packaged.*chatml, gemma"):
        marked_twin(odd, rendered, lambda template: render(template, TWO))


def test_a_finished_mistral_chat_loses_no_system_message():
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="no place for a system message"):
        render(load_template("mistral"), [SYSTEM, *ONE])
    text, _ = render(load_template("mistral"), [SYSTEM, *TWO[:-1]], add_generation_prompt=True)
    assert text.endswith("[INST] Be brief.\n\n Why?\n[/INST]")


def test_qwen3_thinks_of_nothing():
    template = load_template("qwen3")
    text, spans = render(template, TWO)
    assert [text[a:b] for a, b in spans] == [
        "Yes. <|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"
    ]  # fmt: skip
    off, _ = render(template, TWO[:1], add_generation_prompt=True, enable_thinking=False)
    assert off.endswith("assistant\n<think>\n\n</think>\n\n")


def test_names_and_files(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    assert load_template(str(file)) == "{{ messages }}"
    with pytest.raises(ValueError, match="'lama3' is neither.*Did you mean llama3.*Packaged: cha"):
        load_template("lama3")


# ------------------------------------------------------------------------------- tokenisation

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|/[].,:!?'_0123456789"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + ' ' }}"
    "{% else %}Answer:{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
SPACE = "▁"


def byte_level(prefix_space):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *alphabet, "Ġb", "Ġbl", "no", "Ġno"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "b"), ("Ġb", "l"), ("n", "o"), ("Ġ", "no")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece(scheme):
    """A BPE over characters and a few words; ``legacy`` puts the space in by normalising."""
    words = [SPACE, "\n", *LETTERS, "no", SPACE + "no", "bl", SPACE + "bl"]
    merges = [("n", "o"), (SPACE, "no"), ("b", "l"), (SPACE, "bl")]
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace()
    return backend


KINDS = {
    "bytes": lambda: byte_level(False),
    "bytes-prefix": lambda: byte_level(True),
    **{s: lambda s=s: sentence_piece(s) for s in ("first", "always", "never", "legacy")},
}


@pytest.fixture(params=KINDS)
def processor(request):
    backend = KINDS[request.param]()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE,
    )  # fmt: skip
    return BridgeProcessor(
        CLIPImageProcessor(), tokenizer, num_image_tokens=3, chat_template=TEMPLATE
    )


def upstream(processor, text, **options):
    """Ids and image marks of a text, as upstream makes them: <image> is a special token."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(AddedToken("<image>", normalized=False, special=True))
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(text.replace("<image>", "<image>" * 3), **options).input_ids
    pad = processor.tokenizer.pad_token_id
    return [pad if i == image else i for i in ids], [int(i == image) for i in ids]


def encode(processor, chat, **options):
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return inputs["input_ids"][0], inputs["mm_token_type_ids"][0]


def test_text_is_tokenised_as_the_tokenizer_does(processor):
    chat = [{"role": "user", "content": "no  blue?\n"}, assistant("blue no")]
    expected = processor.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert encode(processor, chat)[0] == expected


@pytest.mark.parametrize(
    "parts", [("IMG", "no"), ("IMG", "\nno"), ("IMG", " no"), ("no", "IMG", "bl"), ("IMG", "IMG")]
)
def test_images_in_the_text_are_tokenised_as_upstream_does(processor, images, parts):
    chat = [user(*(images[0] if part == "IMG" else part for part in parts)), assistant("no")]
    text = processor.apply_chat_template(chat)
    assert text.count("<image>") == parts.count("IMG")
    assert encode(processor, chat) == upstream(processor, text, add_special_tokens=False)


def test_labels_are_the_assistants_words_with_the_space_they_begin_with(processor, images):
    row, _ = processor.encode_chat([user(images[0], "bl"), assistant("no"), user("b"),
                                    assistant("blue")])  # fmt: skip
    tokenizer = processor.tokenizer
    learned = [token for token in row["labels"] if token != -100]
    words = "".join(tokenizer.convert_ids_to_tokens(learned)).replace("Ġ", SPACE)
    assert words == f"{SPACE}no</s>{SPACE}blue</s>"
    # and they follow what the generation prompt ends with
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    prompt, _ = encode(processor, [user(images[0], "bl")], add_generation_prompt=True)
    assert row["input_ids"][:first] == prompt


@pytest.mark.parametrize("before", ["", "{{ ' ' }}"])
def test_a_word_that_brings_its_space_along_is_learned_whole(processor, before):
    words = "{{ m.content }}" if before else "{{ ' ' + m.content }}"
    processor.chat_template = (
        "{% for m in messages %}:" + before + "{% generation %}" + words
        + "{% endgeneration %}{% endfor %}"
    )  # fmt: skip
    row, _ = processor.encode_chat([assistant("no")])
    learned = [token for token in row["labels"] if token != -100]
    assert processor.tokenizer.convert_ids_to_tokens(learned)[0].endswith("no")


def test_a_special_token_that_a_user_spells_is_text_like_its_neighbours(processor, images):
    tokenizer = processor.tokenizer
    ids, marks = encode(processor, [user("no ", images[0], "no </s>no bl"), assistant("no")])
    last = len(marks) - 1 - marks[::-1].index(1)
    said = ids[last + 1 : ids.index(tokenizer.convert_tokens_to_ids("A"), last)]
    # what stands behind an added token, with nothing special in it
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens(AddedToken("#mark#", normalized=False))
    whole = marked("#mark#no </s>no bl ", add_special_tokens=False, split_special_tokens=True)
    assert said == whole.input_ids[1:]
    assert ids.count(tokenizer.eos_token_id) == 1


ODD_TOKENS = [
    AddedToken("<wide>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<right>", rstrip=True, normalized=False, special=True),
    AddedToken("bl", normalized=True),
    AddedToken("lue", normalized=True, single_word=True),
    AddedToken("</s", normalized=False),  # another begins like it
]
ALONE = AddedToken("no", single_word=True, normalized=False)
PIECES = ["</s>", "<s>", "<unk>", "<|user|>", "<wide>", "<right>", "</s", "bl", "no", "blue no",
          " ", "  ", "\n", "Answer: b", "é", "."]  # fmt: skip


@pytest.mark.parametrize("words", ["no", "> no", "no <", "the </s> no"])
def test_what_the_tokenizer_puts_around_a_text_stays(processor, words):
    processor.add_special_tokens = True
    processor.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ids, _ = encode(processor, [{"role": "user", "content": words}])
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    processor.add_special_tokens = False
    assert encode(processor, [{"role": "user", "content": words}])[0] == ids[1:]


@pytest.mark.parametrize("odd", [[], ODD_TOKENS, [*ODD_TOKENS, ALONE]])
def test_what_is_remembered_of_a_text_changes_no_token(processor, odd):
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(odd)
    draw = random.Random(0)
    texts = ["", *("".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(300))]
    for text in texts:
        for special in (False, True):
            inputs = processor(text=text, add_special_tokens=special)
            special &= not text.startswith(tokenizer.bos_token)
            assert inputs["input_ids"][0] == tokenizer(text, add_special_tokens=special).input_ids


def test_threads_may_tokenise_at_the_same_time(processor):
    texts = [f"no {'</s> ' * (n % 2)}{n} bl" for n in range(600)]
    expected = [encode(processor, [user(text), assistant("bl")]) for text in texts]
    tokenise._with_mark.clear()  # and what is remembered
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda text: encode(processor, [user(text), assistant("bl")]), texts)
            assert list(found) == expected
    finally:
        sys.setswitchinterval(before)


def test_a_stretch_is_tokenised_once(processor, monkeypatch):
    asked, plain = [], tokenise._Marked.encode_once

    def encode_once(self, text, *options):
        asked.append(text)
        return plain(self, text, *options)

    monkeypatch.setattr(tokenise._Marked, "encode_once", encode_once)
    one, two = ([{"role": "user", "content": "no blue?"}, assistant(a)] for a in ("no", "blue"))
    first = processor.encode_chat(one)[0]
    count = len(asked)
    assert processor.encode_chat(one)[0] == first and len(asked) == count
    processor.encode_chat(two)
    assert len(asked) == count + 1  # the answer
    long = [{"role": "user", "content": "no " * tokenise.LONGEST}, assistant("no")]
    for _ in range(2):  # too long to be kept
        before = len(asked)
        processor.encode_chat(long)
        assert len(asked) > before


def test_a_tokenizer_that_cannot_tell_them_apart_says_so(images):
    pieces = [(t, 0.0) for t in SPECIAL] + [(c, -5.0) for c in [SPACE, *LETTERS]]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>",
    )  # fmt: skip
    processor = BridgeProcessor(
        CLIPImageProcessor(), tokenizer, num_image_tokens=3, chat_template=TEMPLATE
    )
    with pytest.raises(ValueError, match="spells '</s>', and this tokenizer makes the special"):
        encode(processor, [user("say </s>")])


@pytest.mark.parametrize(
    "text", ["USER: <image>\nno ASSISTANT:", "<image>no", "no", "<s>no<image>"]
)
def test_raw_text_is_tokenised_as_llava_does(processor, images, text):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(AddedToken("<image>", normalized=False, special=True))
    llava = LlavaProcessor(
        CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer, patch_size=14, vision_feature_select_strategy="full", image_token="<image>",
    )  # fmt: skip
    pictures = [images[0]] * text.count("<image>")
    options = {"add_special_tokens": False} if text.startswith("<s>") else {}
    expected = llava(images=pictures or None, text=text, **options)["input_ids"][0]
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor.num_image_tokens = 4
    inputs = processor(images=pictures, text=text)
    pad = processor.tokenizer.pad_token_id
    assert inputs["input_ids"][0] == [pad if i == image else i for i in expected]
    assert inputs["input_ids"][0].count(processor.tokenizer.bos_token_id) == 1  # never twice
    bare = processor(images=pictures, text=text, add_special_tokens=False)["input_ids"][0]
    assert bare == upstream_four(processor, text)


def upstream_four(processor, text):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(AddedToken("<image>", normalized=False, special=True))
    image, pad = tokenizer.convert_tokens_to_ids("<image>"), processor.tokenizer.pad_token_id
    ids = tokenizer(text.replace("<image>", "<image>" * 4), add_special_tokens=False).input_ids
    return [pad if i == image else i for i in ids]


def test_a_published_template_trains_out_of_the_box(processor, images):
    processor.chat_template = unmarked(load_template("vicuna"))
    row, _ = processor.encode_chat([user(images[0], "bl?"), assistant("no")])
    learned = [token for token in row["labels"] if token != -100]
    words = "".join(processor.tokenizer.convert_ids_to_tokens(learned)).replace("Ġ", SPACE)
    assert words == f"{SPACE}no</s>"
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template: set model.chat_template to a pack"):
        processor.encode_chat([user("a"), assistant("b")])


def test_the_processor_of_a_model_takes_a_packaged_template(tiny, images, tmp_path):
    model, _ = tiny
    processor = BridgeProcessor.from_model(model, chat_template="plain")
    assert processor.chat_template == load_template("plain")
    processor.save_pretrained(tmp_path)
    assert BridgeProcessor.from_pretrained(tmp_path).chat_template == load_template("plain")
    with pytest.raises(ValueError, match="Did you mean plain"):
        BridgeProcessor.from_model(model, chat_template="plane")
    assert chat_template.FOLDER.is_dir()
