"""Replies to prompts that start alike: the same as row by row, and less is computed."""

import base64
import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mmpeft import prefix
from mmpeft.chat_session import ChatSession, Figures
from mmpeft.evaluate import draw_rows, generate_replies
from mmpeft.gate import GATES
from mmpeft.prefix import Gallery, Prompt, SharedPrompts

from .conftest import assistant, user

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def prompts(images):
    """Several questions on each of three pictures, two of them alike, and some without."""
    asked = [
        ("what?", 0),
        ("what now?", 0),
        ("so?", 0),
        ("what?", 1),
        ("a longer one?", 1),
        ("q", 2),
    ]
    seeing = [[SYSTEM, user(images[number], words)] for words, number in asked]
    return [*seeing, [SYSTEM, user("hello")], [SYSTEM, user("hello there")], seeing[0]]


@pytest.fixture
def ids(monkeypatch):
    """Positions that each forward computes: (rows, tokens)."""
    shapes = []

    def watch(model):
        forward = model.language_model.forward

        def run(*args, inputs_embeds, **kwargs):
            shapes.append(tuple(inputs_embeds.shape[:2]))
            return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

        monkeypatch.setattr(model.language_model, "forward", run)
        return shapes

    return watch


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_replies_are_those_of_each_prompt_alone(make_bridge, prompts, gate, size):
    model, processor = make_bridge(gate=gate)
    alone = generate_replies(model, processor, prompts, 6, 1, None, False)
    assert generate_replies(model, processor, prompts, 6, size, None) == alone
    assert len(set(alone)) > 3
    with model.disable_adapter():
        base = generate_replies(model, processor, prompts, 6, 1, None, False)
        assert generate_replies(model, processor, prompts, 6, size, None) == base != alone


def test_rows_that_end_early_leave_the_batch(tiny, prompts, ids):
    model, processor = tiny
    rows = [Prompt.of(processor, prompt) for prompt in prompts[:6]]
    long = SharedPrompts(model, processor).replies(rows, 8, 64)
    model.generation_config.eos_token_id = ends = sorted({reply[2] for reply in long})
    shapes = ids(model)
    cut = SharedPrompts(model, processor).replies(rows, 8, 64)
    for short, whole in zip(cut, long, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), 8)
        assert short == whole[: first + 1]
    steps = sum(count for count, tokens in shapes if tokens == 1)
    assert steps == sum(len(reply) - 1 for reply in cut)  # the first comes with the prompt


def test_pictures_are_encoded_once_and_stay_known(tiny, prompts, monkeypatch):
    model, processor = tiny
    encode, seen = model.encode_images, []

    def count(pixels, sizes=None):
        seen.append(len(pixels))
        return encode(pixels, sizes)

    monkeypatch.setattr(model, "encode_images", count)
    sharing = SharedPrompts(model, processor)
    first = generate_replies(model, processor, prompts, 4, 2, None, sharing)
    assert sum(seen) == 3
    assert generate_replies(model, processor, prompts[::-1], 4, 2, None, sharing) == first[::-1]
    assert sum(seen) == 3


def test_common_starts_run_once(tiny, prompts, ids):
    model, processor = tiny
    rows = [Prompt.of(processor, prompt) for prompt in prompts]
    shapes = ids(model)
    sharing = SharedPrompts(model, processor)
    assert sharing.shares(100, 1)
    del shapes[:]
    sharing.replies(rows, 1, 64)
    computed = sum(count * tokens for count, tokens in shapes)
    assert shapes[0][0] == 1 and shapes[0][1] > 20  # what all start with
    assert computed < 0.6 * sum(len(row.marks) for row in rows)  # padding included


def test_the_gallery_forgets_what_was_not_asked_for_longest(tiny, images):
    model, processor = tiny
    gallery = Gallery(model, processor)
    one, two, three = (Prompt.of(processor, [user(image)]) for image in images)
    with torch.inference_mode():
        gallery.embeds([one])
        gallery.limit = 2 * next(iter(gallery._features.values()))[0].nbytes
        for prompt in (two, one, three):
            assert list(gallery.embeds([prompt])) == [prompt.pictures[0][0]]
    assert set(gallery._features) == {p.pictures[0][0][0] for p in (one, three)}


