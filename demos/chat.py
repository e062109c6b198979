"""Chat with a run in the browser: the bridge, or its base LLM, on the same chat."""

import random
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from mmpeft.chat_session import SIDES, ChatSession, Figures

FAILED = "No reply; this turn is left out of the chat"
# the share button works on Hugging Face Spaces alone; the chosen side fades under the mouse pointer
CSS = """
button[title=Share] {display: none}
input[type=radio]:checked {background-color: var(--checkbox-background-color-selected) !important}
"""


def launch(run, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the chat page of a run until interrupted; it needs nothing from elsewhere.

    Raises:
        ValueError: gradio is not installed, or the run does not load.
        OSError: there is no such run, or the port is taken.
    """
    gr = _gradio()
    from mmpeft.checkpoint import load

    model, processor = load(run)
    page = build(model, processor, Path(run).resolve().name, find_examples(run))
    page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, show_error=True,
        footer_links=[], theme=gr.themes.Default(),  # its fonts ship with gradio
        css=CSS,
    )  # fmt: skip


def build(model, processor, name: str, examples: Sequence[dict] = ()):
    """The chat page as ``gr.Blocks``.

    Args:
        name: what the page calls the model.
        examples: messages to click on, ``{"text": str, "files": [path, ...]}``.
    """
    gr = _gradio()
    session = ChatSession(model, processor)

    def reply(message, history, side, max_new_tokens, temperature):
        """Yield the reply so far and how quick it is."""
        figures = Figures()
        try:
            messages = to_messages(history, message)
            for text in session.stream(messages, side, max_new_tokens, temperature, figures):
                yield text, gr.skip()
            yield text, f"<small>{figures}</small>"
        except Exception as error:  # not raised: after that Gradio leaves the message box locked
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()
            problem = str(error) or type(error).__name__
            yield {"role": "assistant", "content": problem, "metadata": {"title": FAILED}}, ""

    with gr.Blocks(
        title=f"mmpeft: {name}", analytics_enabled=False, fill_height=True,
        delete_cache=(3600, 86400),  # uploads: looked at hourly, kept for a day (seconds)
    ) as page:  # fmt: skip
        parts = model.config.identities
        gr.Markdown(
            f"**{name}** · `{parts['language_model']['name']}` sees through "
            f"`{parts['vision_encoder']['name']}` · gate `{model.config.gate}`"
        )
        with gr.Row():
            side = gr.Radio(
                SIDES, value=SIDES[0], label="answering",
                info="base LLM: adapter off, images still enter",
            )  # fmt: skip
            max_new_tokens = gr.Slider(1, 1024, 128, step=1, label="max new tokens")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="temperature", info="0: greedy")
        speed = gr.Markdown(render=False)
        gr.ChatInterface(
            reply,
            multimodal=True,
            chatbot=gr.Chatbot(show_label=False, scale=1, buttons=["copy"]),
            textbox=gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", stop_btn=True,
                placeholder="Ask something; add images with the paper clip",
            ),
            additional_inputs=[side, max_new_tokens, temperature],
            additional_outputs=[speed],
            examples=[[example] for example in examples] or None,
            analytics_enabled=False,  # it does not inherit the page's
        )  # fmt: skip
        speed.render()
    return page


def to_messages(history: list[dict], message: dict) -> list[dict]:
    """Gradio's history and new message as chat messages with typed parts.

    A turn that failed, or was stopped before it had a reply, is left out: a picture that cannot be
    read would otherwise spoil every later turn.

    Args:
        history: ``{"role", "content"}``; content is a text, a file, or a list of such.
        message: ``{"text": str, "files": [path or {"path": ...}, ...]}``.

    Raises:
        ValueError: the message is empty.
    """
    if not message["files"] and not message["text"].strip():
        raise ValueError("the message is empty; write something or add an image.")
    files = [file if isinstance(file, dict) else {"path": file} for file in message["files"]]
    turns = [turn for turn in history if (turn.get("metadata") or {}).get("title") != FAILED]
    turns.append({"role": "user", "content": [*files, message["text"] or []]})
    roles_in_turn = [*pairwise(turn["role"] for turn in turns), None]
    return [
        {"role": turn["role"], "content": _parts(turn["content"])}
        for turn, roles in zip(turns, roles_in_turn, strict=True)
        if roles != ("user", "user")
    ]


def _parts(content) -> list[dict]:
    """Whatever Gradio or a task calls content, as typed parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return [part for item in content for part in _parts(item)]
    if content.get("type") == "text":
        return _parts(content["text"])
    if content.get("type") in ("image", "video"):
        return [content]
    return [{"type": "image", "image": content.get("file", content)["path"]}]


def find_examples(run) -> list[dict]:
    """The first message of one test row of each type of the run's task, if that is at hand."""
    from mmpeft.config import task_of_run

    try:
        task = task_of_run(run)
        rows = list(task.rows("test")) if task else []
    except (ValueError, OSError):
        return []  # a chat does not need them
    random.Random(0).shuffle(rows)  # neighbours often share a picture
    examples = []
    for row in {task.question_type(row): row for row in rows}.values():
        messages = task.messages(row)
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        parts = _parts(first["content"])
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        files = [part["image"] for part in parts if part["type"] == "image"]
        clips = any(part["type"] == "video" for part in parts)  # the page takes images alone
        if not clips and all(isinstance(file, str) for file in files):
            examples.append({"text": text, "files": files})
    return examples


def _gradio():
    try:
        import gradio
    except ImportError:
        raise ValueError("the chat page needs gradio: pip install 'mmpeft[demo]'") from None
    return gradio
