"""BridgeProcessor: messages and images to model inputs.

An image is a run of positions marked in ``mm_token_type_ids``, never a string: nothing is added
to the vocabulary, and whatever a user writes stays text. To keep it so, every image and every
special token spelt in a message is swapped for a one-time sentinel before the chat template is
rendered, and put back while the rendered text is tokenised.
"""

import re
import secrets

from transformers import AutoProcessor, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from mmpeft.images import load_image
from mmpeft.model import BridgeConfig

IMAGE_TOKEN = "<image>"  # marks an image in raw text given to ``__call__``; no vocabulary entry


class BridgeProcessor(ProcessorMixin):
    """Tokenises chats and prepares images for a bridge.

    Args:
        num_image_tokens: positions each image takes.
        max_length: longest row in tokens; a longer one is an error, never cut.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, num_image_tokens: int | None = None,
        max_length: int | None = None, chat_template: str | None = None, **kwargs,
    ):  # fmt: skip
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_TOKEN

    @classmethod
    def from_model(cls, model, max_length: int | None = None) -> "BridgeProcessor":
        """The processor that fits a bridge: the LLM's tokenizer, the encoder's preprocessing."""
        from transformers import AutoTokenizer, ViTImageProcessor

        from mmpeft.starter import resolve

        source, how = model.config.language_model, model.vision_encoder.preprocessing
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(source["name"]), revision=source["revision"], padding_side="left"
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, its id never matters
        height, width = how["size"]
        image_processor = ViTImageProcessor(
            size={"height": height, "width": width}, resample=how["resample"],
            image_mean=how["mean"], image_std=how["std"],
        )  # fmt: skip
        return cls(
            image_processor, tokenizer, num_image_tokens=model.config.num_image_tokens,
            max_length=max_length or model.config.text_config.max_position_embeddings,
            chat_template=tokenizer.chat_template,
        )  # fmt: skip

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]

    # ------------------------------------------------------------------------------ raw text

    def __call__(self, images=None, text=None, return_tensors=None, padding=False, **kwargs):
        """Tokenise raw text in which ``<image>`` stands for an image.

        Args:
            images: one image, a list for one text, or a list of lists, one per text.
            text: a string or a list of strings.

        Returns:
            ``BatchFeature`` of ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (B, T)
            and, if there are images, ``pixel_values`` (images, 3, H, W).

        Raises:
            ValueError: a text has more or fewer ``<image>`` than images, or is too long.
        """
        if text is None:
            raise ValueError("text is missing; for images alone use processor.image_processor.")
        texts = [text] if isinstance(text, str) else list(text)
        per_text = _images_per_text(images, texts)
        rows = []
        for number, (one, own) in enumerate(zip(texts, per_text, strict=True)):
            marks = one.count(IMAGE_TOKEN)
            if marks != len(own):
                raise ValueError(
                    f"text {number} has {marks} {IMAGE_TOKEN} for {len(own)} images; write one "
                    "for each image."
                )
            segments = re.split(f"({re.escape(IMAGE_TOKEN)})", one)
            rows.append(self._encode((part, i % 2 == 1) for i, part in enumerate(segments)))
        flat = [image for own in per_text for image in own]
        return self._batch(rows, flat, return_tensors, padding, **kwargs)

    # ---------------------------------------------------------------------------------- chats

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, add_generation_prompt: bool = False,
        continue_final_message: bool = False, return_assistant_tokens_mask: bool = False,
        tokenize: bool = False, return_tensors: str | None = None, return_dict: bool = False,
        padding: bool | str = False, processor_kwargs: dict | None = None, **kwargs,
    ):  # fmt: skip
        """Render one chat or a list of chats; with ``tokenize`` make model inputs of them.

        Message content is a string or a list of parts, ``{"type": "text", "text": ...}`` and
        ``{"type": "image", "image": path, bytes or PIL image}``. The template only ever sees
        strings, so any text LLM's template works.

        With ``return_assistant_tokens_mask`` the result also has ``assistant_masks`` (B, T), 1
        where the template's ``{% generation %}`` block wrote.

        Raises:
            ValueError: the template cannot mark assistant tokens, an image cannot be read, or a
                chat is too long.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        rows, images, texts = [], [], []
        for messages in conversation if batched else [conversation]:
            chat = _Chat(messages, self._special_tokens())
            rendered, spans = self._render(
                chat, chat_template, return_assistant_tokens_mask,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **kwargs,
            )  # fmt: skip
            if tokenize:
                rows.append(self._encode(chat.segments(rendered), spans))
                images += chat.images
            else:
                texts.append(chat.as_text(rendered))
        if not tokenize:
            return texts if batched else texts[0]
        options = {"return_tensors": return_tensors, "padding": padding} | (processor_kwargs or {})
        inputs = self._batch(rows, images, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode_chat(self, messages) -> tuple[dict[str, list[int]], list]:
        """One complete chat as a training row, its images still unread.

        Returns:
            ``{"input_ids", "mm_token_type_ids", "labels"}`` (T each; labels -100 outside what the
            assistant wrote) and the list of image sources.
        """
        chat = _Chat(messages, self._special_tokens())
        rendered, spans = self._render(chat, None, mark_assistant=True)
        row = self._encode(chat.segments(rendered), spans)
        mask = row.pop("assistant_masks")
        pairs = zip(row["input_ids"], mask, strict=True)
        row["labels"] = [token if learned else -100 for token, learned in pairs]
        return row, chat.images

    def _render(self, chat, chat_template, mark_assistant: bool, **kwargs):
        """The chat as text, and the character spans the assistant wrote (``None`` if unmarked)."""
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("the tokenizer has no chat template; pass chat_template.")
        if mark_assistant and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ValueError(
                "the chat template does not mark assistant tokens; put {% generation %} and "
                "{% endgeneration %} around what the assistant writes and pass it as chat_template."
            )
        (rendered,), spans = render_jinja_template(
            conversations=[chat.messages],
            chat_template=template,
            return_assistant_tokens_mask=mark_assistant,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        return rendered, spans[0] if mark_assistant else None

    def _special_tokens(self) -> list[str]:
        return [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]

    # -------------------------------------------------------------------------------- encoding

    def _encode(self, segments, assistant_spans=None) -> dict[str, list[int]]:
        """Tokenise ``(text, kind)`` segments to one row.

        ``kind`` is ``False`` (template text), ``True`` (an image) or ``"literal"`` (text whose
        special tokens must stay text). ``assistant_spans`` are character ranges of the rendered
        text, in which an image or literal counts as its sentinel.
        """
        row = {"input_ids": [], "mm_token_type_ids": [], "assistant_masks": []}
        position = 0  # in the rendered text
        for text, kind, *width in segments:
            if kind is True:
                ids, starts = [self.tokenizer.pad_token_id] * self.num_image_tokens, None
            else:
                encoded = self.tokenizer(
                    text, add_special_tokens=False, return_offsets_mapping=True,
                    split_special_tokens=kind == "literal", verbose=False,
                )  # fmt: skip
                ids, starts = encoded["input_ids"], encoded["offset_mapping"]
            row["input_ids"] += ids
            row["mm_token_type_ids"] += [int(kind is True)] * len(ids)
            for i in range(len(ids)):
                at = position if kind else position + starts[i][0]
                inside = any(a <= at < b for a, b in assistant_spans or ())
                row["assistant_masks"].append(int(inside and kind is not True))
            position += width[0] if width else len(text)
        if assistant_spans is None:
            del row["assistant_masks"]
        if self.max_length is not None and len(row["input_ids"]) > self.max_length:
            raise ValueError(
                f"{len(row['input_ids'])} tokens ({sum(row['mm_token_type_ids'])} of them image "
                f"positions) do not fit the context of {self.max_length}; shorten the text or use "
                "fewer images. Nothing is ever cut."
            )
        return row

    def _batch(
        self, rows, images, return_tensors=None, padding=False, truncation=False, **unknown
    ) -> BatchFeature:
        if truncation:
            raise ValueError("truncation could cut through an image; shorten the text instead.")
        if unknown:
            raise ValueError(f"BridgeProcessor has no option {', '.join(unknown)}.")
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        data = {key: [row[key] for row in rows] for key in rows[0]}
        if padding:
            pad, side = self.tokenizer.pad_token_id, self.tokenizer.padding_side
            data = {k: pad_rows(v, pad if k == "input_ids" else 0, side) for k, v in data.items()}
        elif return_tensors and len({len(row["input_ids"]) for row in rows}) > 1:
            raise ValueError("rows differ in length; pass padding=True.")
        if images:
            loaded = [load_image(image, f"image {i}") for i, image in enumerate(images)]
            data["pixel_values"] = self.image_processor(loaded, return_tensors="pt")["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    # ------------------------------------------------------------------------------- decoding

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens=True, **kwargs
    ):
        """Decode generated ids, as upstream processors do."""
        return self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )


class _Chat:
    """One conversation with its images and literal special tokens swapped for sentinels."""

    def __init__(self, messages, special_tokens: list[str]):
        self.images, self._replaced = [], []
        self._key = secrets.token_hex(8)
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.messages = [m | {"content": self._content(m.get("content"))} for m in messages]
        self._sentinel = re.compile(f"\ue000{self._key}:(\\d+)\ue001")

    def _swap(self, kind, text: str) -> str:
        self._replaced.append((text, kind))
        return f"\ue000{self._key}:{len(self._replaced) - 1}\ue001"

    def _content(self, content):
        if content is None or isinstance(content, str):
            content = [{"type": "text", "text": content or ""}]
        return "".join(self._part(part) for part in content)

    def _part(self, part: dict) -> str:
        if part.get("type") == "text":
            return self._special.sub(lambda m: self._swap("literal", m.group()), part["text"])
        if part.get("type") == "image":
            source = next((part[k] for k in ("image", "path", "url", "base64") if k in part), None)
            if source is not None:
                self.images.append(source)
            return self._swap(True, IMAGE_TOKEN)
        raise ValueError(f"message part of type {part.get('type')!r}; use 'text' or 'image'.")

    def segments(self, rendered: str):
        """The rendered text as ``(text, kind, width in rendered characters)``."""
        marks = sum(kind is True for _, kind in self._replaced)
        if marks != len(self.images):
            raise ValueError(f"the chat has {marks} image parts but {len(self.images)} images.")
        found = sorted(int(match[1]) for match in self._sentinel.finditer(rendered))
        if found != list(range(len(self._replaced))):
            raise ValueError(
                "the chat template drops or repeats a part of this chat that holds an image or a "
                "special token; check the roles and their order."
            )
        position = 0
        for match in self._sentinel.finditer(rendered):
            before = rendered[position : match.start()]
            if before:
                yield before, False, len(before)
            text, kind = self._replaced[int(match[1])]
            yield text, kind, len(match[0])
            position = match.end()
        if position < len(rendered):
            yield rendered[position:], False, len(rendered) - position

    def as_text(self, rendered: str) -> str:
        """The rendered text for a reader or for ``BridgeProcessor.__call__``."""
        texts = [m["content"] for m in self.messages]
        if any(IMAGE_TOKEN in text for text in texts):
            raise ValueError(
                f"a message spells {IMAGE_TOKEN}, which plain text could not tell from an image; "
                "use tokenize=True."
            )
        return self._sentinel.sub(lambda m: self._replaced[int(m[1])][0], rendered)


def pad_rows(rows: list[list[int]], value: int, side: str) -> list[list[int]]:
    """Rows of ids to equal length."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return [pad + row if side == "left" else row + pad for row, pad in pairs]


def _images_per_text(images, texts) -> list[list]:
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(own, (list, tuple)) for own in images):
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} lists of images for {len(texts)} texts.")
        return [list(own or ()) for own in images]
    if len(texts) == 1:
        return [list(images)]
    # a flat list for several texts: dealt out by the marks, as upstream processors do
    counts = [text.count(IMAGE_TOKEN) for text in texts]
    if sum(counts) != len(images):
        raise ValueError(
            f"{len(images)} images for {sum(counts)} {IMAGE_TOKEN} in {len(texts)} texts."
        )
    dealt = iter(images)
    return [[next(dealt) for _ in range(count)] for count in counts]


AutoProcessor.register(BridgeConfig, BridgeProcessor, exist_ok=True)