def test_equal_pictures_are_one_whatever_they_come_as(images, tmp_path):
    images[0].save(tmp_path / "a.png")
    assert prefix.picture_key(tmp_path / "a.png") == prefix.picture_key(str(tmp_path / "a.png"))
    assert prefix.picture_key(images[0]) == prefix.picture_key(images[0].copy())
    assert prefix.picture_key(images[0]) != prefix.picture_key(images[1])
    with pytest.raises(FileNotFoundError, match=r"gone.png does not exist"):
        prefix.picture_key("gone.png")


def test_a_picture_may_be_a_data_url(tiny, images):
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert len(url) > 4096  # no path is as long
    assert prefix.picture_key(url) == prefix.picture_key(buffer.getvalue())
    model, processor = tiny
    expected = [[user(images[0], "what?")], [user(images[0], "what now?")]]
    prompts = copy.deepcopy(expected)
    for prompt in prompts:
        prompt[0]["content"][0]["image"] = url
    replies = [
        generate_replies(model, processor, given, 6, 2, None) for given in (prompts, expected)
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_beams": 2}, "asks for beam_search"),
        ({"use_cache": False}, "keeps no cache"),
        ({"no_repeat_ngram_size": 2}, "has no_repeat_ngram_size 2, which reads padding"),
        ({"repetition_penalty": 1.3}, "has repetition_penalty 1.3"),
        ({"min_length": 5}, "has min_length 5"),
    ],
)
def test_settings_of_the_llm_that_are_not_greedy_are_kept(
    tiny, prompts, setting, reason, monkeypatch, capsys
):
    model, processor = tiny
    model.generation_config.update(**setting)
    monkeypatch.setattr(SharedPrompts, "replies", None)
    options = (model, processor, prompts, 4, 1, None)
    assert generate_replies(*options) == generate_replies(*options, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prompts share no starts: ") and reason in line


def test_a_setting_that_generate_ignores_hinders_nothing(tiny, prompts):
    model, processor = tiny
    options = (model, processor, prompts, 4, 3, None)
    plain = generate_replies(*options)
    model.generation_config.cache_implementation = "hybrid"
    assert SharedPrompts(model, processor).why_not() is None
    assert generate_replies(*options) == plain


def test_copies_of_a_cache_are_apart():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    other = prefix.copy_cache(cache)
    other.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 4)
    other.crop(-2)
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 2)


def test_pictures_before_everything_else_share_what_their_questions_share(tiny, images, ids):
    model, processor = tiny
    processor.images_first = True  # so different pictures have nothing in common
    prompts = [[user(image, f"what is number {n}?")] for image in images[:2] for n in range(5)]
    options = (model, processor, prompts, 1, 64, None)
    alone = generate_replies(*options, False)
    rows = [Prompt.of(processor, prompt) for prompt in prompts]
    assert prefix.common_prefix(rows) == 0
    sharing = SharedPrompts(model, processor)
    assert sharing.shares(100, 1)
    shapes = ids(model)
    assert generate_replies(*options, sharing) == alone
    assert shapes[0][0] == 2  # both pictures, each once
    assert sum(n * tokens for n, tokens in shapes) < 0.5 * sum(len(row.marks) for row in rows)


def test_what_shares_nothing_is_not_probed(tiny, images, monkeypatch):
    model, processor = tiny
    processor.images_first = True
    monkeypatch.setattr(SharedPrompts, "_try_hole", lambda self: 1 / 0)
    apart = [[user(image, "what?")] for image in images]
    for prompts in (apart, [[user("hello")]]):
        options = (model, processor, prompts, 4, 3, None)
        assert generate_replies(*options) == generate_replies(*options, False)


