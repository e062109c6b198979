"""Chats of every sort through tokenizers and templates: a row says what its template wrote.

The reference renders the same chat without any of our code, pictures as characters of their own.
Where a tokenizer can be read back, the ids without images are that text and the labels are what
the assistant wrote in it; everywhere, the special tokens are those the template wrote, as many
positions are marked as its pictures take, and a refusal is one line.
"""

import functools
import re
from random import Random

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mmpeft import BridgeProcessor
from mmpeft.chat_template import load_template

from .runner import READ, REFUSALS, refusal

SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]", "<image>", "<|user|>", "<|assistant|>", "<|end|>", "[CLS]", "[SEP]",
]  # fmt: skip
TEMPLATES = ("chatml", "llama3", "gemma", "mistral", "vicuna", "phi3", "zephyr", "qwen2_5")
IMAGE_TOKENS, LONGEST = 3, 400
PLACE = "\ue0f0{}\ue0f1"  # a picture in the reference; no generated text has these
WORDS = ["a", "no", "blue", " ", "  ", "\n", "\t", ".", "é", "漢", "🙂", "\0", "\x1b", "\u2028",
         "\u200b", "\ufeff", "\ue000", "\ue001", "\ue002", "<", ">", "|", "[", "]", "{{ 1 }}",
         "{% raw %}", "</", "<image", "image>", "<Image>", "\uff1cs\uff1e",
         "<S>", "\\n"]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|/[].,:!?'_{}%0123456789\n\t "
PICTURE = Image.new("RGB", (4, 4), "red")


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "b"), ("n", "o"), ("<", "|"), ("<", "s"), ("<s", ">"), ("/", "s"), ("</s", ">"),
              ("<", "/s")]  # fmt: skip
    words = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocabulary, [*merges[:4], merges[5]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(scheme: str) -> Tokenizer:
    words = ["▁", *LETTERS, "no", "▁no", "bl"]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    merges = [("n", "o"), ("▁", "no"), ("b", "l")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return backend


def _words() -> Tokenizer:
    """As BERT's: small letters, blanks lost."""
    parts = [*SPECIAL, *LETTERS.lower(), *("##" + letter for letter in LETTERS.lower())]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(parts))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _compatible() -> Tokenizer:
    """As T5's: a full-width <s> is normalised before anything is looked for."""
    backend = _pieces("first")
    backend.normalizer = normalizers.NFKC()
    return backend


TOKENIZERS = {
    "bytes": _bytes, "first": lambda: _pieces("first"), "always": lambda: _pieces("always"),
    "legacy": lambda: _pieces("legacy"), "words": _words, "compatible": _compatible,
}  # fmt: skip


@functools.cache
def processor(tokenizer: str, template: str) -> BridgeProcessor:
    own = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[tokenizer](), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", additional_special_tokens=SPECIAL[4:],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return BridgeProcessor(
        CLIPImageProcessor(), own, num_image_tokens=IMAGE_TOKENS, max_length=LONGEST,
        chat_template=load_template(template),
    )  # fmt: skip


def make(random: Random) -> tuple[str, str, list]:
    """Names of a tokenizer and a template, and messages, most of them in order."""
    odd = random.random() < 0.3
    roles = ["system"] if random.random() < 0.2 else []
    for _ in range(random.randint(1, 2)):
        roles += ["user", "assistant"]
    messages = [_message(random, role, odd) for role in roles]
    if odd and random.random() < 0.3:
        random.shuffle(messages)
    if odd and random.random() < 0.05:
        messages.insert(random.randint(0, len(messages)), _junk(random))
    return random.choice(list(TOKENIZERS)), random.choice(TEMPLATES), messages


def _message(random: Random, role: str, odd: bool) -> dict:
    content = _text(random)
    if (role == "user" and random.random() < 0.6) or random.random() < 0.1:
        content = [_part(random, odd) for _ in range(random.randint(1, 4))]
    message = {"role": role, "content": content}
    if random.random() < 0.1:
        message["name"] = _text(random)
        message["tool_calls"] = [{_text(random): {"arguments": [_text(random), 3, None]}}]
    if odd and random.random() < 0.1:
        message[random.choice(["role", "content"])] = _junk(random)
    if odd and random.random() < 0.05:
        del message[random.choice(["role", "content"])]
    return message


