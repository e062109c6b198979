"""Three modes of one task: the words are the same for everyone, the picture is for eyes only."""

import functools

import pytest

from mmpeft.connectors.pool import PoolConnectorConfig
from mmpeft.layout import ResolutionConfig
from mmpeft.retention.engine import SideLM
from mmpeft.retention.modes import MODES, Exchange, Mode, without_mark
from mmpeft.retention.replies import write
from mmpeft.retention.report import exchanges_of
from mmpeft.retention.score import Opening
from mmpeft.retention.sides import BridgeSides
from tests.conftest import assistant, user
from tests.test_retention_engine import requests

ASKED = [{"role": "user", "content": "Where is Rome?"}]
CHAT = "<|im_start|>user\nWhere is Rome?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def exchanges(images):
    return [Exchange(image, f"What is on {i}?", f"Thing {i}.") for i, image in enumerate(images)]


@pytest.fixture
def mode(tiny, exchanges):
    """Build a mode of the tiny bridge."""
    sides = BridgeSides(*tiny)
    return lambda name: Mode(name, [] if name == "text" else exchanges, sides.render)


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"'befor_image' is unknown.*after_image"):
        Mode("befor_image", [], None)


def test_text_is_the_chat_alone(mode):
    rendered = mode("text").render(ASKED)
    assert rendered == CHAT
    assert mode("text").split(rendered) == ("", None, CHAT)
    assert not mode("text").always_chat


def test_with_image_puts_the_picture_before_the_words_of_the_first_turn(mode):
    own = mode("with_image")
    before, number, after = own.split(own.place(own.render(ASKED), 7))
    assert before == "<|im_start|>user\n" and number == 7 % 3
    assert before + after == CHAT


def test_after_image_asks_behind_a_whole_exchange(mode):
    assert mode("after_image").always_chat
    own = mode("after_image")
    before, number, after = own.split(own.place(own.render(ASKED), 5))
    assert number == 5 % 3
    assert before == "<|im_start|>user\n"
    assert before + after == (
        f"<|im_start|>user\nWhat is on {number}?<|im_end|>\n"
        f"<|im_start|>assistant\nThing {number}.<|im_end|>\n" + CHAT
    )


def test_an_exchange_is_the_turn_that_shows_a_picture_and_its_reply(images):
    def chat(*parts):
        answer = {"role": "assistant", "content": [{"type": "text", "text": "A hat."}]}
        return [user("Hello."), assistant("Yes?"), user(*parts), answer,
                user("Thanks."), assistant("Bye.")]  # fmt: skip

    clip = [{"role": "user", "content": [{"type": "video", "video": images}]}, assistant("Moves.")]
    words = [{"role": "user", "content": "no picture"}, assistant("None.")]
    found = exchanges_of("after_image", [], [words, chat(images[0], "What?"), clip])
    assert [(one.question, one.answer) for one in found] == [("What?", "A hat."), ("", "Moves.")]
    assert found[1].picture == images[1]  # the middle frame
    assert exchanges_of("after_image", found, [words]) == found


def test_a_system_message_stays_first(mode):
    messages = [{"role": "system", "content": "Be brief."}, *ASKED]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    for name in MODES[1:]:
        before, _, after = mode(name).split(mode(name).place(mode(name).render(messages), 0))
        assert before == system + "<|im_start|>user\n" and after.endswith(CHAT.split("user\n")[1])


def test_earlier_turns_of_the_task_follow_the_exchange(mode):
    shots = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    for name in MODES[1:]:
        words = without_mark(mode(name).place(mode(name).render([*shots, *ASKED]), 0))
        assert words.endswith(without_mark(mode("text").render([*shots, *ASKED])))


def test_a_prompt_that_is_no_chat_has_the_picture_first(mode):
    own = mode("with_image")
    found = own.split(own.place("The capital of Italy is", 1))
    assert found == ("", 1, "The capital of Italy is")
    assert mode("text").place("The capital of Italy is", 1) == "The capital of Italy is"


@pytest.mark.parametrize("name", MODES[1:])
def test_the_documents_of_a_task_take_the_exchanges_in_turn(mode, name):
    # the same words, as in grammar, whose questions are empty; other words of one document, as
    # in WinoGrande, whose choices are questions
    own = mode(name)
    asked = [own.render([{"role": "user", "content": words}]) for words in ("", "", "a", "b")]
    numbers = [[own.split(own.place(words, doc))[1] for words in asked] for doc in range(6)]
    assert numbers == [[doc % 3] * 4 for doc in range(6)]


def test_pictures_are_known_by_their_bytes(images):
    assert Exchange(images[0]).sha256 == Exchange(images[0].copy(), "other words").sha256
    assert Exchange(images[0]).sha256 != Exchange(images[1]).sha256


