"""The engine against lm-eval's own HFLM, and the picture path against plain forwards."""

import functools
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mmpeft.gate import GATES
from mmpeft.retention import score as scoring
from mmpeft.retention.engine import SideLM, certify
from mmpeft.retention.modes import Exchange, Mode
from mmpeft.retention.plan import HEADER_SEQUENCES, Question
from mmpeft.retention.score import Opening
from mmpeft.retention.sides import AdapterSides, BridgeSides, RetentionError, evaluation
from mmpeft.retention.store import Store
from tests.conftest import user

CLOSE = {"abs": 1e-4}


def requests(*pairs):
    return [SimpleNamespace(args=pair, doc_id=number) for number, pair in enumerate(pairs)]


FEW_SHOT = "Question: Is the sky blue? Answer: yes. Question: Is grass red? Answer: no. "
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " P"),
    ("The capital of France is", " Q"),
    ("", "A whole sentence without any context."),
    ("", "A"),
    ("a context that ends in a space ", "word"),
    ("two  ", " spaces"),
    ("short", " and a much longer continuation than the context"),
    ("Café für", " zwölf"),
    ("x" * 300, "yz"),
    *[(f"{FEW_SHOT}Question: Is {i} even? Answer:", c) for i in range(12) for c in (" yes", " no")],
]


def side_lm(bridge, side="base", mode="text", exchanges=(), **options):
    sides = BridgeSides(*bridge)
    return SideLM(sides, side, Mode(mode, list(exchanges), sides.render), **options)


@pytest.fixture(scope="module")
def hflm(llm_dir):
    """lm-eval's own model of the tiny LLM."""
    return lm_eval_model(*loaded(llm_dir))


class AloneSides(AdapterSides):
    """A model without an adapter: only the base is asked."""

    @contextmanager
    def on(self, side):
        with evaluation(self.model):
            yield self.model


def alone(model, tokenizer) -> SideLM:
    sides = AloneSides(model, tokenizer)
    return SideLM(sides, "base", Mode("text", [], sides.render))


