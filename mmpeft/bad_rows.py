"""Rows that cannot be learned from: the first one stops the run, or they are passed over, listed.

Passed over is a row of which reading, checking or preparing raises a ``ValueError`` or finds no
file; what goes wrong behind that, or a file that changed while it was read, always stops. A worker
process cannot write the run's list: it hands on with a sample what it passed over, and the process
that trains counts and lists it with the sample.
"""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import get_worker_info

from mmpeft import durable
from mmpeft.formats.errors import RowError

KEY = "bad_rows"  # of a sample or batch: what a worker passed over on the way to it
FILE = "bad_rows.jsonl"
_PLACE = re.compile(r"(.*) (\w+) (\d+)(?:, (.*))?", re.DOTALL)
_FIELD = re.compile(r"((?:messages|images?|video|clip)[\w\[\]., ]{,40}): (.*)", re.DOTALL)


class TooManyBadRows(ValueError):
    """More rows cannot be learned from than may be passed over."""


class BadRows:
    """What was passed over, each row once.

    Args:
        limit: most rows that may be passed over; ``None`` passes over none.

    Attributes:
        rows: ``{file, row, field, problem, remedy}`` of each, in the order they were found.
    """

    def __init__(self, limit: int | None = None):
        self.limit, self.rows = limit, []
        self._known, self._unsent, self._path = set(), [], None

    @contextmanager
    def passing(self, names: list[str]):
        """What stands inside ends, quietly, with an error that the rows may be passed over for.

        ``names`` are looked at then, see :meth:`pass_over`.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.pass_over(error, *names):
                raise

    def pass_over(self, error: Exception, *names: str) -> bool:
        """Whether the rows of these names may be passed over because of ``error``; counts them.

        The message of a row's error begins with the name of the row, here of one of them. Without
        a name the row could not be read; then the error itself must say which it is.

        Raises:
            TooManyBadRows: they are more than the limit.
        """
        opening = next((name for name in names if str(error).startswith(f"{name}:")), None)
        if self.limit is None or (opening is None and not isinstance(error, RowError)):
            return False
        self.add([described(error, name, opening) for name in names] or [described(error)])
        return True

    def add(self, rows: list[dict]) -> None:
        """Count and list rows that are not known yet.

        Raises:
            TooManyBadRows: they are more than the limit.
        """
        new = []
        for row in rows:
            if (place := (row["file"], row["row"])) not in self._known:
                self._known.add(place)
                new.append(row)
        self.rows += new
        if get_worker_info() is not None:
            self._unsent += new
        elif new:
            self._write()
        if self.limit is not None and len(self.rows) > self.limit:
            last = self.rows[-1]
            raise TooManyBadRows(
                f"{len(self.rows)} rows cannot be learned from, data.max_bad_rows is {self.limit}; "
                f"the last, {last['file']} row {last['row']}: {last['problem']}. See them all with "
                "`mmpeft data check`, mend them or raise data.max_bad_rows."
            )

    def take(self, sample: dict) -> dict:
        """The sample, in a worker with what is to be handed on."""
        if self._unsent:
            sample[KEY], self._unsent = self._unsent, []
        return sample

    def keep_in(self, run: Path) -> None:
        """List them in the run's folder from now on, behind what an earlier start listed there."""
        self._path = Path(run) / FILE
        if not self._path.is_file():
            return self._write() if self.rows else None
        found, self.rows, self._known = self.rows, [], set()
        with self._path.open(encoding="utf-8") as file:
            self.add([*map(json.loads, file), *found])

    def _write(self) -> None:
        """Few rows, so the whole list anew: it is never torn."""
        if self._path is None:
            return
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        durable.write(self._path, "".join(lines))

    def say(self) -> None:
        """One line on what was passed over so far, if anything was."""
        if self.rows:
            print(
                f"bad rows: {len(self.rows)} passed over so far (at most {self.limit}), the next "
                f"good row in place of each; listed in {self._path}.",
                file=sys.stderr,
            )


def place(name: str) -> tuple[str, str, int, str] | None:
    """``("FILE", "line", 3, "ENTRY ")`` of the row's name ``"FILE line 3, ENTRY"``.

    The entry is empty where the name has none; ``None`` of other names.
    """
    found = _PLACE.fullmatch(name)
    return found and (found[1], found[2], int(found[3]), f"{found[4]} " if found[4] else "")


def described(error: Exception, name: str = "", opening: str | None = None) -> dict:
    """``{file, row, field, problem, remedy}`` of an error about a row.

    Args:
        name: name of the row, ``"FILE line 3"``.
        opening: what the message begins with, where that is the name of another row.
    """
    if isinstance(error, RowError):
        said = {key: getattr(error, key) for key in ("file", "row", "field", "problem", "remedy")}
    else:  # "NAME: field: problem; remedy."
        text = " ".join(str(error).removeprefix(opening or name).lstrip(": ").split())
        named = _FIELD.fullmatch(text)
        field, text = named.groups() if named else ("messages", text)
        problem, _, remedy = text.removesuffix(".").rpartition("; ")
        problem, remedy = (problem, remedy) if problem else (remedy, "")
        said = {"file": name, "row": 0, "field": field, "problem": problem, "remedy": remedy}
    if found := place(name):
        said["file"], _, said["row"], entry = found
        said["field"] = entry + said["field"].removeprefix(entry)
    return said
