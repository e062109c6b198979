"""Replies in a conversation: streamed, timed, and going on from the KV cache of the turn before."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import DynamicCache, TextIteratorStreamer

from mmpeft.language_model import context_length, rope_limit
from mmpeft.prefix import Prompt, SharedPrompts, Start, copy_cache, keeps_cache, same_start

SIDES = ("bridge", "base LLM")

# The switched-off adapter and the gate's mask are state of the model: one reply at a time. Gradio
# alone does not see to that, it counts a page and its API as two queues.
_model_in_use = threading.Lock()


@dataclass
class Figures:
    """How quick a reply was.

    Attributes:
        prompt_tokens, reused_tokens: length of the chat, and how much of it was still in the cache.
        new_tokens: length of the reply, its end included.
        first_token, last_token: seconds from the question on.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; ``None`` if there are none."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / (self.last_token - self.first_token)

    def __str__(self):
        if self.first_token is None:
            return ""
        rate = self.tokens_per_second
        rest = "" if rate is None else f" · {rate:.1f} tokens/s"
        return f"first token {self.first_token:.2f} s{rest}"


@dataclass
class _Kept:
    """A conversation that was computed: everything its cache depends on, and the cache."""

    setting: tuple
    marks: tuple  # of a Prompt, one for each cached token
    cache: DynamicCache


class ChatSession:
    """Replies of a bridge, or of its base LLM, to conversations that go on.

    A reply is that of a fresh ``generate`` on the whole chat, up to rounding, without beams: it is
    shown as it grows. What a chat has in common with one of the last conversations on the same side
    is taken from its KV cache.

    Args:
        keep: conversations whose cache stays in memory; may be 0.
    """

    def __init__(self, model, processor, keep: int = 2):
        self.model, self.processor, self.keep = model, processor, keep
        self._shared = SharedPrompts(model, processor)
        self._kept: list[_Kept] = []  # the last used comes last

    def stream(
        self, messages, side=SIDES[0], max_new_tokens=128, temperature=0.0, figures=None
    ) -> Iterator[str]:
        """Generate in a thread; yield the reply so far each time it grows, at least once.

        The last is the whole, decoded at once: some tokenizers drop the space that begins a piece.
        Closing the generator stops the generation.

        Args:
            messages: the whole chat, ending in the user's turn.
            side: ``"bridge"``, or ``"base LLM"`` for the model with its adapter off.
            temperature: 0 is greedy.
            figures: a :class:`Figures` to be filled in.

        Raises:
            ValueError: an unknown side, an unreadable image, or a chat too long for the context.
            Exception: whatever the generation raised.
        """
        if side not in SIDES:
            raise ValueError(f"side {side!r} is unknown; choose one of {', '.join(SIDES)}.")
        figures = Figures() if figures is None else figures
        streamer = _Timed(self.processor.tokenizer, figures)
        prompt = Prompt.of(self.processor, messages)
        length = figures.prompt_tokens = len(prompt.marks)
        context = context_length(self.model.config)
        if context is not None and length + max_new_tokens > context:
            raise ValueError(
                f"the chat has {length} tokens, so a reply of {max_new_tokens} does not fit the "
                f"context of {context}; lower max new tokens or shorten the chat."
            )
        options = {
            "max_new_tokens": max_new_tokens, "do_sample": temperature != 0,
            "temperature": temperature or None, "num_beams": 1, "streamer": streamer,
        }  # fmt: skip
        stopped, errors = threading.Event(), []
        options["stopping_criteria"] = [lambda *_, **__: stopped.is_set()]

        def generate():
            try:
                with _model_in_use:
                    self._generate(prompt, side, figures, options)
            except BaseException as error:
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)  # or the reader would wait forever

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                if piece:
                    yield text
        finally:
            stopped.set()
            worker.join()
        if errors:
            raise errors[0]
        whole = self.processor.tokenizer.decode(streamer.ids, skip_special_tokens=True)
        if whole != text or not text:
            yield whole

    @torch.inference_mode()
    def _generate(self, prompt: Prompt, side: str, figures: Figures, options: dict) -> None:
        answering = self.model.disable_adapter() if side == SIDES[1] else nullcontext()
        # this gate opens for the text before a picture, too
        opens = bool(prompt.pictures) and self.model.config.gate == "sample"
        setting = (side, opens and side == SIDES[0])
        limit = rope_limit(self.model.config)  # a cache made on its other side is another one
        fits = limit is None or len(prompt.marks) + options["max_new_tokens"] <= limit
        start, before = self._resume(setting, prompt) if fits else (None, None)
        behind = figures.reused_tokens = start.width if start else 0
        images = self._shared.gallery.embeds([prompt]) if any(prompt.types[behind:]) else {}
        inputs = self._shared.inputs(start, [prompt], [len(prompt.marks)], images)
        keeps = keeps_cache(self.model)
        if not keeps:
            del inputs["past_key_values"]
        with answering:
            (ids,) = self.model.generate(**inputs, **options).tolist()
        if not keeps or not fits:
            return
        cache = inputs["past_key_values"]
        new = ids[len(prompt.marks) :]
        marks = (prompt.marks + tuple(new))[: cache.get_seq_length()]  # the last token is in none
        if before is not None:
            self._kept.remove(before)
        self._kept.append(_Kept(setting, marks, cache))
        while len(self._kept) > self.keep:
            del self._kept[0]

    def _resume(self, setting, prompt: Prompt) -> tuple[Start | None, _Kept | None]:
        """The start that one of the conversations shares, and that conversation if it goes on."""
        most = len(prompt.marks) - 1
        shared = [
            (same_start(kept.marks, prompt.marks, min(most, len(kept.marks))), kept)
            for kept in self._kept
            if kept.setting == setting
        ]
        length, kept = max(shared, key=lambda pair: pair[0], default=(0, None))
        if not length:
            return None, None
        goes_on = kept if 2 * length >= len(kept.marks) else None
        cache = copy_cache(kept.cache)
        if removed := len(kept.marks) - length:
            try:
                cache.crop(-removed)
            except RuntimeError:  # a sliding window has forgotten what stood before
                return None, goes_on
        row = prompt.input_ids[:length], prompt.types[:length], [1] * length
        own = (torch.tensor([part], device=self.model.device) for part in row)
        return Start(cache, *own), goes_on


class _Timed(TextIteratorStreamer):
    """Keeps the tokens and looks at the clock."""

    def __init__(self, tokenizer, figures: Figures):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.figures, self.began = figures, time.perf_counter()
        self.ids: list[int] = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.figures.last_token = time.perf_counter() - self.began
            if self.figures.first_token is None:
                self.figures.first_token = self.figures.last_token
            self.ids += value.tolist()
            self.figures.new_tokens = len(self.ids)
        super().put(value)