def loaded(folder, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def lm_eval_model(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


def assert_same(ours, reference):
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine[0] == pytest.approx(theirs[0], **CLOSE)
        assert mine[1] == theirs[1]


# ------------------------------------------------------------------------------- log-likelihoods


def test_log_likelihoods_equal_those_of_lm_eval_itself(make_bridge, hflm):
    lm = side_lm(make_bridge(gate="none"))
    ours = lm.loglikelihood(requests(*PAIRS))
    assert lm.sides.packs
    batches = scoring.planned(lm.sides, lm.asked[0])
    assert any(batch.header for batch in batches)  # the few-shot start was encoded once
    assert sum(len(batch.rows) for batch in batches) < len(PAIRS) - HEADER_SEQUENCES
    assert_same(ours, hflm.loglikelihood(requests(*PAIRS), disable_tqdm=True))


def test_greedy_answers_are_recognised(make_bridge, hflm):
    lm = side_lm(make_bridge(gate="none"))
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    (reply,) = hflm.generate_until(requests(("Say", options)), disable_tqdm=True)
    asked = requests(("Say", reply), ("Say", reply[:-1] + "#"))
    ours = lm.loglikelihood(asked)
    assert [greedy for _, greedy in ours] == [True, False]
    assert_same(ours, hflm.loglikelihood(asked, disable_tqdm=True))


def test_a_tokenizer_that_sets_bos_is_used_as_lm_eval_uses_it(llm_dir):
    """BOS before every text, but not twice where a chat template wrote it."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = loaded(llm_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer.encode("a")[0] == 1
    asked = requests(*PAIRS[:8], ("<|im_start|>user\nHi", " there"))
    reference = lm_eval_model(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    assert_same(alone(model, tokenizer).loglikelihood(asked), reference)


def test_rolling_log_likelihoods_equal_those_of_lm_eval_itself(make_bridge, hflm):
    texts = requests(("The quick brown fox. " * 8,), ("A",), ("Other words " * 60,))
    ours = side_lm(make_bridge(gate="none")).loglikelihood_rolling(texts[:2])
    reference = hflm.loglikelihood_rolling(texts[:2], disable_tqdm=True)
    assert ours == pytest.approx(reference, **CLOSE)
    # longer than the context: every token is still predicted exactly once
    lm = side_lm(make_bridge(gate="none"))
    lm.loglikelihood_rolling(texts[2:])
    asked = [question for questions in lm.asked for question in questions]
    assert sum(len(question.answer) for question in asked) == len(texts[2].args[0])


def test_nothing_to_score_is_refused(tiny):
    with pytest.raises(RetentionError, match=r"nothing to score.*'Paris'"):
        side_lm(tiny).loglikelihood(requests(("Paris", "")))


def test_too_long_item_is_refused_not_cut(tiny):
    with pytest.raises(RetentionError, match="never cut"):
        side_lm(tiny).loglikelihood(requests(("word " * 200, " end")))
    with pytest.raises(RetentionError, match="nothing is cut"):
        side_lm(tiny).generate_until(requests(("word " * 90, {"max_gen_toks": 100})))


def test_nan_in_the_suite_is_refused(make_bridge):
    model, processor = make_bridge(gate="none")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, math.nan)
    side_lm((model, processor)).loglikelihood(requests(*PAIRS))
    with pytest.raises(RetentionError, match="bridge on the suite are NaN"):
        side_lm((model, processor), "bridge").loglikelihood(requests(*PAIRS))


# ------------------------------------------------------------------------------------ generation


def test_replies_equal_those_of_lm_eval_itself(make_bridge, hflm):
    lm = side_lm(make_bridge(gate="none"))
    prompts = ["Say", "Tell me a story about the sea", "x", "Hello there, "]
    free = {"until": [], "max_gen_toks": 24, "do_sample": False}
    whole = hflm.generate_until(requests(*[(p, free) for p in prompts]), disable_tqdm=True)
    assert lm.generate_until(requests(*[(p, free) for p in prompts])) == whole
    assert not any(lm.reply(prompt, free)[2] for prompt in prompts)  # cut at the limit
    stops = sorted({reply[5:7] for reply in whole})[:2]
    for options in ({**free, "until": stops}, {"until": stops[0], "max_new_tokens": 9}):
        asked = requests(*[(prompt, options) for prompt in prompts])
        assert lm.generate_until(asked) == hflm.generate_until(asked, disable_tqdm=True)


def write_script(model, texts: list[str], tokenizer, monkeypatch):
    """Row i of a batch writes `texts[i]`, then `z` for ever, whatever it is asked."""
    forward, step = type(model).forward, iter(range(1000))
    scripts = [tokenizer.encode(text + "z" * 50) for text in texts]

    @functools.wraps(forward)
    def scripted(self, *args, **kwargs):
        output, at = forward(self, *args, **kwargs), next(step)
        for row, script in enumerate(scripts):
            output.logits[row, -1, script[at]] = 1000.0
        return output

    monkeypatch.setattr(type(model), "forward", scripted)


def test_a_stop_string_that_begins_in_the_prompt_does_not_stop(tiny, monkeypatch):
    """Chat prompts end in a newline: a reply that opens with one is no empty paragraph."""
    model, processor = tiny
    write_script(model, ["\nThe sea.\n\nMore"], processor.tokenizer, monkeypatch)
    lm = side_lm(tiny)
    options = {"until": ["\n\n"], "max_gen_toks": 20}
    assert lm.generate_until(requests(("assistant\n", options))) == ["\nThe sea."]
    _, ids, finished = lm.reply("assistant\n", options)
    assert finished and processor.tokenizer.decode(ids) == "\nThe sea.\n\n"


@pytest.mark.parametrize("stopped", ["ab<|im_end|>", "abSTOP"])
def test_a_reply_that_stopped_early_holds_no_padding(tiny, monkeypatch, stopped):
    """Rows of a batch end at different steps; the rest of a short one is not its own."""
    model, processor = tiny
    processor.tokenizer.pad_token = "!"  # a padding token that is no end token
    write_script(model, [stopped, "z"], processor.tokenizer, monkeypatch)
    lm = side_lm(tiny)
    options = {"until": ["STOP"], "max_gen_toks": 12}
    assert lm.generate_until(requests(("x", options), ("yy", options))) == ["ab", "z" * 12]
    encode = processor.tokenizer.encode
    assert lm.reply("x", options)[1:] == (encode(stopped.removesuffix("<|im_end|>")), True)
    assert lm.reply("yy", options)[1:] == (encode("z" * 12), False)


def test_the_models_own_penalties_do_not_matter(make_bridge):
    model, processor = make_bridge(gate="none")
    asked = requests(("Say", {"until": [], "max_gen_toks": 16}))
    plain = side_lm((model, processor)).generate_until(asked)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.min_new_tokens = 3
    assert side_lm((model, processor)).generate_until(asked) == plain


@pytest.mark.parametrize("options", [{"do_sample": True}, {"temperature": 0.7}])
def test_a_task_that_samples_is_refused(tiny, options):
    with pytest.raises(RetentionError, match="only greedy ones"):
        side_lm(tiny).generate_until(requests(("Say", {"until": [], **options})))


# -------------------------------------------------------------------------------------- pictures


def seen_whole(model, processor, opening, question, gate_open=True):
    """Log-likelihood of a question by one plain forward of picture and words together."""
    inputs = processor(
        images=opening.picture, text=opening.before + processor.image_token, return_tensors="pt"
    )
    tail = torch.tensor([question.tokens])
    zeros = torch.zeros_like(tail)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.cat([inputs["input_ids"], tail], 1),
            mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], zeros], 1),
            attention_mask=torch.cat([inputs["attention_mask"], zeros + 1], 1),
            pixel_values=inputs["pixel_values"],
        ).logits[0]
    logs = logits[-len(question.answer) :].log_softmax(-1)
    answer = torch.tensor(question.answer)
    return logs.gather(1, answer[:, None]).sum().item(), bool((logs.argmax(-1) == answer).all())


@pytest.mark.parametrize("gate", GATES)
def test_questions_behind_a_picture_equal_a_forward_of_the_whole_sequence(
    make_bridge, images, gate
):
    """Opening, header and packed rows together, with the adapter at work."""
    model, processor = make_bridge(gate=gate)
    sides = BridgeSides(model, processor)
    encode = processor.tokenizer.encode
    questions = [
        Question(tuple(encode(f"{FEW_SHOT}Is {i} even?")), tuple(encode(answer)))
        for i in range(20)
        for answer in (" yes", " no")
    ]
    opening = Opening("<|im_start|>user\n", images[0], "0")
    batches = scoring.planned(sides, questions, opening)
    assert any(batch.header for batch in batches)
    for side in ("bridge", "control"):
        found = scoring.score(sides, side, questions, opening)
        with sides.on(side):
            for question in questions[::9]:
                expected = seen_whole(model, processor, opening, question)
                assert found[question][0] == pytest.approx(expected[0], **CLOSE)
                assert found[question][1] == expected[1]
    assert scoring.score(sides, "bridge", questions, opening) != found  # `found` is the control


def test_the_same_words_behind_two_pictures_are_two_questions(tiny, images):
    exchanges = [Exchange(image) for image in images[:2]]
    lm = side_lm(tiny, "bridge", "with_image", exchanges)
    asked = requests(*[("same", " words")] * 4)  # of four documents
    answers = lm.loglikelihood(asked)
    found = {(one.doc_id % 2, answer[0]) for one, answer in zip(asked, answers, strict=True)}
    assert len(found) == 2  # one value for each picture


@pytest.mark.parametrize("chat", [True, False])
def test_a_reply_behind_a_picture_equals_generate_on_the_whole_prompt(make_bridge, images, chat):
    model, processor = make_bridge(gate="sample")
    lm = side_lm((model, processor), "bridge", "with_image", [Exchange(images[0])])
    words = ["What is this?", "And this thing over there?"]
    contexts = words
    if chat:
        contexts = [lm.apply_chat_template([{"role": "user", "content": one}]) for one in words]
    options = {"until": [], "max_gen_toks": 8}
    ours = lm.generate_until(requests(*[(context, options) for context in contexts]))
    for one, reply in zip(words, ours, strict=True):
        if chat:
            inputs = processor.apply_chat_template(
                [user(images[0], one)], add_generation_prompt=True, tokenize=True,
                return_dict=True, return_tensors="pt",
            )  # fmt: skip
        else:
            inputs = processor(
                images=images[0], text=f"{lm.sides.start()}<image>\n{one}", return_tensors="pt"
            )
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :]
        assert reply == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_a_gated_bridge_answers_text_with_the_same_bits_and_pictures_with_others(tiny, images):
    asked = requests(*PAIRS)
    base, bridge = (side_lm(tiny, side).loglikelihood(asked) for side in ("base", "bridge"))
    assert base == bridge
    exchanges = [Exchange(image) for image in images[:2]]
    seen = {
        side: side_lm(tiny, side, "with_image", exchanges).loglikelihood(asked)
        for side in ("base", "bridge", "control")
    }
    assert seen["base"] == base  # it has no eyes
    assert all(len({*three}) == 3 for three in zip(*seen.values(), strict=True))


def test_an_open_bridge_answers_text_otherwise(make_bridge):
    bridge = make_bridge(gate="none")
    one, other = (side_lm(bridge, s).loglikelihood(requests(*PAIRS)) for s in ("base", "bridge"))
    assert all(a[0] != b[0] for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------- models without packed rows


def test_a_model_that_ignores_4d_masks_gets_plain_rows(make_bridge, hflm, images, monkeypatch):
    model, processor = make_bridge(gate="none")
    forward = type(model).forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask.new_ones(len(attention_mask), attention_mask.shape[-1])
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    lm = side_lm((model, processor))
    lm.loglikelihood(requests(PAIRS[0]))  # a single question tells as much as many
    assert lm.sides.packs is False
    ours = lm.loglikelihood(requests(*PAIRS))
    assert_same(ours, hflm.loglikelihood(requests(*PAIRS), disable_tqdm=True))
    seeing = SideLM(lm.sides, "bridge", Mode("with_image", [Exchange(images[0])], None))
    with pytest.raises(RetentionError, match="only --modes text can be measured"):
        seeing.loglikelihood(requests(PAIRS[0]))


def test_a_model_that_fails_on_4d_masks_gets_plain_rows(make_bridge, hflm, monkeypatch):
    model, processor = make_bridge(gate="none")
    forward = type(model).forward

    def strict(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be two-dimensional")
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", strict)
    lm = side_lm((model, processor))
    ours = lm.loglikelihood(requests(*PAIRS))
    assert lm.sides.packs is False
    assert_same(ours, hflm.loglikelihood(requests(*PAIRS), disable_tqdm=True))


def test_eager_attention_gets_a_mask_it_can_add(llm_dir, hflm):
    """It adds a mask to the scores, and a bool mask would add 1."""
    lm = alone(*loaded(llm_dir, attn_implementation="eager"))
    ours = lm.loglikelihood(requests(*PAIRS))
    assert lm.sides.packs is True
    assert_same(ours, hflm.loglikelihood(requests(*PAIRS), disable_tqdm=True))


@pytest.fixture(scope="module")
def sliding_dir(llm_dir, tmp_path_factory):
    """A tiny Mistral that sees 64 tokens back."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("sliding")
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        sliding_window=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("length", [20, 300])
def test_a_sliding_window_is_respected(sliding_dir, length):
    """Rows wider than the window but no sequence: packed. A longer sequence: plain."""
    pairs = [(f"{'abc' * (length // 3)} {i} {'q' * (i % 7)}", " yes") for i in range(40)]
    lm = alone(*loaded(sliding_dir))
    ours = lm.loglikelihood(requests(*pairs))
    assert lm.sides.window == 64
    batches = scoring.planned(lm.sides, lm.asked[0])
    widest = max(len(row.tokens) for batch in batches for row in batch.rows)
    plain = all(len(row.reads) == 1 for batch in batches for row in batch.rows)
    assert widest > 64 and plain is (length > 64)
    reference = lm_eval_model(lm.sides.model, lm.tokenizer)
    assert_same(ours, reference.loglikelihood(requests(*pairs), disable_tqdm=True))


def test_a_picture_that_fills_the_window_is_refused(make_bridge, sliding_dir, images):
    bridge = make_bridge(gate="none", language_model=sliding_dir)
    lm = side_lm(bridge, "bridge", "with_image", [Exchange(images[0])])
    lm.loglikelihood(requests(("short", " yes")))
    with pytest.raises(RetentionError, match="only --modes text can be measured"):
        lm.loglikelihood(requests(("a" * 55, " yes")))  # 55 and the picture, not 55 alone


# --------------------------------------------------------------------------------- certification


def ask_all(lm):
    lm.loglikelihood(requests(*PAIRS))
    lm.generate_until(requests(*[(p, {"until": [], "max_gen_toks": 4}) for p in ("a", "bc")]))


def test_a_sample_certifies_a_closed_gate_and_nothing_else(make_bridge, tmp_path):
    for gate in ("sample", "none"):
        bridge = make_bridge(gate=gate)
        sides = BridgeSides(*bridge)
        mode = Mode("text", [], sides.render)
        base = SideLM(sides, "base", mode, Store(tmp_path, sides.setting("base")))
        ask_all(base)
        found = certify(base)
        if gate == "none":
            assert found is None
            continue
        assert found["of"] >= found["batches"] >= 1 and found["answers"] > len(PAIRS) / 2
        copy = SideLM(sides, "bridge", mode, copied=base)
        ask_all(copy)
        assert copy.scored == base.scored and copy.replies == base.replies
        with pytest.raises(RetentionError, match="did not ask the base"):
            copy.loglikelihood(requests(("another", " question")))
        with pytest.raises(RetentionError, match="did not ask the base"):
            copy.generate_until(requests(("another", {"until": [], "max_gen_toks": 4})))


def test_one_answer_that_differs_denies_the_certificate(tiny):
    base = side_lm(tiny)
    ask_all(base)
    pair = next(iter(base.scored))
    value, greedy = base.scored[pair]
    base.scored[pair] = (math.nextafter(value, 0), greedy)
    assert certify(base) is None
    base.scored[pair] = (value, greedy)
    assert certify(base)["batches"]
    key = next(iter(base.replies))
    base.replies[key] = ("other", *base.replies[key][1:])
    assert certify(base) is None
