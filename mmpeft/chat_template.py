"""Packaged chat templates, and marks of the assistant's words for templates that lack them.

Labels come from a template's ``{% generation %}`` blocks. In every packaged template such a block
holds all that follows the generation prompt: the reply and its end-of-turn token. A published
template without blocks is marked by a packaged one that renders the same chat to the same text.
"""

import difflib
import functools
import re
from importlib.resources import files
from pathlib import Path

FOLDER = files("mmpeft") / "chat_templates"
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

_last_twin: dict[str, str] = {}  # template -> name of the packaged one that fitted last


@functools.cache
def _packaged() -> dict[str, str]:
    """Every packaged template by name; they are read once, since a chat may be held to all."""
    files = (file for file in FOLDER.iterdir() if file.name.endswith(".jinja"))
    return {file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8") for file in files}


def names() -> list[str]:
    """Names of the packaged templates."""
    return sorted(_packaged())


def load_template(name_or_file: str) -> str:
    """The text of a packaged template, or of a ``.jinja`` file.

    Raises:
        ValueError: there is neither, with the nearest name.
    """
    known = names()
    if name_or_file in known:
        return _packaged()[name_or_file]
    if Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    close = difflib.get_close_matches(name_or_file, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"chat_template {name_or_file!r} is neither a file nor a packaged template.{hint} "
        f"Packaged: {', '.join(known)}."
    )


def marks_assistant(template: str) -> bool:
    """Whether a template has a ``{% generation %}`` block."""
    return MARKER.search(template) is not None


def marked_twin(template: str, rendered: str, render) -> list[tuple[int, int]]:
    """Character spans of the assistant's words in ``rendered``, which an unmarked template made.

    Args:
        template: the unmarked template.
        render: renders the same chat with another template: ``render(text) -> (rendered, spans)``.

    Raises:
        ValueError: no packaged template renders this chat to the same text.
    """
    from jinja2 import TemplateError

    first = _last_twin.get(template)
    for name in sorted(names(), key=lambda name: name != first):
        try:
            text, spans = render(load_template(name))
        except TemplateError:  # this one refuses such a chat
            continue
        if text == rendered:
            _last_twin[template] = name
            return spans
    raise ValueError(
        "the chat template does not mark assistant tokens, and no packaged one renders this chat "
        "alike: set model.chat_template to a packaged template "
        f"({', '.join(names())}), or to a copy of your template with {{% generation %}} and "
        "{% endgeneration %} around what the assistant writes, its end-of-turn token included."
    )
