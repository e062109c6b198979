"""One row from its JSON: strictly, so that nothing of it is lost on the way."""

import json
import re
from pathlib import Path

from mmpeft.formats.errors import RowError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Duplicate(ValueError):
    """A key that an object has twice, of which JSON readers keep the last."""


def line(path: Path, number: int, text: str) -> dict:
    """A line of a JSONL file. Raises :class:`RowError`."""
    return _parse(path, number, text, "line", "write one object a line, or a list of objects")


def element(path: Path, number: int, text: str) -> dict:
    """An element of a JSON array. Raises :class:`RowError`."""
    return _parse(path, number, text, "row", "correct the file")


def _parse(path: Path, number: int, text: str, unit: str, remedy: str) -> dict:
    def wrong(problem, remedy=remedy):
        return RowError(path, number, "", problem, remedy, unit)

    try:
        row = _load(text)
        if SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode()
    except _Duplicate as error:
        raise wrong(f"the key {error} stands twice in one object", "keep one of them") from None
    except UnicodeEncodeError:
        problem = "a text has one half of a surrogate pair, which is no character"
        raise wrong(problem, "write the character itself, or both halves") from None
    except RecursionError:
        raise wrong("not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        if text.strip() == "{":
            raise wrong("not JSON in one line (here begins an object over several lines)") from None
        # no JSON, or a number of thousands of digits
        raise wrong(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise wrong(f"a JSON {type(row).__name__}, no object") from None
    return row


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        raise _Duplicate(next(repr(k) for k, _ in pairs if k in seen or seen.add(k)))
    return found


_load = json.JSONDecoder(object_pairs_hook=_object).decode
