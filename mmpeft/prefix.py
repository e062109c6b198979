"""Greedy replies to many prompts whose common starts run once.

Prompts that start alike (a system prompt, then the same picture) have the same KV cache there, so
it is computed once and handed on: first what all prompts share, then what those about the same
pictures share, then the rest of each. A picture is encoded once however often it is asked about,
a prompt that occurs twice is answered once, and rows that have ended leave the batch. The replies
are those of ``generate``, up to rounding.
"""

import copy
import os
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerationMode

from mmpeft.conversation import Picture
from mmpeft.images import content_hash
from mmpeft.language_model import attends_alone, attention_window, rope_limit
from mmpeft.processing import pad_rows

FEATURE_BYTES = 2**30  # of encoder features kept for pictures that are asked about again
PER_ROW = ("attention_mask", "mm_token_type_ids", "position_ids")  # what generate passes of each
# settings that look at the whole row, with their value when off: padding would count
READ_ROWS = {
    "no_repeat_ngram_size": 0, "repetition_penalty": 1, "min_length": 0, "guidance_scale": 1,
    "bad_words_ids": None, "sequence_bias": None, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip


@dataclass
class Prompt:
    """A chat that waits for its reply.

    Attributes:
        input_ids, types: token ids and ``mm_token_type_ids``, T each.
        marks: what stands at each position: a token id, or a picture (with the words a connector
            reads beside it) and the place in it. Equal marks up to a position: an equal KV cache.
        pictures: key, picture and number of positions of each picture, in order.
    """

    input_ids: list[int]
    types: list[int]
    marks: tuple[Hashable, ...]
    pictures: list[tuple[Hashable, Picture, int]]

    @classmethod
    def of(cls, processor, messages, places: dict | None = None) -> "Prompt":
        """Encode a chat; ``places`` may be shared between calls, and saves memory then."""
        row, pictures, counts = processor.encode_prompt(messages)
        places = {} if places is None else places
        reads = processor.qformer_tokenizer is not None
        found = [
            ((picture_key(picture.source), picture.instruction if reads else ""), picture, count)
            for picture, count in zip(pictures, counts, strict=True)
        ]
        for key, _, count in found:
            places.setdefault(key, [(key, place) for place in range(count)])
        seen = iter([place for key, _, _ in found for place in places[key]])
        types = row["mm_token_type_ids"]
        pairs = zip(row["input_ids"], types, strict=True)
        marks = tuple(next(seen) if kind else token for token, kind in pairs)
        return cls(row["input_ids"], types, marks, found)


def picture_key(source) -> Hashable:
    """Equal for sources that show the same picture; a file is known by its path, size and date."""
    if isinstance(source, (str, Path)) and os.path.isfile(source):  # a data URL is no path
        status = os.stat(source)
        return str(source), status.st_size, status.st_mtime_ns
    return content_hash(source)


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Positions at which all prompts are alike, from the first on; every prompt keeps one token."""
    first = prompts[0].marks
    length = min(len(prompt.marks) for prompt in prompts) - 1
    for prompt in prompts:
        length = same_start(first, prompt.marks, length)
    return length


def same_start(one: Sequence, other: Sequence, most: int) -> int:
    """How many entries, at most ``most``, two sequences have in common from the first on."""
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


def new_cache(model) -> DynamicCache:
    """As ``generate`` makes one."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def keeps_cache(model) -> bool:
    """Whether the LLM's cache is keys and values alone, which copy; a recurrent state is more."""
    config = model.generation_config
    plain = config.cache_implementation in (None, "hybrid")  # generate takes the latter for None
    plain = plain and config.use_cache is not False
    return plain and attends_alone(model.config)


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow or shrink without the other; keys and values are not copied."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]  # they replace their tensors
    return copied


class Gallery:
    """Pictures as the LLM reads them; what the frozen encoder says of each is kept.

    Args:
        limit: bytes of features; beyond it the picture that was longest not asked about goes.
    """

    def __init__(self, model, processor, limit: int = FEATURE_BYTES):
        self.model, self.processor, self.limit = model, processor, limit
        self._features: OrderedDict = OrderedDict()  # key -> (features, size or None)

    def embeds(self, prompts: Sequence[Prompt]) -> dict[Hashable, Tensor]:
        """``(tokens, D)`` for every different picture of the prompts, by its key."""
        wanted = {key: (picture, n) for p in prompts for key, picture, n in p.pictures}
        if not wanted:
            return {}
        new = {key[0]: picture for key, (picture, _) in wanted.items()}
        self._encode({key: picture for key, picture in new.items() if key not in self._features})
        looked = []
        for key in wanted:
            self._features.move_to_end(key[0])
            looked.append(self._features[key[0]])
        inputs = {"image_features": [features for features, _ in looked]}
        if looked[0][1] is not None:
            inputs["image_sizes"] = torch.stack([size for _, size in looked])
        words = self.processor.instruction_inputs([picture for picture, _ in wanted.values()])
        inputs |= {name: value.to(self.model.device) for name, value in words.items()}
        tokens = self.model.get_image_features(**inputs)  # (image tokens, D)
        self._forget()
        counts = [count for _, count in wanted.values()]
        return dict(zip(wanted, tokens.split(counts), strict=True))

    def _encode(self, pictures: dict[Hashable, Picture]) -> None:
        if not pictures:
            return
        inputs = self.processor.image_inputs(list(pictures.values()))
        sizes = inputs.get("image_sizes", [None] * len(pictures))
        pixels = inputs["pixel_values"].to(self.model.device)
        features = self.model.encode_images(pixels, inputs.get("image_sizes"))
        for key, image, size in zip(pictures, features, sizes, strict=True):
            self._features[key] = (image.clone(), size)  # not a view of the whole batch

    def _forget(self) -> None:
        total = sum(features.nbytes for features, _ in self._features.values())
        while total > self.limit:
            _, (features, _) = self._features.popitem(last=False)
            total -= features.nbytes


@dataclass
class Start:
    """What a batch of rows has behind it: a cache and what is in its slots.

    Attributes:
        ids, types, mask: int64 ``(B, slots)``; 0 in the mask is padding.
    """

    cache: DynamicCache
    ids: Tensor
    types: Tensor
    mask: Tensor

    def select(self, rows: list[int]) -> "Start":
        """A copy with these rows, a row as often as it is named; the original stays as it is."""
        chosen, cache = torch.tensor(rows, device=self.ids.device), copy_cache(self.cache)
        cache.batch_select_indices(chosen)
        return Start(cache, self.ids[chosen], self.types[chosen], self.mask[chosen])

    @property
    def width(self) -> int:
        return self.ids.shape[1]


def try_sharing(model, processor) -> "SharedPrompts | None":
    """What shares starts, or ``None`` and one line on stderr that says why not."""
    sharing = SharedPrompts(model, processor)
    why_not = sharing.why_not()
    if why_not is None:
        return sharing
    print(f"prompts share no starts: {why_not}.", file=sys.stderr)
    return None


class SharedPrompts:
    """Greedy replies of a bridge to many prompts; pictures stay known between calls."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.gallery = Gallery(model, processor)
        self._bears_holes: bool | None = None

    def why_not(self) -> str | None:
        """What :meth:`replies` cannot serve of the LLM and its settings; ``None`` if nothing."""
        config = copy.copy(self.model.generation_config)
        config.do_sample = False
        mode = config.get_generation_mode()
        if mode != GenerationMode.GREEDY_SEARCH:
            return f"the generation_config of this LLM asks for {mode.value}"
        for name, off in READ_ROWS.items():
            if (value := getattr(config, name, None)) not in (None, off):
                return f"the generation_config of this LLM has {name} {value}, which reads padding"
        if not keeps_cache(self.model):
            return "this LLM keeps no cache, or one that is more than keys and values"
        return None

    @torch.inference_mode()
    def replies(
        self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int, done=lambda n: None
    ) -> list[list[int]]:
        """Token ids of each prompt's reply, in order.

        Args:
            batch_size: rows at a time.
            done: called with the number of prompts that were answered since the last call.
        """
        asked = defaultdict(list)
        for number, prompt in enumerate(prompts):
            asked[prompt.marks].append(number)
        replies: list = [None] * len(prompts)
        for seeing in (True, False):  # the gate may treat them apart, so they share no start
            rows = [prompts[n[0]] for n in asked.values() if bool(prompts[n[0]].pictures) is seeing]
            for batch, written in self._write(rows, max_new_tokens, batch_size):
                numbers = [asked[prompt.marks] for prompt in batch]
                for own, reply in zip(numbers, written, strict=True):
                    for number in own:
                        replies[number] = reply
                done(sum(map(len, numbers)))
        return replies

    def _write(self, prompts, max_new_tokens, batch_size):
        """Yield batches of prompts and their replies."""
        if not prompts:
            return
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        groups = defaultdict(list)
        for prompt in prompts:
            groups[tuple(key for key, _, _ in prompt.pictures)].append(prompt)
        # A group runs its own start once if that is more than all have and several follow it.
        ends = {key: common_prefix(own) for key, own in groups.items()}
        grouped = {k: own for k, own in groups.items() if len(own) > 1 and ends[k] > shared}
        longest = max(len(prompt.marks) for prompt in prompts)
        if (shared or grouped) and not self.shares(longest, max_new_tokens):
            shared, grouped = 0, {}
        start = None
        if shared:
            images = self.gallery.embeds(prompts[:1])
            start = self._read(None, prompts[:1], [shared], images)
        rest = [p for key, own in groups.items() if key not in grouped for p in own]
        for batch in _batches(rest, lambda p: len(p.marks), batch_size):
            first = start and start.select([0] * len(batch))
            images = self.gallery.embeds(batch)
            yield batch, self._generate(first, batch, images, max_new_tokens)
        for keys in _batches(list(grouped), ends.get, batch_size):
            some = [grouped[key][0] for key in keys]
            images = self.gallery.embeds([p for key in keys for p in grouped[key]])
            begun = start and start.select([0] * len(keys))
            begun = self._read(begun, some, [ends[key] for key in keys], images)
            rows = [
                (i, prompt, len(prompt.marks) - ends[key])
                for i, key in enumerate(keys) for prompt in grouped[key]
            ]  # fmt: skip
            for part in _batches(rows, lambda row: row[2], batch_size):
                batch = [prompt for _, prompt, _ in part]
                own = begun.select([i for i, _, _ in part])
                yield batch, self._generate(own, batch, images, max_new_tokens)

    # ---------------------------------------------------------------------------- the forward

    def inputs(self, start: Start | None, prompts, ends, images) -> dict:
        """Inputs of the whole rows up to ``ends``, and image tokens of what is not in ``start``."""
        read = start.mask.sum(1).tolist() if start else [0] * len(prompts)
        spans = list(zip(prompts, read, ends, strict=True))
        blocks = {
            "input_ids": [p.input_ids[a:b] for p, a, b in spans],
            "mm_token_type_ids": [p.types[a:b] for p, a, b in spans],
            "attention_mask": [[1] * (b - a) for _, a, b in spans],
        }
        before = (start.ids, start.types, start.mask) if start else (None,) * 3
        pad = self.processor.tokenizer.pad_token_id
        inputs = {}
        for (name, rows), own in zip(blocks.items(), before, strict=True):
            rows = pad_rows(rows, pad if name == "input_ids" else 0, "left")
            rows = torch.tensor(rows, device=self.model.device)
            inputs[name] = rows if own is None else torch.cat([own, rows], 1)
        tokens = []
        for prompt, a, b in spans:
            if any(prompt.types[a:b]):
                own = torch.cat([images[key] for key, _, _ in prompt.pictures])
                tokens.append(own[sum(prompt.types[:a]) : sum(prompt.types[:b])])
        if tokens:
            inputs["image_embeds"] = torch.cat(tokens)  # (image tokens, D)
        inputs["past_key_values"] = start.cache if start else new_cache(self.model)
        return inputs

    def _read(self, start, prompts, ends, images) -> Start:
        """Fill the cache up to ``ends``."""
        inputs = self.inputs(start, prompts, ends, images)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        behind = start.width if start else 0
        step = self.model.prepare_inputs_for_generation(
            **inputs, next_sequence_length=ids.shape[1] - behind, is_first_iteration=True,
            position_ids=_positions(mask), use_cache=True,
        )  # fmt: skip
        if self.model.config.gate == "sample":
            # it asks for the whole rows, whose pictures may still be to come
            sees = [[bool(p.pictures)] for p in prompts]
            step["adapter_mask"] = torch.tensor(sees, device=self.model.device)
        self.model(**step, logits_to_keep=1)
        return Start(inputs["past_key_values"], ids, inputs["mm_token_type_ids"], mask)

    def _generate(self, start, prompts, images, max_new_tokens) -> list[list[int]]:
        inputs = self.inputs(start, prompts, [len(p.marks) for p in prompts], images)
        return self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, custom_generate=_greedy
        )

    # ------------------------------------------------------------------------------ the probe

    def shares(self, longest: int, max_new_tokens: int) -> bool:
        """Whether starts are shared exactly: padding may stand between a start and what follows.

        An LLM that counts places by slots (MPT) would see it; so would an attention window that
        the slots, at most twice the longest prompt, do not fit. Rotary positions that change with
        the length are those of the start no more once a row outgrows it.
        """
        window, limit = attention_window(self.model.config), rope_limit(self.model.config)
        if window is not None and 2 * longest + max_new_tokens > window:
            return False
        if limit is not None and longest + max_new_tokens > limit:
            return False
        if self._bears_holes is None:
            self._bears_holes = self._try_hole()
        return self._bears_holes

    def _try_hole(self, start: int = 4, hole: int = 64, rest: int = 4) -> bool:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(start + hole + rest, device=self.model.device)[None] * 7 % vocabulary

        def logits(before, gap):  # (rest, V), in two passes as a shared start is
            row = torch.cat([ids[:, :before], ids[:, start : start + gap], ids[:, -rest:]], 1)
            mask = torch.ones_like(row)
            mask[:, before : before + gap] = 0
            cache, position = new_cache(self.model), _positions(mask)
            step = {"past_key_values": cache, "use_cache": True}
            if self.model.config.gate != "none":
                step["adapter_mask"] = torch.zeros(1, 1, dtype=torch.bool, device=row.device)
            for part in [slice(0, before), slice(before, row.shape[1])][not before :]:
                out = self.model(
                    input_ids=row[:, part], position_ids=position[:, part],
                    attention_mask=mask[:, : part.stop], **step,
                )  # fmt: skip
            return out.logits[0, -rest:].float()

        whole, without = logits(start, 0), logits(0, 0)
        # rounding is far below what the start does to the logits
        return bool((logits(start, hole) - whole).norm() < 0.1 * (without - whole).norm())


def _positions(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _batches(items: list, length, size: int):
    """Items of about one length; a half full batch ends where the length changes."""
    batch = []
    for item in sorted(items, key=length):
        longer = bool(batch) and length(item) > length(batch[-1])
        if len(batch) == size or (longer and 2 * len(batch) >= size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _greedy(
    model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
) -> list[list[int]]:
    """transformers' greedy loop for ``generate(custom_generate=...)``; ended rows leave the batch.

    Returns the new tokens of each row, its end included.
    """
    width = input_ids.shape[1]
    written: list = [None] * len(input_ids)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # still in the batch
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        ended = stopping_criteria(input_ids, None)  # (B,)
        if ended.any():
            for row, new in zip(
                rows[ended].tolist(), input_ids[ended, width:].tolist(), strict=True
            ):
                written[row] = new
            if ended.all():
                return written
            rows, input_ids = rows[~ended], input_ids[~ended]
            for name in PER_ROW:
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = model_kwargs[name][~ended]
            model_kwargs["past_key_values"].batch_select_indices(~ended)
        step = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **model_kwargs
        )
        outputs = model(**step, return_dict=True)
