"""Messages and images to model inputs."""

import pytest

from mmpeft import BridgeProcessor

from .conftest import CHAT_TEMPLATE, assistant, model_inputs, user


def encode(processor, chat, **kwargs):
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, **kwargs)


def test_a_plain_chat_is_tokenised_as_the_tokenizer_does(tiny):
    _, processor = tiny
    chat = [user("hello  there\n"), assistant("hi")]
    plain = [{"role": "user", "content": "hello  there\n"}, assistant("hi")]
    expected = processor.tokenizer.apply_chat_template(plain, return_dict=True)["input_ids"]
    assert encode(processor, chat)["input_ids"] == [expected]


def test_labels_are_exactly_what_the_assistant_wrote(tiny, images):
    _, processor = tiny
    chat = [
        user(images[0], "first?"), assistant("one <|im_end|> é"), user("second?"), assistant("two")
    ]  # fmt: skip
    row, sources = processor.encode_chat(chat)
    learned = [token for token in row["labels"] if token != -100]
    pieces = "".join(processor.tokenizer.convert_ids_to_tokens(learned))
    assert processor.tokenizer.decode(learned) == "one <|im_end|> é<|im_end|>two<|im_end|>"
    assert pieces.startswith("one") and len(sources) == 1
    # the two real end marks are single tokens, the spelt one is text
    assert learned.count(processor.tokenizer.eos_token_id) == 2


def test_image_positions_are_a_mask(tiny, images):
    _, processor = tiny
    inputs = encode(processor, [user("a", images[0], "b", images[1])])
    (marks,) = inputs["mm_token_type_ids"]
    text = "".join("I" if m else "." for m in marks)
    assert text.count("I" * 16) == 2 and text.count("I") == 32
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("spelt", ["<image>", "<|im_end|>", "<|im_start|>system", "<|endoftext|>"])
def test_what_a_user_spells_stays_text(tiny, images, spelt):
    _, processor = tiny
    inputs = encode(processor, [user(images[0], f"say {spelt} please")])
    (ids,), (marks,) = inputs["input_ids"], inputs["mm_token_type_ids"]
    text_ids = [i for i, m in zip(ids, marks, strict=True) if not m]
    empty = encode(processor, [user(images[0], "say  please")])
    specials = set(processor.tokenizer.all_special_ids)
    assert sum(i in specials for i in text_ids) == sum(
        i in specials
        for i, m in zip(empty["input_ids"][0], empty["mm_token_type_ids"][0], strict=True)
        if not m
    )
    assert f"say {spelt} please" in processor.tokenizer.decode(text_ids)


def test_raw_text_with_marks(tiny, images):
    _, processor = tiny
    inputs = processor(text=["<image>a", "b"], images=[[images[0]], []], padding=True)
    assert [sum(row) for row in inputs["mm_token_type_ids"]] == [16, 0]
    same = processor(text=["<image>a", "b"], images=images[:1], padding=True)
    assert same["input_ids"] == inputs["input_ids"]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<image><image>", 1, "2 <image> for 1 images"),
        ("none", 1, "0 <image> for 1 images"),
        ("<image>", 0, "1 <image> for 0 images"),
    ],
)
def test_marks_and_images_must_agree(tiny, images, text, count, message):
    with pytest.raises(ValueError, match=message):
        tiny[1](text=text, images=images[:count])


def test_a_part_without_its_image(tiny):
    with pytest.raises(ValueError, match="1 image parts but 0 images"):
        encode(tiny[1], [{"role": "user", "content": [{"type": "image"}]}])


def test_too_long_is_an_error_never_cut(tiny, images):
    _, processor = tiny
    processor.max_length = 64
    with pytest.raises(ValueError, match=r"tokens \(16 of them image positions\) do not fit.*64"):
        encode(processor, [user(images[0], "x" * 60)])
    with pytest.raises(ValueError, match="cut through an image"):
        processor(text="a", truncation=True)


def test_a_template_that_cannot_mark_the_assistant_is_refused(tiny):
    _, processor = tiny
    unmarked = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    processor.chat_template = unmarked.replace("<|im_start|>", "<|im_start|>the ")
    with pytest.raises(ValueError, match=r"does not mark assistant.*of your template with \{% gen"):
        processor.encode_chat([user("a"), assistant("b")])


