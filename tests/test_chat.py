"""The chat demo: Gradio's history to messages, streamed replies, and the page itself."""

import sys
import threading
from itertools import pairwise

import pytest
import torch

from mmpeft import chat_session
from mmpeft.chat_session import ChatSession
from mmpeft.demos import chat

from .conftest import assistant, user

NO_GRADIO = "the chat page needs gradio: pip install 'mmpeft[demo]'"


@pytest.fixture
def picture(images, tmp_path):
    """A picture's path."""
    path = str(tmp_path / "picture.png")
    images[0].save(path)
    return path


def last(stream):
    return list(stream)[-1]


def stream_reply(model, processor, messages, *options, **more):
    return ChatSession(model, processor).stream(messages, *options, **more)


def plain(model, processor, messages, max_new_tokens=24, **kwargs):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **kwargs})
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(new)[0]


# ------------------------------------------------------------------------------- to_messages


def text(string):
    return {"type": "text", "text": string}


def image(path):
    return {"type": "image", "image": path}


def test_history_of_the_page_becomes_typed_messages():
    history = [  # as gr.Chatbot hands it over
        {
            "role": "user",
            "metadata": None,
            "options": None,
            "content": [
                {"type": "file", "file": {"path": "a.png", "url": "x"}, "alt_text": None},
                {"type": "file", "file": {"path": "b.png"}, "alt_text": None},
                {"type": "text", "text": "what are these?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "shapes"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    ]
    assert chat.to_messages(history, {"text": "and this?", "files": ["c.png"]}) == [
        {"role": "user", "content": [image("a.png"), image("b.png"), text("what are these?")]},
        {"role": "assistant", "content": [text("shapes")]},
        {"role": "user", "content": [text("sure?")]},
        {"role": "assistant", "content": [text("")]},
        {"role": "user", "content": [image("c.png"), text("and this?")]},
    ]


def test_history_of_the_api_becomes_typed_messages():
    history = [  # not normalised by gr.Chatbot
        {"role": "user", "content": [{"path": "a.png"}, "what?"]},
        {"role": "assistant", "content": "a shape"},
    ]
    message = {"text": "", "files": [{"path": "b.png"}]}  # retry hands over dicts
    assert chat.to_messages(history, message) == [
        {"role": "user", "content": [image("a.png"), text("what?")]},
        {"role": "assistant", "content": [text("a shape")]},
        {"role": "user", "content": [image("b.png")]},
    ]


def test_turns_that_failed_are_left_out():
    failed = {"role": "assistant", "content": "cannot be read", "metadata": {"title": chat.FAILED}}
    history = [
        {"role": "user", "content": [{"path": "broken.png"}]},
        failed,
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "metadata": None},
        {"role": "user", "content": "stopped at once"},
        {"role": "user", "content": "much too long"},
        failed,
    ]
    assert chat.to_messages(history, {"text": "bye", "files": []}) == [
        {"role": "user", "content": [text("hello")]},
        {"role": "assistant", "content": [text("hi")]},
        {"role": "user", "content": [text("bye")]},
    ]


def test_an_empty_message_is_refused():
    with pytest.raises(ValueError, match="message is empty; write something"):
        chat.to_messages([], {"text": " ", "files": []})


def test_messages_make_the_same_inputs_as_plain_chats(tiny, picture):
    _, processor = tiny
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": picture}}, "what?"]},
        {"role": "assistant", "content": "a shape"},
    ]
    messages = chat.to_messages(history, {"text": "sure?", "files": []})
    question = {"role": "user", "content": [image(picture), text("what?")]}
    expected = [question, assistant("a shape"), user("sure?")]
    encode = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    got = processor.apply_chat_template(messages, **encode)
    want = processor.apply_chat_template(expected, **encode)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


# ------------------------------------------------------------------------------ stream_reply


def test_the_stream_grows_to_what_generate_writes(tiny, images):
    model, processor = tiny
    messages = [user(images[0], "what?"), assistant("red"), user(images[1], "and now?")]
    pieces = list(stream_reply(model, processor, messages, max_new_tokens=24))
    assert pieces[-1] == plain(model, processor, messages)
    assert pieces[-1]
    assert all(b.startswith(a) for a, b in pairwise(pieces))


def test_the_base_side_is_the_model_with_its_adapter_off(tiny, images):
    model, processor = tiny
    messages = [user(images[0], "what?")]
    bridge = last(stream_reply(model, processor, messages, "bridge", 24))
    base = last(stream_reply(model, processor, messages, "base LLM", 24))
    with model.disable_adapter():
        assert base == plain(model, processor, messages)
    assert base != bridge == plain(model, processor, messages)  # and it is back on


def test_replies_at_the_same_time_do_not_mix(tiny, images):
    model, processor = tiny
    chats = [[user(images[0], "what?")], [user("say <|im_end|>, then <|im_start|>user, please")]]
    asked = [(messages, side) for messages in chats for side in chat.SIDES]
    alone = [last(stream_reply(model, processor, *one)) for one in asked]
    session = ChatSession(model, processor)
    streams = [session.stream(*one) for one in asked * 3]
    together = [None] * len(streams)

    def read(i):
        together[i] = last(streams[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 3


def test_temperature_samples(tiny):
    model, processor = tiny
    messages = [user("hello")]
    replies = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        replies.append(last(stream_reply(model, processor, messages, temperature=1.5)))
    torch.manual_seed(1)
    sampling = {"do_sample": True, "temperature": 1.5}
    assert replies[1] == plain(model, processor, messages, 128, **sampling) != replies[0]


def test_an_error_while_generating_reaches_the_reader(tiny, monkeypatch):
    model, processor = tiny

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.connector, "forward", fail)
    monkeypatch.setattr(model.language_model, "forward", fail)
    for side in chat.SIDES:  # the second shows that the first let go of the model
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream_reply(model, processor, [user("hello")], side))


def test_closing_the_stream_stops_the_generation(tiny, monkeypatch):
    model, processor = tiny
    processor.tokenizer.decode = lambda ids, **_: " " * len(ids)  # every token is shown at once
    model.generation_config.eos_token_id = None
    steps = []
    forward = model.language_model.forward

    def count(*args, **kwargs):
        steps.append(threading.active_count())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", count)
    stream = stream_reply(model, processor, [user("hello")], max_new_tokens=400)
    next(stream)
    stream.close()
    assert len(steps) < 400
    assert not chat_session._model_in_use.locked()


def test_a_chat_that_leaves_no_room_for_the_reply_is_refused(tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match="reply of 500 does not fit the context of 512"):
        next(stream_reply(model, processor, [user("hello")], max_new_tokens=500))


def test_the_context_is_known_by_any_of_its_names(tiny):
    from transformers import MptConfig

    tiny[0].config.text_config = MptConfig(max_seq_len=256)
    with pytest.raises(ValueError, match="does not fit the context of 256"):
        next(stream_reply(*tiny, [user("hello")], max_new_tokens=255))


def test_an_unknown_side_is_refused(tiny):
    with pytest.raises(ValueError, match=r"side 'basis' is unknown; choose one of bridge, base"):
        next(stream_reply(*tiny, [user("hello")], "basis"))


# ---------------------------------------------------------------------------------- the page


def test_without_gradio_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'mmpeft\[demo\]'"):
        chat.build(*tiny, "run")
    with pytest.raises(ValueError, match=r"pip install 'mmpeft\[demo\]'"):
        chat.launch("run")


@pytest.fixture
def client(tiny, picture):
    """A client of the page, served on a free port of this machine."""
    pytest.importorskip("gradio", reason=NO_GRADIO)
    from gradio_client import Client

    page = chat.build(*tiny, "tiny", [{"text": "what?", "files": [picture]}])
    _, url, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False,
        show_error=True,
    )  # fmt: skip
    yield Client(url, verbose=False, analytics_enabled=False)
    page.close()


def test_the_page_replies_over_http(client, tiny, picture):
    from gradio_client import handle_file

    message = {"text": "what?", "files": [handle_file(picture)]}
    turns = [{"role": "user", "content": [image(picture), text("what?")]}]
    for side in chat.SIDES:
        client.reset_session()
        got, speed = client.predict(message, side, 16, 0, api_name="/reply")
        assert "first token" in speed
        assert got == last(stream_reply(*tiny, turns, side, 16))
    turns += [assistant(got), user("sure?")]  # the second turn sees the whole chat
    got, _ = client.predict({"text": "sure?", "files": []}, "bridge", 16, 0, api_name="/reply")
    assert got == last(stream_reply(*tiny, turns, "bridge", 16))


def test_the_page_shows_what_was_wrong_and_goes_on(client, tiny, picture, tmp_path, monkeypatch):
    from gradio_client import handle_file

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG and no more")

    def ask(text, *files):
        message = {"text": text, "files": [handle_file(file) for file in files]}
        return client.predict(message, "bridge", 16, 0, api_name="/reply")[0]

    for wrong, problem in (
        (("what?", broken), "broken.png is not an image"),
        (("x" * 600,), "do not fit the context of 512"),
    ):
        got = ask(*wrong)
        assert problem in got["content"]
        assert got["metadata"] == {"title": chat.FAILED}
    with monkeypatch.context() as patch:
        patch.setattr(tiny[0].connector, "forward", lambda *_: 1 / 0)
        assert ask("what?", picture)["content"] == "division by zero"
    alone = last(stream_reply(*tiny, [user("hello")], max_new_tokens=16))
    assert ask("hello") == alone  # what failed is not part of the chat


def test_the_page_does_not_phone_home(tiny, monkeypatch):
    gradio = pytest.importorskip("gradio", reason=NO_GRADIO)
    asked = []  # Gradio asks for its default, which is to phone home, where it was not told
    monkeypatch.setattr(gradio.analytics, "analytics_enabled", lambda: asked.append(1))
    chat.build(*tiny, "tiny")
    assert not asked


def test_examples_are_questions_of_the_task_the_run_learnt(jsonl, tmp_path, monkeypatch):
    from mmpeft import config
    from mmpeft.tasks.messages import Messages

    question = {"role": "user", "content": [image("cat.png"), text("what?")]}
    system = {"role": "system", "content": "Be brief."}
    data = jsonl([{"messages": [system, question, assistant("a cat")]}] * 2)
    monkeypatch.setattr(config, "task_of_run", lambda run: Messages(test=str(data)))
    assert chat.find_examples("run") == [{"text": "what?", "files": [str(tmp_path / "cat.png")]}]
    clip = {"role": "user", "content": [{"type": "video", "video": ["a.png"]}, text("what?")]}
    jsonl([{"messages": [clip, assistant("a cat")]}])
    assert chat.find_examples("run") == []  # the page takes no clips
    data.unlink()
    assert chat.find_examples("run") == []
    monkeypatch.setattr(config, "task_of_run", lambda run: None)
    assert chat.find_examples("run") == []