# ------------------------------------------------------------------------------- what models read


class Recorder:
    """Every token and picture a model reads."""

    def __init__(self, model, monkeypatch):
        self.ids, self.pictures = [], 0
        forward = type(model).forward

        @functools.wraps(forward)
        def record(model, *args, input_ids=None, pixel_values=None, **kwargs):
            self.ids += input_ids.tolist()
            self.pictures += pixel_values is not None
            return forward(model, *args, input_ids=input_ids, pixel_values=pixel_values, **kwargs)

        monkeypatch.setattr(type(model), "forward", record)


@pytest.mark.parametrize("side", ["base", "bridge", "control"])
@pytest.mark.parametrize("name", MODES)
def test_marks_never_reach_a_model_and_pictures_only_those_with_eyes(
    tiny, mode, monkeypatch, name, side
):
    model, processor = tiny
    sides = BridgeSides(model, processor)
    sides.packs = True  # decided on text, which is not looked at here
    lm = SideLM(sides, side, mode(name))
    seen = Recorder(model, monkeypatch)
    contexts = [lm.apply_chat_template([{"role": "user", "content": w}]) for w in ("A", "B")]
    contexts += ["no chat"] * (name != "after_image")
    lm.loglikelihood(requests(*[(context, " yes") for context in contexts]))
    lm.generate_until(requests(*[(c, {"until": [], "max_gen_toks": 2}) for c in contexts]))
    marks = {i for mark in "\ue000\ue001\ue002\ue003" for i in processor.tokenizer.encode(mark)[1:]}
    read = {token for row in seen.ids for token in row}
    assert not marks & read
    assert (seen.pictures > 0) is (side != "base" and name != "text")


def test_both_sides_read_the_same_words(tiny, mode, exchanges):
    for name in MODES:
        lms = {s: SideLM(BridgeSides(*tiny), s, mode(name)) for s in ("base", "bridge", "control")}
        asked = lms["base"].apply_chat_template(ASKED)
        read = {}
        for side, lm in lms.items():
            assert lm.apply_chat_template(ASKED) == asked
            context = lm.mode.place(asked, 0)
            opening, question = lm._question(context, " In Italy.")
            before = lm.tokenizer.encode(opening.before) if opening else []
            assert (opening is None) is (side == "base" or name == "text")
            read[side] = ((*before, *question.context), question.answer)
            opening, ids = lm._prompt(context)
            before = lm.tokenizer.encode(opening.before) if opening else []
            assert (*before, *ids) == tuple(lm.tokenizer.encode(without_mark(context)))
        assert read["base"] == read["bridge"] == read["control"]


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": ResolutionConfig("native", max_area=2)},
        {"connector": PoolConnectorConfig(factor=4)},  # a row as long as a size has numbers
    ],
    ids=["sizes differ", "one token"],
)
def test_replies_behind_several_pictures_are_those_of_each_alone(make_bridge, images, options):
    sides = BridgeSides(*make_bridge(**options))
    pictures = [images[0], images[1].resize((30, 90)), images[2].resize((64, 64))]
    prompts = [(Opening("", picture, str(i)), [5] * (i + 1)) for i, picture in enumerate(pictures)]
    settings = {"until": [], "max_gen_toks": 4}
    alone = [write(sides, "bridge", [prompt], settings)[0] for prompt in prompts]
    assert write(sides, "bridge", prompts, settings) == alone


def test_an_image_token_that_somebody_writes_is_text(tiny, mode):
    for name in MODES:
        sides = BridgeSides(*tiny)
        lm = SideLM(sides, "bridge", mode(name))
        words = "What does <image> mean in HTML?"
        context = lm.apply_chat_template([{"role": "user", "content": words}])
        assert words in without_mark(lm.mode.place(context, 0))
        ((value, _),) = lm.loglikelihood(requests((context, " Nothing.")))
        assert value < 0
        _, question = lm._question(lm.mode.place(context, 0), " Nothing.")
        assert words in lm.tokenizer.decode(question.context)
        plain = "no chat, <image> here"
        lm.generate_until(requests((plain, {"until": [], "max_gen_toks": 1})))
        assert lm.loglikelihood(requests((plain, " x")))[0][0] < 0


def test_the_mark_of_the_engine_is_not_that_of_the_processor(tiny, mode):
    """Both use private-use characters; words that hold them are rare but must not crash."""
    lm = SideLM(BridgeSides(*tiny), "bridge", mode("with_image"))
    context = lm.apply_chat_template([{"role": "user", "content": "odd \ue000 and \ue001 words"}])
    *_, after = lm.mode.split(context)
    assert "odd \ue000 and \ue001 words" in after
