"""Replay: chats written by the base LLM itself, to be trained on beside the pictures.

Without an image they show the tuned LLM its own former words, so that it keeps them. Nothing but
the LLM is needed: given only the opening of a user turn, a chat model writes a question, and then
the answer to it. Source: "Magpie", Xu et al. 2024, arXiv 2406.08464, section 2. The answers are
sampled as well: at temperature 1 the loss on them is, up to a constant, an unbiased estimate of
the KL divergence KL(base || tuned). To keep it so, an answer that reaches the token limit is kept
and marked ``"unfinished": true``: its end, which the LLM did not write, is then not learned.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import GenerationConfig, set_seed

from mmpeft import durable
from mmpeft.language_model import load_language_model, load_tokenizer

UNTHINKING = {"enable_thinking": False}  # as answers are learned; templates without it ignore it
SENTINEL = "xMMPEFTx"  # user content that shows where a chat template puts it


def write_replay(
    llm: str,
    output,
    *,
    samples: int = 400,
    max_new_tokens: int = 96,
    seed: int = 0,
    batch_size: int = 16,
    temperature: float = 1.0,
    dtype: str = "bfloat16",
) -> dict:
    """Sample chats from an LLM into a JSONL file for the task ``Messages``.

    Args:
        llm: name or directory of a causal LM with a chat template, or ``starter:NAME``.
        output: file to write, in one step at the end.
        samples: chats to keep.
        max_new_tokens: longest question and longest answer; a longer question is thrown away, a
            longer answer cut there and marked.
        temperature: 1 draws from the LLM's own distribution.
        dtype: floating type of the LLM.

    Returns:
        how many chats were ``kept``, how many of these are ``unfinished``, and how many were
        thrown away by reason.

    Raises:
        FileExistsError: ``output`` exists.
        ValueError: the LLM or its template cannot do it, or hardly any chat is usable.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another --output, or remove it.")
    if min(samples, max_new_tokens, batch_size, temperature) <= 0:
        raise ValueError("samples, max_new_tokens, batch_size and temperature must be above 0.")
    model, tokenizer = load_writer(llm, dtype, max_new_tokens, temperature)
    opening, closing = user_turn(tokenizer, llm)
    output.parent.mkdir(parents=True, exist_ok=True)
    set_seed(seed)

    dropped, chats = Counter(), {}  # question -> answer, as messages
    with tqdm(total=samples, desc="replay", unit="chat") as bar:
        while len(chats) < samples:
            found = sample(model, tokenizer, [opening] * batch_size, closing)
            questions = []
            for text, problem in found:
                if problem is None and (text in chats or text in questions):
                    problem = "duplicate"
                if problem is None:
                    questions.append(text)
                else:
                    dropped[f"{problem} question"] += 1
            prompts = [_render(tokenizer, question, **UNTHINKING) for question in questions]
            answers = sample(model, tokenizer, prompts) if prompts else []
            for question, prompt, (text, problem) in zip(questions, prompts, answers, strict=True):
                if problem in (None, "unfinished") and not _is_read_as_written(
                    tokenizer, question, prompt, text
                ):
                    problem = "malformed"
                if problem not in (None, "unfinished"):
                    dropped[f"{problem} answer"] += 1
                elif len(chats) == samples:
                    dropped["surplus chat"] += 1
                else:
                    mark = {"unfinished": True} if problem else {}
                    chats[question] = {"role": "assistant", "content": text, **mark}
                    bar.update()
            if len(chats) < samples and dropped.total() > 20 * (len(chats) + 10):
                raise ValueError(
                    f"{llm}: hardly any chat can be used: {len(chats)} kept, thrown away: "
                    f"{describe(dropped)}; a larger --max_new_tokens may help."
                )
    rows = [{"messages": [_user(question), answer]} for question, answer in chats.items()]
    durable.write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unfinished = sum("unfinished" in answer for answer in chats.values())
    return {"kept": len(chats), "unfinished": unfinished, "dropped": dict(dropped)}


def describe(dropped: dict[str, int]) -> str:
    """``12 unfinished questions, 3 empty answers``: what was thrown away."""
    return ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in dropped.items()) or "nothing"


def load_writer(llm: str, dtype: str, max_new_tokens: int, temperature: float):
    """The LLM, set to draw from its own distribution, and its tokenizer."""
    model = load_language_model(llm, None, dtype).eval()
    tokenizer = load_tokenizer(llm, None)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    # a whole new one: without the cuts and penalties that the LLM may be published with
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return model, tokenizer


def user_turn(tokenizer, name: str) -> tuple[str, str]:
    """What the chat template writes before a user's words, and after them up to the answer.

    Raises:
        ValueError: there is no chat template, or it does not show the user's words.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{name} has no chat template; replay needs a chat LLM.")
    opening, found, closing = _render(tokenizer, SENTINEL).partition(SENTINEL)
    if not found:
        raise ValueError(f"the chat template of {name} leaves out what the user says.")
    return opening, closing


@torch.inference_mode()
def sample(model, tokenizer, prompts: list[str], closing: str = "") -> list[tuple[str, str | None]]:
    """Sample one text after each rendered prompt, up to the end of its turn.

    Args:
        closing: template text that ends the turn where the LLM has no token for it.

    Returns:
        ``(text, problem)`` of each; the problem is ``None``, ``"unfinished"`` (the limit came
        first), ``"empty"`` or ``"malformed"`` (the text holds a special token).
    """
    inputs = tokenizer(
        prompts, add_special_tokens=False, padding=True, return_token_type_ids=False,
        return_tensors="pt",
    ).to(model.device)  # fmt: skip
    stop = closing.strip()
    stopping = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    generated = model.generate(**inputs, **stopping)[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    results = []
    for ids in generated.tolist():
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        text = tokenizer.decode(ids[:length])
        if stop and stop in text:
            text, length = text.split(stop)[0], len(ids)
        text = text.strip().rstrip("\ufffd")  # the limit may have split a character
        problem = "unfinished" if length is None else None
        if not text:
            problem = "empty"
        elif special & set(tokenizer(text, add_special_tokens=False)["input_ids"]):
            problem = "malformed"
        results.append((text, problem))
    return results


def _render(tokenizer, question: str, **options) -> str:
    """The prompt that asks a question, as text."""
    return tokenizer.apply_chat_template(
        [_user(question)], tokenize=False, add_generation_prompt=True, **options
    )


def _is_read_as_written(tokenizer, question: str, prompt: str, answer: str) -> bool:
    """Whether the chat, as it will be learned, has the answer where the LLM wrote it."""
    chat = [_user(question), {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **UNTHINKING)
    except TemplateError:  # the template refuses what it says
        return False
    # a template may put a space before what is said
    return text.startswith(prompt) and text[len(prompt) :].lstrip().startswith(answer)


def _user(question: str) -> dict:
    return {"role": "user", "content": question}
