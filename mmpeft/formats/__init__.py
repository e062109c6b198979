"""Data as people have it, read as chats: :func:`open_rows`, and
:func:`mmpeft.formats.stream.open_stream` for what is too large to fetch.

Two questions are kept apart: what *holds* the rows (a container: JSONL, a JSON array, a table, an
image folder, tar shards, a data set of ``datasets`` on disk or on the hub) and how a row is
*written* (a schema: messages, llava, sharegpt, caption, vqa). ``docs/data.md`` lists both.
"""

from mmpeft.formats.errors import RowError
from mmpeft.formats.rows import Rows, open_rows

__all__ = ["RowError", "Rows", "open_rows"]
