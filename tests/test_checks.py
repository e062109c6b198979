"""What is said of a chat: every fault by field and with a remedy, nothing of a good one."""

import pytest

from mmpeft.checks import Problem, chat_problems
from mmpeft.data import check_chat

from .conftest import assistant, user

PICTURE = {"type": "image", "image": "a.png"}
TOOL = {"role": "tool", "content": "42"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(*messages):
    return [str(problem) for problem in chat_problems(list(messages))]


@pytest.mark.parametrize(
    "chat",
    [
        [user("q"), assistant("a")],
        [SYSTEM, user("q"), assistant("a"), user("q"), assistant("a")],
        [user("q"), assistant("let me see"), TOOL, TOOL, assistant("a")],
        [user("q"), assistant("let me see"), TOOL, user("and now?"), assistant("a")],
        [user("q"), assistant("a") | {"unfinished": True}],
        [{"role": "user", "content": [PICTURE]}, assistant("a")],
        [{"role": "user", "content": [PICTURE, {"type": "text", "text": ""}]}, assistant("a")],
        [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, assistant("a")],
        [{"role": "user", "content": [{"type": "image", "base64": "aGk="}]}, assistant("a")],
        [{"role": "user", "content": [{"type": "video", "video": [b"1"]}]}, assistant("a")],
        [user("q"), {"role": "assistant", "content": [PICTURE]}, user("q"), assistant("a")],
        [user("naïve 👋 <image> <|im_end|>"), assistant("0")],
    ],
)
def test_a_chat_in_order_has_no_problem(chat):
    assert chat_problems(chat) == []


@pytest.mark.parametrize(
    ("chat", "field", "words"),
    [
        ([], "messages", "is empty; give"),
        ("hello", "messages", "is no list but str"),
        (["q", assistant("a")], "messages[0]", "is no object with role and content"),
        ([{"role": "human", "content": "q"}], "messages[0].role", "is 'human'; use system, user"),
        ([{"content": "q"}], "messages[0].role", "is None"),
        ([{"role": ["user"], "content": "q"}], "messages[0].role", r"is ['user']"),
        ([user("q")], "messages[0].role", "the last message is the user's"),
        ([user("q"), assistant("a"), TOOL], "messages[2].role", "the last message is the tool's"),
        ([assistant("a")], "messages[0].role", "is 'assistant' at the start of the chat"),
        ([SYSTEM, assistant("a")], "messages[1].role", "is 'assistant' right after 'system'"),
        ([user("q"), user("q"), assistant("a")], "messages[1].role", "join the two"),
        ([user("q"), assistant("a"), assistant("a")], "messages[2].role", "join the two"),
        ([user("q"), assistant("a"), SYSTEM, user("q"), assistant("a")], "messages[2].role",
         "one system message, its first"),
        ([{"role": "x" * 10**6, "content": "q"}], "messages[0].role", "x...x"),
        ([user("q"), TOOL, assistant("a")], "messages[1].role", "a tool answers what"),
        ([user("q"), assistant(" \n")], "messages[1].content", "(assistant) is empty"),
        ([{"role": "user"}, assistant("a")], "messages[0].content", "(user) is empty"),
        ([{"role": "user", "content": []}, assistant("a")], "messages[0].content", "is empty"),
        ([user(" "), assistant("a")], "messages[0].content", "is empty"),
        ([{"role": "user", "content": 3}, assistant("a")], "messages[0].content", "is int"),
        ([{"role": "user", "content": {}}, assistant("a")], "messages[0].content", "is dict"),
        ([{"role": "user", "content": ["q"]}, assistant("a")], "messages[0].content[0]",
         "no object"),
        ([{"role": "user", "content": [{"type": "audio"}]}, assistant("a")],
         "messages[0].content[0]", "type 'audio'; use text, image, video"),
        ([{"role": "user", "content": [{"type": "text"}]}, assistant("a")],
         "messages[0].content[0].text", "is no text but NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}, assistant("a")],
         "messages[0].content[0]", "of type 'image' has no image"),
        ([{"role": "user", "content": [PICTURE, {"type": "image", "image": b""}]}, assistant("a")],
         "messages[0].content[1]", "holds nothing (b'')"),
        ([{"role": "user", "content": [{"type": "video", "video": []}]}, assistant("a")],
         "messages[0].content[0]", "holds nothing"),
        ([user("q"), {"role": "assistant", "content": [PICTURE]}], "messages",
         "no assistant words"),
        ([user("half \ud83d of it"), assistant("a")], "messages[0].content[0].text",
         r"lone surrogate \ud83d at 5"),
        ([user("q"), assistant("a") | {"unfinished": True}, user("q"), assistant("a")],
         "messages[1].unfinished", "not the assistant's last"),
        ([user("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
         "messages[1].tool_calls", "would not be learned"),
        ([user("q"), assistant("a") | {"function_call": {"name": "f"}}],
         "messages[1].function_call", "write it into content"),
        ([user("q"), assistant("a") | {"reasoning_content": "hm"}],
         "messages[1].reasoning_content", "write it into content"),
        ([user("q"), assistant("a") | {"weight": 0}], "messages[1].weight", "is 0, but all"),
        ([user("q") | {"train": True}, assistant("a")], "messages[0].train", "is True, but all"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_field_with_a_remedy(chat, field, words):
    (problem,) = chat_problems(chat)
    assert problem.field == field and words in str(problem) and len(str(problem)) < 200
    assert all(problem) and "\n" not in str(problem)
    with pytest.raises(ValueError) as refused:
        check_chat(chat, "data.jsonl line 3")
    assert str(refused.value) == f"data.jsonl line 3: {problem}"


def test_fields_that_say_what_is_so_anyway_are_no_problem():
    turn = assistant("a") | {"weight": 1.0, "train": True, "tool_calls": [], "name": "x"}
    assert not chat_problems([user("q") | {"weight": 0, "train": False}, turn])


def test_every_fault_is_told_in_the_order_of_the_chat():
    chat = [user(""), SYSTEM, {"role": "bot", "content": 1}, user("q"), user("q")]
    assert [problem.field for problem in chat_problems(chat)] == [
        "messages[0].content", "messages[1].role", "messages[2].role", "messages[2].content",
        "messages[4].role", "messages[4].role",
    ]  # fmt: skip


def test_what_is_said_is_one_line_whatever_the_chat_holds():
    hostile = "\x1b[2J\n\ud800\u202e"
    chat = [
        {"role": hostile, "content": hostile}, {"role": hostile},
        {"role": "user", "content": [{"type": hostile}, {"type": "image", "image": ""}, hostile]},
    ]  # fmt: skip
    problems = list(map(str, chat_problems(chat)))
    assert len(problems) == 8 and all(problem.isprintable() for problem in problems)


def test_a_problem_reads_as_a_sentence():
    assert said() == ["messages is empty; give at least a question and its answer."]
    assert str(Problem("image 1", "is gone", "bring it back")) == "image 1 is gone; bring it back."


def test_a_chat_is_not_changed():
    chat = [user("q", "a.png"), assistant("a")]
    before = repr(chat)
    chat_problems(chat)
    assert repr(chat) == before
