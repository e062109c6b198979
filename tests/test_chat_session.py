"""Conversations go on from their KV cache, with the replies they would have had without it."""

import pytest
import torch
from tokenizers import decoders
from transformers import DynamicCache

from mmpeft.chat_session import SIDES, ChatSession, Figures

from .conftest import assistant, user


def reply(session, messages, *options, **more):
    """(reply, figures)"""
    figures = Figures()
    *_, text = session.stream(messages, *options, figures=figures, **more)
    return text, figures


def alone(session, messages, *options):
    return reply(ChatSession(session.model, session.processor), messages, *options)[0]


@pytest.fixture
def session(tiny):
    return ChatSession(*tiny)


@pytest.mark.parametrize("side", SIDES)
def test_every_turn_is_what_it_is_without_a_cache(session, images, monkeypatch, side):
    encode, encoded = session.model.encode_images, []
    monkeypatch.setattr(
        session.model, "encode_images", lambda *a: encoded.append(len(a[0])) or encode(*a)
    )
    turns, behind = [user(images[0], "what?")], 0
    asked = [user("and now?"), user(images[1], "or this?"), user("well?"), user("")]
    for question, new in zip(asked, (1, 0, 1, 0), strict=True):
        text, figures = reply(session, turns, side, 16)
        assert figures.reused_tokens >= behind and figures.reused_tokens < figures.prompt_tokens
        behind = figures.prompt_tokens - 1
        turns = [*turns, assistant(text), question]
        assert sum(encoded) == new
        assert text == alone(session, turns[:-2], side, 16)
        encoded.clear()
    assert behind > 100


def test_a_picture_opens_the_gate_for_the_words_before_it(session, images):
    turns = [user("hello")]
    first, _ = reply(session, turns, "bridge", 16)
    turns += [assistant(first), user(images[0], "what?")]
    second, figures = reply(session, turns, "bridge", 16)
    assert second == alone(session, turns, "bridge", 16)
    assert figures.reused_tokens == 0  # the adapter was off in what is cached
    base, figures = reply(session, turns, "base LLM", 16)
    assert base == alone(session, turns, "base LLM", 16) and figures.reused_tokens == 0


def test_what_stands_before_a_picture_stays_in_the_cache(make_bridge, images):
    session = ChatSession(*make_bridge("after_image"))
    turns = [user("hello")]
    first, _ = reply(session, turns, "bridge", 16)
    turns += [assistant(first), user(images[0], "what?")]
    second, figures = reply(session, turns, "bridge", 16)
    assert second == alone(session, turns, "bridge", 16)
    assert figures.reused_tokens > 0


def test_another_picture_and_another_question_share_what_stands_before(session, images):
    reply(session, [user("see ", images[0], "what?")], "bridge", 8)
    for turns in (
        [user("see ", images[1], "what?")],
        [user("see ", images[0], "where?")],
        [user("see ", images[0], "what?")],
        [user("other")],
    ):
        text, figures = reply(session, turns, "bridge", 8)
        assert text == alone(session, turns, "bridge", 8)
        assert (figures.reused_tokens > 0) is bool(len(turns[0]["content"]) > 1)


def test_the_last_conversations_stay(session):
    conversations = []
    for words in ("a question about one thing", "something else altogether, this"):
        turns = [user(words)]
        for _ in range(3):  # a conversation that goes on takes the place of what it was
            text, _ = reply(session, turns, "bridge", 8)
            turns = [*turns, assistant(text), user("and?")]
        conversations.append(turns)
    assert len(session._kept) == session.keep == 2
    for turns in conversations:
        text, figures = reply(session, turns, "bridge", 8)
        assert figures.reused_tokens > figures.prompt_tokens / 2


def test_a_session_may_keep_nothing(tiny):
    session = ChatSession(*tiny, keep=0)
    for _ in range(2):
        _, figures = reply(session, [user("hello")], "bridge", 8)
        assert figures.reused_tokens == 0 and not session._kept


def test_a_conversation_that_cannot_be_cropped_stays_unless_it_goes_on(session, monkeypatch):
    def crop(*_):
        raise RuntimeError("a sliding window has forgotten that")

    monkeypatch.setattr(DynamicCache, "crop", crop)
    reply(session, [user("a question about one thing")], "bridge", 8)
    reply(session, [user("else")], "bridge", 8)  # the opening of the turn is all they share
    assert len(session._kept) == 2
    reply(session, [user("a question about one thing?")], "bridge", 8)
    assert len(session._kept) == 2
    assert session._kept[0].marks != session._kept[1].marks


def test_beams_of_the_llms_settings_are_not_streamed(session):
    turns = [user("hello")]
    expected = reply(session, turns, "bridge", 8)[0]
    session.model.generation_config.num_beams = 3
    assert alone(session, turns, "bridge", 8) == expected


def test_spaces_at_the_start_of_a_line_stay(session, monkeypatch):
    tokenizer = session.processor.tokenizer
    # as those of SentencePiece: a space that begins what is decoded goes
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    written = "if so:\n  this, or\n that"
    ids = tokenizer(written, add_special_tokens=False).input_ids

    def generate(input_ids, streamer, **_):
        for part in (input_ids, *(torch.tensor([token]) for token in ids)):
            streamer.put(part)
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(session.model, "generate", generate)
    assert reply(session, [user("when?")])[0] == written


def test_a_reply_that_was_stopped_leaves_a_cache_that_serves(session, images):
    session.model.generation_config.eos_token_id = None
    turns = [user(images[0], "what?")]
    stream = session.stream(turns, "bridge", 200)
    next(stream)
    stream.close()
    text, figures = reply(session, turns, "bridge", 32)
    assert figures.reused_tokens == figures.prompt_tokens - 1
    assert text == alone(session, turns, "bridge", 32)


def test_figures(session):
    session.model.generation_config.eos_token_id = None
    _, figures = reply(session, [user("hello")], "bridge", 6)
    assert figures.new_tokens == 6 and 0 < figures.first_token < figures.last_token
    assert str(figures).startswith("first token ") and str(figures).endswith("tokens/s")
    _, one = reply(session, [user("hello")], "bridge", 1)
    assert one.tokens_per_second is None and "tokens/s" not in str(one)
    assert str(Figures()) == ""


def test_an_llm_whose_settings_want_no_cache_is_served_as_it_wants(session, images):
    session.model.generation_config.use_cache = False
    turns = [user(images[0], "what?")]
    text, _ = reply(session, turns, "bridge", 8)
    again, figures = reply(session, turns, "bridge", 8)
    assert text == again and figures.reused_tokens == 0 and not session._kept
