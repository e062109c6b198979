"""BridgeProcessor: messages and images to model inputs.

An image is a run of positions marked in ``mm_token_type_ids``, never a string: nothing is added
to the vocabulary, and whatever a user writes stays text (see :mod:`mmpeft.conversation`).
"""

import re
from pathlib import Path

import numpy as np
from transformers import AutoProcessor, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from mmpeft.chat_template import load_template, marked_twin, marks_assistant, names
from mmpeft.checkpoint import HUB_OPTIONS
from mmpeft.conversation import IMAGE_TOKEN, Chat, Picture
from mmpeft.image_processing import BridgeImageProcessor
from mmpeft.images import image_size, load_image
from mmpeft.language_model import context_length, load_tokenizer
from mmpeft.model import BridgeConfig
from mmpeft.tokenise import Part, tokenise

QFORMER_FOLDER = "qformer_tokenizer"
CHARACTERS_A_TOKEN = 16  # a text of more is first judged by its start; words of English take 4 or 5


class BridgeProcessor(ProcessorMixin):
    """Tokenises chats and prepares images for a bridge.

    Args:
        image_processor: a ``BridgeImageProcessor``, or any of transformers with one size.
        num_image_tokens: positions each image takes; ``None`` asks the image processor, by size.
        max_length: longest row in tokens; a longer one is an error, never cut.
        num_frames: images that a video part becomes.
        add_special_tokens: chats get what the tokenizer puts around a text (often a BOS token)
            unless the template wrote it, as processors of transformers do for VLMs.
        image_mark: what the chat template itself writes for an image; it is then given lists of
            parts, as VLMs' own templates want them. ``None`` gives it strings.
        images_first: images stand before the text and its BOS token, as in BLIP-2.

    Attributes:
        qformer_tokenizer: tokenizer of the words that a connector reads beside each image (as in
            InstructBLIP), or ``None``.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, num_image_tokens: int | None = None,
        max_length: int | None = None, num_frames: int = 8, chat_template: str | None = None,
        add_special_tokens: bool = False, image_mark: str | None = None,
        images_first: bool = False, **kwargs,
    ):  # fmt: skip
        self.num_image_tokens = num_image_tokens
        self.add_special_tokens, self.image_mark = add_special_tokens, image_mark
        self.images_first = images_first
        self.max_length, self.num_frames = max_length, num_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_TOKEN
        self.qformer_tokenizer = None

    @classmethod
    def from_model(
        cls, model, max_length: int | None = None, chat_template: str | None = None
    ) -> "BridgeProcessor":
        """The processor that fits a bridge: the LLM's tokenizer, the encoder's preprocessing.

        ``chat_template`` is a packaged one or a jinja file, see :mod:`mmpeft.chat_template`;
        ``None`` takes the tokenizer's own.
        """
        from transformers import AutoTokenizer

        if model.config.processor is not None:
            from mmpeft.hf import processor_of

            return processor_of(cls, model, max_length, chat_template)
        source, how = model.config.language_model, model.vision_encoder.preprocessing
        tokenizer = load_tokenizer(source["name"], source["revision"])
        template = (
            tokenizer.chat_template if chat_template is None else load_template(chat_template)
        )
        if isinstance(template, dict):  # some tokenizers have one for each use
            template = template.get("default")
        height, width = how["size"]
        image_processor = BridgeImageProcessor(
            size={"height": height, "width": width}, resample=how["resample"],
            image_mean=how["mean"], image_std=how["std"], fit=how["fit"],
            resolutions=[list(r) for r in model.layout.resolutions],
            cut_tiles=model.layout.config.mode == "tiles",
        )  # fmt: skip
        processor = cls(
            image_processor, tokenizer,
            max_length=max_length or context_length(model.config.text_config),
            chat_template=template,
        )  # fmt: skip
        if (instruction := model.connector.instruction_tokenizer) is not None:
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(**instruction)
        model.stop_at(processor.ends_of_turn())
        return processor

    def ends_of_turn(self) -> list[int]:
        """Special tokens behind which the assistant has said all: the text's end, and the turn's.

        The latter is what training teaches, which an LLM's own ``generation_config`` may not know.
        """
        from jinja2 import TemplateError

        ends = {self.tokenizer.eos_token_id}
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            row, _ = self.encode_chat(said)
        except (ValueError, TemplateError):  # the template is refused where it is needed
            row = {"labels": []}
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        learned = (token for token in row["labels"] if token in special)
        return sorted({*ends, next(learned, None)} - {None})

    @property
    def model_input_names(self):
        names = ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_sizes"]
        if self.qformer_tokenizer is not None:
            names += ["qformer_input_ids", "qformer_attention_mask"]
        return names

    def save_pretrained(self, save_directory, **kwargs):
        """As upstream; the Q-Former's tokenizer goes into a folder of its own."""
        written = super().save_pretrained(save_directory, **kwargs)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(Path(save_directory) / QFORMER_FOLDER)
        return written

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As upstream, with the Q-Former's tokenizer where the folder has one."""
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {k: v for k, v in kwargs.items() if k in HUB_OPTIONS}
        has_one = cached_file(
            pretrained_model_name_or_path, f"{QFORMER_FOLDER}/tokenizer_config.json",
            _raise_exceptions_for_missing_entries=False, **hub,
        )  # fmt: skip
        if has_one:
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=QFORMER_FOLDER, **hub
            )
        return processor

    # ------------------------------------------------------------------------------ raw text

    def __call__(
        self, images=None, text=None, return_tensors=None, padding=False, add_special_tokens=True,
        **kwargs,
    ):  # fmt: skip
        """Tokenise raw text in which ``<image>`` stands for an image.

        Args:
            images: one image, a list for one text, or a list of lists, one per text.
            text: a string or a list of strings.
            add_special_tokens: add what the tokenizer puts around a text (often a BOS token), as
                upstream processors do; never to a text that opens with the BOS token already.

        Returns:
            ``BatchFeature`` of ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (B, T)
            and, if there are images, ``pixel_values`` (tiles, 3, H, W) and ``image_sizes``
            (images, 2).

        Raises:
            ValueError: a text has more or fewer ``<image>`` than images, or is too long.
        """
        if text is None:
            raise ValueError("text is missing; for images alone use processor.image_processor.")
        texts = [text] if isinstance(text, str) else list(text)
        per_text = _images_per_text(images, texts)
        rows, pictures = [], []
        for number, (one, own) in enumerate(zip(texts, per_text, strict=True)):
            self._refuse_endless([one])
            marks = one.count(IMAGE_TOKEN)
            if marks != len(own):
                raise ValueError(
                    f"text {number} has {marks} {IMAGE_TOKEN} for {len(own)} images; write one "
                    "for each image."
                )
            own = [Picture(image, self._words(one)) for image in own]
            segments = re.split(f"({re.escape(IMAGE_TOKEN)})", one)
            kinds = ((part, i % 2 == 1) for i, part in enumerate(segments))
            special = add_special_tokens and not self._opens(one)
            rows.append(self._encode(kinds, self._counts(own), add_special_tokens=special))
            pictures += own
        return self._batch(rows, pictures, return_tensors, padding, **kwargs)

    # ---------------------------------------------------------------------------------- chats

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, add_generation_prompt: bool = False,
        continue_final_message: bool = False, return_assistant_tokens_mask: bool = False,
        tokenize: bool = False, return_tensors: str | None = None, return_dict: bool = False,
        padding: bool | str = False, processor_kwargs: dict | None = None, **kwargs,
    ):  # fmt: skip
        """Render one chat or a list of chats; with ``tokenize`` make model inputs of them.

        Message content is a string or a list of parts, ``{"type": "text", "text": ...}`` and
        ``{"type": "image", "image": path, bytes or PIL image}``; ``{"type": "video", "video": list
        of images, or an animated image file}`` becomes ``num_frames`` images. The template only
        ever sees strings, so any text LLM's template works.

        With ``return_assistant_tokens_mask`` the result also has ``assistant_masks`` (B, T), 1
        where the template's ``{% generation %}`` block wrote.

        Raises:
            ValueError: the template cannot mark assistant tokens, an image cannot be read, or a
                chat is too long.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        rows, pictures, texts = [], [], []
        for messages in conversation if batched else [conversation]:
            chat = self._chat(messages)
            rendered, spans = self._render(
                chat, chat_template, return_assistant_tokens_mask,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **kwargs,
            )  # fmt: skip
            if tokenize:
                special = self.add_special_tokens and not self._opens(rendered)
                counts = self._counts(chat.pictures)
                rows.append(self._encode(chat.segments(rendered), counts, spans, special))
                pictures += chat.pictures
            else:
                texts.append(chat.as_text(rendered))
        if not tokenize:
            return texts if batched else texts[0]
        options = {"return_tensors": return_tensors, "padding": padding} | (processor_kwargs or {})
        inputs = self._batch(rows, pictures, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode_chat(self, messages) -> tuple[dict[str, list[int]], list[Picture]]:
        """One complete chat as a training row, the pixels of its images still unread.

        Returns:
            ``{"input_ids", "mm_token_type_ids", "labels"}`` (T each; labels -100 outside what the
            assistant wrote) and the pictures, for :meth:`image_inputs`.
        """
        chat = self._chat(messages)
        rendered, spans = self._render(chat, None, mark_assistant=True)
        special = self.add_special_tokens and not self._opens(rendered)
        counts = self._counts(chat.pictures)
        row = self._encode(chat.segments(rendered), counts, spans, special)
        row["labels"] = np.where(row.pop("assistant_masks"), row["input_ids"], -100)
        return {key: array.tolist() for key, array in row.items()}, chat.pictures

    def encode_prompt(self, messages) -> tuple[dict[str, list[int]], list[Picture], list[int]]:
        """A chat that waits for the assistant's reply, the pixels of its images still unread.

        Returns:
            ``{"input_ids", "mm_token_type_ids"}`` (T each), the pictures, for
            :meth:`image_inputs`, and how many positions each of them takes.
        """
        chat = self._chat(messages)
        rendered, _ = self._render(chat, None, mark_assistant=False, add_generation_prompt=True)
        special = self.add_special_tokens and not self._opens(rendered)
        counts = self._counts(chat.pictures)
        row = self._encode(chat.segments(rendered), counts, None, special)
        return {key: array.tolist() for key, array in row.items()}, chat.pictures, counts

    def pictures(self, messages) -> list[Picture]:
        """The pictures of a chat in reading order, unread; a clip as its frames."""
        return self._chat(messages).pictures

    def _render(self, chat, chat_template, mark_assistant: bool, **kwargs):
        """The chat as text, and the character spans the assistant wrote (``None`` if unmarked)."""
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError(
                "the tokenizer has no chat template: set model.chat_template to a packaged one "
                f"({', '.join(names())}) or to a jinja file."
            )

        from jinja2 import TemplateError

        def render(template, mark):
            (rendered,), spans = render_jinja_template(
                conversations=[chat.messages],
                chat_template=template,
                return_assistant_tokens_mask=mark,
                **{**self.tokenizer.special_tokens_map, **kwargs},
            )
            return rendered, spans[0] if mark else None

        try:
            rendered, spans = render(template, mark_assistant and marks_assistant(template))
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template cannot write this chat ({' '.join(str(error).split())}); check "
                "the roles, their order and every content."
            ) from None
        if mark_assistant:
            if spans is None:
                spans = marked_twin(template, rendered, lambda twin: render(twin, True))
            chat.check_learned(rendered, spans)
        return rendered, spans

    def _chat(self, messages) -> Chat:
        self._refuse_endless(_texts(messages))
        swapped = [*self._special_tokens(), *filter(None, [self.image_mark])]
        return Chat(messages, swapped, self.num_frames, self.image_mark)

    def _refuse_endless(self, texts: list[str]) -> None:
        """Refuse texts of megabytes by their start, since all of it would take minutes.

        The tokens of a start are those of the whole but for its last word; twice as many as fit
        leave no doubt.
        """
        if self.max_length is None:
            return
        length, limit = sum(map(len, texts)), CHARACTERS_A_TOKEN * self.max_length
        if length <= limit:
            return
        start = " ".join(texts)[:limit]
        part = Part(start, "literal", np.zeros(len(start), bool))
        count = len(tokenise(self.tokenizer, [part])[0])
        if count > 2 * self.max_length:
            raise ValueError(
                f"{length:,} characters, of which the first {limit:,} are {count:,} tokens, do not "
                f"fit the context of {self.max_length}; shorten the text. Nothing is ever cut."
            )

    def _opens(self, text: str) -> bool:
        """Whether a text has its BOS token already."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def _words(self, text: str) -> str:
        """A raw text without image marks and special tokens."""
        for token in (IMAGE_TOKEN, *self._special_tokens()):
            text = text.replace(token, " ")
        return text.strip()

    def _special_tokens(self) -> list[str]:
        return [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]

    # -------------------------------------------------------------------------------- encoding

    def _counts(self, pictures: list[Picture]) -> list[int]:
        """How many positions each picture takes; opens the files where their sizes matter."""
        if self.num_image_tokens is not None:
            return [self.num_image_tokens] * len(pictures)
        resolutions = getattr(self.image_processor, "resolutions", ())
        if len(resolutions) == 1:
            return [resolutions[0][2]] * len(pictures)
        return [self.image_processor.num_image_tokens(*image_size(p.source)) for p in pictures]

    def image_inputs(self, pictures: list[Picture], where: str = "", change=None) -> dict:
        """Model inputs of images: pixels, sizes, and the words beside them where they are read.

        ``where`` opens error messages, for example ``"data.jsonl line 3: "``. ``change`` is called
        with each loaded picture and that name of it, and gives the picture to be shown instead.

        Raises:
            ValueError: an image cannot be read, or the words beside it are too many.
        """
        names = [f"{where}image {n}" for n in range(1, len(pictures) + 1)]
        loaded = [load_image(p.source, name) for p, name in zip(pictures, names, strict=True)]
        if change is not None:
            loaded = list(map(change, loaded, names))
        inputs = dict(self.image_processor(loaded, return_tensors="pt"))
        return inputs | self.instruction_inputs(pictures, where)

    def instruction_inputs(self, pictures: list[Picture], where: str = "") -> dict:
        """The words beside images, for a connector that reads them; else nothing."""
        inputs = {}
        if self.qformer_tokenizer is not None:
            texts = self.qformer_tokenizer(
                [picture.instruction for picture in pictures], padding=True, return_tensors="pt",
                verbose=False, split_special_tokens=True,
            )  # fmt: skip
            width, limit = texts["input_ids"].shape[1], self.qformer_tokenizer.model_max_length
            if width > limit:
                raise ValueError(
                    f"{where}the words beside an image are {width} tokens; the Q-Former reads at "
                    f"most {limit}. Shorten them."
                )
            inputs["qformer_input_ids"] = texts["input_ids"]
            inputs["qformer_attention_mask"] = texts["attention_mask"]
        return inputs

    def _encode(
        self, segments, counts, assistant_spans=None, add_special_tokens=False
    ) -> dict[str, np.ndarray]:
        """Tokenise ``(text, kind)`` segments to one row, as the tokenizer would the whole text.

        ``kind`` is ``False`` (template text), ``True`` (an image) or ``"literal"`` (text whose
        special tokens must stay text). ``counts`` are the positions that each image takes.
        ``assistant_spans`` are character ranges of the rendered
        text, in which an image or literal counts as its sentinel. Arrays of (T,).
        """
        segments = [(text, kind, *width) if width else (text, kind, len(text))
                    for text, kind, *width in segments]  # fmt: skip
        written = np.zeros(sum(width for _, _, width in segments), bool)  # by the assistant
        for start, end in assistant_spans or ():
            written[start:end] = True
        parts, position = [], 0  # in the rendered text
        for text, kind, width in segments:
            own = written[position : position + width]
            # a literal has one place in the rendered text
            parts.append(Part(text, kind, np.full(len(text), own[0]) if kind else own))
            position += width
        front = 0
        if self.images_first:
            front = sum(part.kind is True for part in parts)
            parts = [part for part in parts if part.kind is not True]
        ids, learned = tokenise(self.tokenizer, parts, add_special_tokens)
        if front:
            ids = np.concatenate([np.full(front, -1), ids])
            learned = np.concatenate([np.zeros(front, bool), learned])
        is_image = ids < 0
        if counts:
            widths = np.ones(len(ids), int)
            widths[is_image] = counts
            ids, learned, is_image = (np.repeat(a, widths) for a in (ids, learned, is_image))
        row = {
            "input_ids": np.where(is_image, self.tokenizer.pad_token_id, ids),
            "mm_token_type_ids": is_image.astype(int),
            "assistant_masks": learned.astype(int),
        }
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
        self, rows, pictures, return_tensors=None, padding=False, truncation=False, **unknown
    ) -> BatchFeature:
        if truncation:
            raise ValueError("truncation could cut through an image; shorten the text instead.")
        if unknown:
            raise ValueError(f"BridgeProcessor has no option {', '.join(unknown)}.")
        rows = [{key: array.tolist() for key, array in row.items()} for row in rows]
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        data = {key: [row[key] for row in rows] for key in rows[0]}
        if padding:
            pad, side = self.tokenizer.pad_token_id, self.tokenizer.padding_side
            data = {k: pad_rows(v, pad if k == "input_ids" else 0, side) for k, v in data.items()}
        elif return_tensors and len({len(row["input_ids"]) for row in rows}) > 1:
            raise ValueError("rows differ in length; pass padding=True.")
        if pictures:
            data |= self.image_inputs(pictures)
        return BatchFeature(data, tensor_type=return_tensors)

    # ------------------------------------------------------------------------------- decoding

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens=True, **kwargs
    ):
        """Decode generated ids, as upstream processors do."""
        return self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )


def pad_rows(rows: list[list[int]], value: int, side: str) -> list[list[int]]:
    """Rows of ids to equal length."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return [pad + row if side == "left" else row + pad for row, pad in pairs]


def _texts(messages) -> list[str]:
    """The texts of a chat, of any form."""
    texts = []
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, (list, tuple)) else [content]:
            texts.append(part.get("text") if isinstance(part, dict) else part)
    return [text for text in texts if isinstance(text, str)]


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
