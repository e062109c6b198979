"""How a row is written: the schemas, and which of them a row fits."""

from collections.abc import Callable
from typing import NamedTuple

from mmpeft.checks import BESIDE
from mmpeft.formats.chats import from_conversations, from_messages
from mmpeft.formats.errors import RowError
from mmpeft.formats.pairs import from_caption, from_vqa
from mmpeft.formats.pictures import Pictures


class Schema(NamedTuple):
    """
    Attributes:
        needs: columns that a row must have.
        convert: makes the chat of a :class:`Row`.
        several: the column that may be a list of texts, each of which is a row of its own.
        prompt: what the task's prompt must hold; ``None`` where there can be none.
    """

    needs: tuple[str, ...]
    convert: Callable[["Row"], list[dict]]
    several: str | None = None
    prompt: str | None = None


SCHEMAS = {
    "messages": Schema(("messages",), from_messages),
    "llava": Schema(("conversations",), from_conversations),
    "sharegpt": Schema(("conversations",), from_conversations),
    "caption": Schema(("image", "caption"), from_caption, "caption", ""),
    "vqa": Schema(("question", "answer"), from_vqa, "answer", "{question}"),
}
# what a column may be called without being named by ``columns``
NAMES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "image": ("image", "images", "file_name", "file_names"),
    "caption": ("caption", "captions"),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "split": ("split",),
}


class Row:
    """One row on its way to a chat, and how errors name it."""

    def __init__(
        self, data: dict, columns: dict[str, str], pictures: Pictures, prompt: str | None,
        error: Callable[[str, str, str], RowError], entry: tuple[str, int] | None = None,
    ):  # fmt: skip
        self.data, self.prompt, self.error = data, prompt, error
        self._columns, self._pictures, self._entry = columns, pictures, entry
        self.image_column = columns.get("image") or self._named("image")
        beside = [name for name in BESIDE if not name.startswith("image")]
        self.refuse(
            tuple(name for name in beside if name not in columns.values()), "would not be shown",
            "give frames as a part of type video, or take the column out",
        )  # fmt: skip

    def _named(self, role: str) -> str | None:
        found = [name for name in NAMES[role] if self.data.get(name) is not None]
        if len(found) > 1:
            raise self.error(
                " and ".join(found), f"could both be the {role}",
                f"choose one with columns: {{{role}: {found[0]}}}",
            )  # fmt: skip
        return found[0] if found else None

    def refuse(self, names: tuple[str, ...], problem: str, remedy: str) -> None:
        """Refuse columns that hold something."""
        for name in names:
            if self.data.get(name) not in (None, [], {}, "", "[]", "null"):
                raise self.error(name, problem, remedy)

    def column(self, role: str) -> str:
        return self._columns.get(role, role)

    def list(self, role: str) -> list:
        """A column that must be a list with something in it."""
        value = self.data.get(self.column(role))
        if not isinstance(value, list):
            problem = "is missing" if value is None else f"is a {type(value).__name__}, no list"
            raise self.error(self.column(role), problem, "give a list of turns")
        if not value:
            raise self.error(self.column(role), "is empty", "fill it or drop the row")
        return value

    def text(self, role: str) -> str:
        """A column that must be words; of a list, the entry in hand, or for a question its lines.

        A whole number is written out.
        """
        name = self.column(role)
        value = self.data.get(name)
        several = self._entry is not None and role == self._entry[0]
        if several and isinstance(value, list):
            if not value:
                raise self.error(name, "is an empty list", "fill it or drop the row")
            name, value = f"{name}[{self._entry[1]}]", value[self._entry[1]]
        elif role == "question" and isinstance(value, list) and all(map(_is_text, value)):
            value = "\n".join(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
        if value is None or isinstance(value, str):
            raise self.error(name, "is missing" if value is None else "is empty", "write a text")
        remedy = "write a text"
        if isinstance(value, list) and not several:
            remedy += "; lists make a row of each entry only if the first row has one, too"
        raise self.error(name, f"is a {type(value).__name__}, no text", remedy)

    def pictures(self) -> list:
        """The pictures of the row itself, not of parts, in order."""
        name = self.image_column
        value = self.data.get(name) if name else None
        if value is None:
            return []
        if not isinstance(value, list):
            return [self.picture(value, name)]
        return [self.picture(one, f"{name}[{n}]") for n, one in enumerate(value)]

    def picture(self, source, field: str):
        """A picture as ``load_image`` takes it."""
        try:
            return self._pictures.find(source)
        except ValueError as error:
            raise self.error(field, *error.args) from None

    def clip(self, source, field: str):
        """A clip as ``load_frames`` takes it."""
        if isinstance(source, list):
            return [self.picture(frame, f"{field}[{n}]") for n, frame in enumerate(source)]
        return self.picture(source, field)


def _is_text(value) -> bool:
    return isinstance(value, str)


def detect(
    data: dict, format: str, columns: dict[str, str] | None, wrong: Callable[[str, str], Exception]
) -> tuple[str, dict[str, str]]:
    """The schema that a row fits, and the columns of it that are there.

    Args:
        format: a schema's name, or ``auto``.
        columns: what columns are called, where it is not as in ``NAMES``.
        wrong: makes the error from problem and remedy.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in NAMES]:
        raise ValueError(f"columns has {', '.join(unknown)}; it can name {', '.join(NAMES)}.")
    if format != "auto" and format not in SCHEMAS:
        raise ValueError(f"format is {format!r}; use auto, {', '.join(SCHEMAS)}.")
    has = ", ".join(map(str, data)) or "nothing"
    for role, name in columns.items():
        if name not in data:
            raise wrong(f"has no column {name!r}, which columns names for {role} (it has {has})",
                        "correct columns")  # fmt: skip
    for role, names in NAMES.items():
        if role in ("image", *columns):
            continue  # every row for itself: some have none
        found = [name for name in names if name in data]
        if len(found) > 1:
            raise wrong(f"has {' and '.join(found)}, which could both be the {role}",
                        f"choose one with columns: {{{role}: {found[0]}}}")  # fmt: skip
        if found:
            columns[role] = found[0]
    pictures = any(name in data for name in (*NAMES["image"], columns.get("image")))
    there = {*columns, "image"} if pictures else set(columns)
    if format != "auto":
        if missing := [role for role in SCHEMAS[format].needs if role not in there]:
            raise wrong(f"has no {' and no '.join(missing)} for format {format} (it has {has})",
                        f"name the column with columns: {{{missing[0]}: NAME}}")  # fmt: skip
        return format, columns
    fit = [name for name, schema in SCHEMAS.items() if set(schema.needs) <= there]
    if "llava" in fit:  # the same conversion; what is with pictures is called llava
        fit.remove("sharegpt" if pictures else "llava")
    if len(fit) > 1:
        raise wrong(f"fits the formats {' and '.join(fit)} (it has {has})",
                    f"choose one with format: {fit[0]}")  # fmt: skip
    if not fit:
        needs = "; ".join(f"{n} has {' and '.join(s.needs)}" for n, s in SCHEMAS.items())
        raise wrong(f"fits no known format (it has {has}; {needs})",
                    "name its columns, as columns: {question: NAME, answer: NAME}")  # fmt: skip
    return fit[0], columns