def test_a_template_that_drops_an_image_is_noticed(tiny, images):
    _, processor = tiny
    processor.chat_template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="drops or repeats a part"):
        encode(processor, [user(images[0], "first"), assistant("second")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}"
         "{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% endif %}"
         "{% endfor %}",
         r"leaves out or changes words of messages\[0\] \(system\)"),
        ("{% macro say(m) %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
         "{% endgeneration %}{% endmacro %}{% for m in messages %}"
         "{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}{% endif %}"
         "{% endfor %}",
         r"blocks do not hold what the assistant says in messages\[2\]; write them outside of"),
    ],
)  # fmt: skip
def test_a_template_that_loses_words_is_noticed(tiny, template, message):
    _, processor = tiny
    processor.chat_template = template
    chat = [{"role": "system", "content": "Be kind."}, user("a?"), assistant("The answer.")]
    with pytest.raises(ValueError, match=message):
        processor.encode_chat(chat)


def test_a_template_may_strip_words_and_write_those_of_tools_as_json(tiny):
    _, processor = tiny
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content | trim }}{% endgeneration %}{% elif m.role == 'tool' %}"
        "{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = [
        user("a?"),
        assistant(" look \n"),
        {"role": "tool", "content": '"é"\nb'},
        assistant("c"),
    ]
    row, _ = processor.encode_chat(chat)
    learned = [i for i in row["labels"] if i != -100]
    assert processor.tokenizer.decode(learned) == "lookc"


def test_a_template_that_changes_the_order_of_pictures_is_refused(tiny, images):
    _, processor = tiny
    processor.chat_template = (
        "{% for m in messages | reverse %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    row, _ = processor.encode_chat([user(images[0], "first"), assistant("x")])
    assert sum(row["mm_token_type_ids"]) > 0
    chat = [user(images[0], "first"), assistant("x"), user(images[1], "second"), assistant("x")]
    with pytest.raises(ValueError, match="puts pictures in another order"):
        processor.encode_chat(chat)


def test_padding_sides(tiny):
    _, processor = tiny
    chats = [[user("a")], [user("abcdef")]]
    left = model_inputs(processor, chats)["attention_mask"]
    assert left[0, 0] == 0 and left[0, -1] == 1
    processor.tokenizer.padding_side = "right"
    right = model_inputs(processor, chats)["attention_mask"]
    assert right[0, 0] == 1 and right[0, -1] == 0


def test_rendering_without_tokenising(tiny, images):
    _, processor = tiny
    text = processor.apply_chat_template([user(images[0], "hi")], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>hi<|im_end|>\n<|im_start|>assistant\n"
    direct = processor(text=text, images=images[0])
    assert direct["input_ids"] == encode(
        processor, [user(images[0], "hi")], add_generation_prompt=True
    )["input_ids"]  # fmt: skip
    with pytest.raises(ValueError, match="tokenize=True"):
        processor.apply_chat_template([user(images[0], "the mark <image> spelt")])


def test_save_and_load(tiny, images, tmp_path):
    _, processor = tiny
    processor.save_pretrained(tmp_path)
    loaded = BridgeProcessor.from_pretrained(tmp_path)
    chat = [user(images[0], "what?")]
    a, b = model_inputs(processor, [chat]), model_inputs(loaded, [chat])
    assert all((a[k] == b[k]).all() for k in a)
    assert loaded.max_length == 512
    assert loaded.image_processor.resolutions == [[64, 64, 16]]


def test_words_beside_an_image_that_the_connector_cannot_read(make_bridge, llm_dir, images):
    from mmpeft.connectors.qformer import QFormerConnectorConfig

    connector = QFormerConnectorConfig(
        2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        instruction=True, vocab_size=300, max_position_embeddings=20, tokenizer=llm_dir,
    )  # fmt: skip
    _, processor = make_bridge(connector=connector)
    inputs = encode(processor, [user(images[0], "what?")], return_tensors="pt")
    assert inputs["qformer_input_ids"].shape == (1, 5)
    _, pictures = processor.encode_chat([user(images[0], "x" * 30), assistant("yes")])
    with pytest.raises(ValueError, match="row 7: the words beside .* are 30 tokens;.* most 20"):
        processor.image_inputs(pictures, "row 7: ")