def _part(random: Random, odd: bool):
    kind = random.random()
    if odd and kind < 0.05:
        return _junk(random)
    if odd and kind < 0.1:
        return {"type": random.choice(["image", "text", "video", "audio", None, 3])}
    if kind < 0.3:
        return {"type": "image", "image": PICTURE}
    if kind < 0.35:
        return {"type": "video", "video": [PICTURE] * 2}
    return {"type": "text", "text": _text(random)}


def _text(random: Random) -> str:
    if random.random() < 0.01:
        return "no blue " * random.choice([50, 200, 20_000])
    pieces = []
    for _ in range(random.randint(0, 6)):
        kind = random.random()
        token = random.choice(SPECIAL)
        if kind < 0.25:
            pieces.append(token)
        elif kind < 0.35:
            pieces.append(token[: random.randint(1, len(token))])
        elif kind < 0.45:
            pieces.append(token[random.randint(0, len(token) - 1) :])
        elif kind < 0.5:
            pieces.append(chr(random.choice([random.randint(1, 0x2FF), random.randint(0, 0xE0EF)])))
        else:
            pieces.append(random.choice(WORDS))
    return "".join(pieces)


def _junk(random: Random):
    deep = "x"
    for _ in range(random.choice([3, 5000])):
        deep = [deep]
    return random.choice(
        [None, 3, 1.5, True, "", "x", [], {}, [None], [3], {"type": "text"}, [["a"]], b"a",
         "user<|im_end|>", {"a": deep}, [{"type": "text", "text": 5}], "\ud800"]
    )  # fmt: skip


def check(example) -> str:
    tokenizer, template, messages = example
    own = processor(tokenizer, template)
    try:
        row, pictures = own.encode_chat(messages)
        prompt, seen, counts = own.encode_prompt(messages)
    except REFUSALS as error:
        return refusal(error)
    ids, marks, labels = (np.array(row[k]) for k in ("input_ids", "mm_token_type_ids", "labels"))
    assert len(ids) == len(marks) == len(labels) <= LONGEST
    assert marks.sum() == IMAGE_TOKENS * len(pictures) == IMAGE_TOKENS * _pictures(messages)
    assert sum(prompt["mm_token_type_ids"]) == marks.sum() and len(seen) == len(counts)
    assert (labels[marks == 1] == -100).all()
    assert ((labels == -100) | (labels == ids)).all()
    if pictures:
        assert len(own.image_inputs(pictures)["pixel_values"]) == len(pictures)
    text, said = _reference(own, messages)
    # special tokens: those that the template writes around other words, in their order
    special = set(own.tokenizer.all_special_ids) - {own.tokenizer.unk_token_id}
    plain, _ = _reference(own, _harmless(messages))
    found = [one for one in ids[marks == 0] if one in special]
    assert own.tokenizer.convert_ids_to_tokens(found) == _spelt(plain), (found, plain)
    if tokenizer == "bytes":
        without = re.sub("\ue0f0\\d+\ue0f1", "", text)
        assert own.tokenizer.decode(ids[marks == 0]) == without
        learned = own.tokenizer.decode(ids[labels != -100])
        assert learned == re.sub("\ue0f0\\d+\ue0f1", "", said), (learned, said)
    return READ


def _spelt(text: str) -> list[str]:
    longest_first = sorted(set(SPECIAL) - {"<unk>"}, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, longest_first)), text)


def _pictures(messages) -> int:
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum({"image": 1, "video": 2}.get(part["type"], 0) for part in parts)


def _flat(messages, write) -> list[dict]:
    """The chat with strings for contents, pictures as places; ``write`` makes a text of a text."""
    flat, number = [], 0
    for message in messages:
        content = message.get("content") or ""
        pieces = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                pieces.append(write(part["text"]))
            for _ in range({"image": 1, "video": 2}.get(part["type"], 0)):
                pieces.append(PLACE.format(number))
                number += 1
        flat.append(message | {"content": "".join(pieces)})
    return flat


def _harmless(messages) -> list[dict]:
    return _flat(messages, lambda text: "x" if text else "")


def _reference(own: BridgeProcessor, messages) -> tuple[str, str]:
    """The rendered text, and in it what the assistant wrote."""
    (text,), (spans,) = render_jinja_template(
        [_flat(messages, lambda text: text)], chat_template=own.chat_template,
        return_assistant_tokens_mask=True, **own.tokenizer.special_tokens_map,
    )  # fmt: skip
    return text, "".join(text[start:end] for start, end in spans)