@pytest.fixture
def long_rope(llm_dir, make_bridge, tmp_path):
    """A bridge whose rotary positions change for sequences of more than 96 tokens."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    llm.config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 96,
    }  # fmt: skip
    llm.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path)
    return make_bridge(language_model=str(tmp_path))


def test_no_start_is_shared_by_rows_that_outgrow_its_positions(long_rope):
    model, processor = long_rope
    asked = ["a question" * n for n in (1, 2, 6, 7)]
    prompts = [[SYSTEM, user(words)] for words in asked]
    lengths = [len(Prompt.of(processor, prompt).marks) for prompt in prompts]
    assert min(lengths) < 80 and max(lengths) > 100
    options = (model, processor, prompts, 8, 1, None)
    assert generate_replies(*options) == generate_replies(*options, False)
    sharing = SharedPrompts(model, processor)
    assert sharing.shares(80, 16) and not sharing.shares(80, 17)
    chat, turns = ChatSession(model, processor), []
    reused = []
    for words in ("short", "and", "this is a question of some length", "last"):
        turns = [*turns, user(words)]
        *_, alone = ChatSession(model, processor).stream(turns, max_new_tokens=8)
        figures = Figures()
        *_, reply = chat.stream(turns, max_new_tokens=8, figures=figures)
        assert reply == alone
        reused.append((figures.prompt_tokens + 8 > 96, figures.reused_tokens > 0))
        turns.append(assistant(reply))
    assert reused[1] == (False, True) and reused[-1] == (True, False)


def test_pictures_of_several_sizes(make_bridge, images):
    from mmpeft.layout import ResolutionConfig

    model, processor = make_bridge(resolution=ResolutionConfig(mode="tiles", max_area=4))
    shapes = [images[0], images[0].resize((64, 64)), images[1].resize((64, 200))]
    prompts = [[user(shape, words)] for shape in shapes for words in ("what?", "what is that?")]
    prompts.append([user(shapes[0], "or", shapes[1], "?"), assistant("a"), user("b")])
    options = (model, processor, prompts, 4, 3, None)
    assert generate_replies(*options) == generate_replies(*options, False)


def test_a_connector_that_reads_the_question(make_bridge, llm_dir, images, monkeypatch):
    from mmpeft.connectors.qformer import QFormerConnectorConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, processor = make_bridge(
        connector=QFormerConnectorConfig(
            num_query_tokens=4, intermediate_size=24, max_position_embeddings=64, vocab_size=300,
            instruction=True, tokenizer=llm_dir, **sizes,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in model.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    asked = [("what?", 0), ("what is it?", 0), ("what?", 1), ("who?", 1), ("what?", 0)]
    prompts = [[SYSTEM, user(images[number], words)] for words, number in asked]
    one, other = (Prompt.of(processor, prompt) for prompt in prompts[:2])
    same = prefix.common_prefix([one, other])
    assert not any(one.types[:same])  # the question is in the picture's tokens
    options = (model, processor, prompts, 6, 4, None)
    alone = generate_replies(*options, False)
    encode, seen = model.encode_images, []
    monkeypatch.setattr(model, "encode_images", lambda *a: seen.append(len(a[0])) or encode(*a))
    assert generate_replies(*options) == alone
    assert sum(seen) == 2


@pytest.mark.starter
def test_starter_models_reply_alike(starter_path):
    from mmpeft import BridgeForConditionalGeneration, BridgeProcessor
    from mmpeft.connectors.mlp import MLPConnectorConfig
    from mmpeft.encoder import TimmEncoderConfig
    from mmpeft.tasks.easy_vqa import EasyVQA

    torch.manual_seed(0)
    model = BridgeForConditionalGeneration.from_parts(
        TimmEncoderConfig(starter_path("efficientnet-lite0"), image_size=64),
        MLPConnectorConfig(), starter_path("smollm2-135m-instruct"),
    ).eval()  # fmt: skip
    processor = BridgeProcessor.from_model(model)
    _, _, chats = draw_rows(EasyVQA(starter_path("easy-vqa")), 12, 0)
    options = (model, processor, [chat[:-1] for chat in chats], 8)
    alone = generate_replies(*options, 1, None, False)
    assert generate_replies(*options, 12, None) == alone
