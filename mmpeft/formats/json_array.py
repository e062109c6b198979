"""The elements of a JSON file that is one list of objects, as LLaVA's are."""

import re
from array import array
from pathlib import Path

from mmpeft.jsonl import BLOCK, FileRows

LONGEST = 1 << 28  # bytes of an element
# up to the next bracket outside a text, or to what may not stand there: it would be behind a quote
# that is missing, and rows could not be told apart. Possessive, so that it never goes back.
BRACKET = re.compile(
    rb'(?:[\s,:0-9.+\-eEtrufalsnNIity]++|"(?:[^"\\]++|\\.)*+")*+'
    rb'([^\s,:0-9.+\-eEtrufalsnNIity"])',
    re.DOTALL,
)
BEFORE = {True: re.compile(rb"\s*\Z"), False: re.compile(rb"\s*,\s*\Z")}  # the first, any other


class JsonArray(FileRows):
    """The objects in the list, found by counting brackets, parsed on access.

    Raises:
        ValueError: the file is no list of objects, ends within one, has words outside of quotes, or
            an element of more than ``LONGEST`` bytes.
    """

    def _find(self, file, bar):
        places = array("q")  # offsets in bytes of start and end, by turns
        depth, buffer, offset = 0, b"", file.tell()  # ``offset``: where the buffer starts
        while chunk := file.read(max(BLOCK, len(buffer))):  # linear, however long a text is
            bar.update(len(chunk))
            buffer += chunk
            position = 0
            while found := BRACKET.match(buffer, position):
                here, bracket = found.start(1), found[1]
                if depth == 0:
                    if places or bracket != b"[" or buffer[position:here].strip():
                        raise self._broken(places, "is not one JSON list")
                elif bracket not in b"[]{}":
                    words = buffer[here : here + 20].decode("utf-8", "replace")
                    problem = f"has {words!r} outside of quotes, so that it is not clear where it "
                    problem += "ends, and the rows behind it cannot be read either"
                    raise self._broken(places, problem)
                elif depth == 1 and bracket == b"{":
                    if not BEFORE[not places].match(buffer, position, here):
                        raise self._broken(places, "has no single comma before it")
                    places.append(offset + here)
                elif depth == 1:
                    between = buffer[position:here].strip()
                    if bracket != b"]" or between:
                        raise self._broken(places, "is not an object")
                depth += 1 if bracket in b"[{" else -1
                if depth == 1 and bracket in b"}]" and len(places) % 2:
                    places.append(offset + found.end())
                position = found.end()
            buffer, offset = buffer[position:], offset + position
            if offset + len(buffer) - (places[-1] if places else 0) > LONGEST:
                raise self._broken(places, f"is longer than {LONGEST >> 20} MB, or has a quote "
                                   "that is never closed")  # fmt: skip
        if depth or buffer.strip():
            raise self._broken(places, "is cut: the file ends before the list does")
        return places

    def _broken(self, places, problem: str) -> ValueError:
        return ValueError(
            f"{self.file} row {len(places) // 2 + 1} {problem}; write a list of objects, "
            "or one object a line."
        )

    def _read(self, file, index):
        start, end = self._places[index].tolist()
        file.seek(start)
        return file.read(end - start)


def is_array(path: Path) -> bool:
    """Whether the first character that counts is a list's."""
    with path.open("rb") as file:
        while block := file.read(4096):
            if text := block.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return text.startswith(b"[")
    return False
