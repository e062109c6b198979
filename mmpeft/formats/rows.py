"""Rows of any source as chats, converted when they are read."""

from collections.abc import Iterator, Sequence

import numpy as np

from mmpeft.formats.errors import RowError

TRIED = 100  # rows that may be bad before the first good one, from which the format is detected


class Rows(Sequence):
    """Rows as ``{"messages": [...], "where": "FILE line N"}``, converted on access.

    A list of captions or answers makes as many rows, in the order of the list.

    Attributes:
        file: what holds them.
        schema: the schema's name, as ``llava``.
        columns: what the schema's columns are called here.
    """

    def __init__(self, container, schema, columns: dict[str, str], pictures, prompts, like: dict):
        from mmpeft.formats.schema import NAMES, SCHEMAS

        self._container, self._pictures, self._prompts = container, pictures, prompts
        self.file, self.schema, self.columns = container.file, schema, columns
        self._several = SCHEMAS[schema].several
        image = [name for name in NAMES["image"] if like.get(name) is not None]
        self._read = [*dict.fromkeys([*image, *columns.values()])]
        self._ends = None  # behind the last entry of each row of the container, if it has several
        if self._several is not None and isinstance(like[columns[self._several]], list):
            self._ends = np.cumsum(container.lengths(columns[self._several]).clip(1))

    def __str__(self):
        return f"{self.file}: {len(self):,} rows, {self.schema} ({', '.join(self._read)})"

    def __len__(self):
        return len(self._container) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        number, entry = self._place(index)
        return self._convert(self._container[number], number, index, entry)

    def __iter__(self) -> Iterator[dict]:
        for _, row in self.scan():
            if isinstance(row, RowError):
                raise row
            yield row

    def scan(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, dict | RowError]]:
        """Rows ``start`` to ``stop`` in order, numbered from 0; for a bad one, what is wrong."""
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return
        first, _ = self._place(start)
        last, _ = self._place(stop - 1)
        index = start
        for number, data in enumerate(self._container.scan(first, last + 1), first):
            until = index + 1 if self._ends is None else min(int(self._ends[number]), stop)
            while index < until:
                yield index, self._try(data, number, index, self._place(index)[1])
                index += 1

    def entries(self, data: dict, number: int, index: int) -> list[dict | RowError]:
        """All rows that row ``number`` of the container makes; ``index`` is the first of them."""
        if self._ends is None:
            return [self._try(data, number, index, None)]
        found = data.get(self.columns[self._several])
        count = max(1, len(found)) if isinstance(found, list) else 1
        return [self._try(data, number, index + entry, entry) for entry in range(count)]

    def _try(self, data, number, index, entry) -> dict | RowError:
        if isinstance(data, RowError):
            return data
        try:
            return self._convert(data, number, index, entry)
        except RowError as error:
            return error

    def _place(self, index: int) -> tuple[int, int | None]:
        """Number of the container's row from 0, and of the entry in its list."""
        if self._ends is None:
            return index, None
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def _convert(self, data: dict, number: int, index: int, entry: int | None = None) -> dict:
        """A row of the container as a chat. Raises :class:`RowError`."""
        from mmpeft.formats.schema import SCHEMAS, Row

        container = self._container
        file, unit, count = container.file, container.unit, container.number(number)

        def error(field, problem, remedy):
            return RowError(file, count, field, problem, remedy, unit)

        prompt = self._prompts[index % len(self._prompts)] if self._prompts else None
        own = None if entry is None else (self._several, entry)
        row = Row(data, self.columns, self._pictures, prompt, error, own)
        messages = SCHEMAS[self.schema].convert(row)
        where = f"{file} {unit} {count}"
        if entry is not None and isinstance(data[self.columns[self._several]], list):
            where += f", {self.columns[self._several]}[{entry}]"
        return {"messages": messages, "where": where}


def open_rows(
    source, split: str | None = None, format: str = "auto", columns: dict[str, str] | None = None,
    image_root: str | None = None, allow_urls: bool = False, prompt: str | list[str] | None = None,
) -> Rows:  # fmt: skip
    """Open data as people have it, see ``docs/data.md``.

    Opening is cheap: rows are read when they are asked for. Only a list of captions or answers in
    the first row makes it read every row once, since each entry becomes a row.

    Args:
        source: a file, a folder, several files as ``shards/*.tar``, or a data set of the hub as
            ``owner/name``, ``owner/name:config``; any with ``#SPLIT``.
        split: which split of a source that has several, unless ``#SPLIT`` says.
        format: messages, llava, sharegpt, caption, vqa, or auto.
        columns: names of columns that are not called as the format has them, as ``{"question":
            "sentence", "answer": "label"}``; ``split`` names one that says which rows belong to
            the split.
        image_root: folder that all paths of pictures must stay in; null takes them from the
            source's folder, wherever they lead.
        allow_urls: fetch pictures from http(s) addresses.
        prompt: what the user says with a picture that has a caption, or around ``{question}``;
            of a list, rows take one each in turn.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it has no rows, no such split, or (:class:`RowError`) fits no format.
    """
    from mmpeft.formats.containers import open_container

    container, split = open_container(source, split)
    return rows_of(container, split, format, columns, image_root, allow_urls, prompt)


def rows_of(
    container, split: str | None = None, format: str = "auto",
    columns: dict[str, str] | None = None, image_root: str | None = None, allow_urls: bool = False,
    prompt: str | list[str] | None = None,
) -> Rows:  # fmt: skip
    """Rows of a container, see :func:`open_rows`."""
    from mmpeft.formats.chosen import Chosen
    from mmpeft.formats.pictures import Pictures
    from mmpeft.formats.schema import SCHEMAS, detect

    number, data = _first_good(container)

    def wrong(problem, remedy):
        return RowError(container.file, container.number(number), "", problem, remedy,
                        container.unit)  # fmt: skip

    schema, columns = detect(data, format, columns, wrong)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    mark = SCHEMAS[schema].prompt
    if prompts and (mark is None or not all(mark in one for one in prompts)):
        needed = "has no use for one; leave it out" if mark is None else f"needs {mark} in it"
        raise ValueError(f"{container.file}: prompt is set, but format {schema} {needed}.")
    if "split" in columns and split is not None:
        container = Chosen(container, columns["split"], split)
    pictures = Pictures(container.folder, image_root, allow_urls)
    return Rows(container, schema, columns, pictures, prompts, data)


def _first_good(container) -> tuple[int, dict]:
    """The first row that can be read at all, and its number from 0."""
    problem = None
    for number, row in enumerate(container.scan(0, min(TRIED, len(container)))):
        if not isinstance(row, RowError):
            return number, row
        problem = problem or row
    raise problem
