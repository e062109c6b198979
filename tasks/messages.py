"""Your own data, in any of the forms of ``docs/data.md``.

The form of the house, in JSONL, has in each line ``{"messages": [...]}`` with the roles and typed
parts of transformers and TRL:

    {"messages": [
      {"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                   {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A cat."}]}

A clip is ``{"type": "video", "video": [frame, ...]}`` or one animated image file; its frames are
images. Paths are relative to the file. Alternatively parts say only ``{"type": "image"}`` and the
line has ``"images": [...]``, one for each part in reading order.

A last assistant message with ``"unfinished": true`` was cut by a limit (``mmpeft replay`` writes
such): its words are learned, the end of the turn behind them is not.

A row is read from the file when it is used, so the file must stay as it is while it is in use.
"""

from dataclasses import dataclass

from mmpeft.task import Task


@dataclass
class Messages(Task):
    """
    Attributes:
        train: what to train on: a file, a folder, shards/*.tar, or owner/name of the hub; behind
            it #SPLIT, where it has splits of other names than train and test.
        test: what to score on; the last assistant message is the reference.
        format: how a row is written: messages, llava, sharegpt, caption or vqa; auto finds out.
        columns: names of columns that are not called as the format has them, as {question:
            sentence, answer: label}.
        image_root: folder that every path of a picture must stay in; null takes any path, relative
            ones from the folder of the file.
        allow_urls: fetch pictures at http(s) addresses, once, into the user's cache.
        prompt: what the user says with a captioned picture, or around {question}; of a list, rows
            take one each in turn.
        streaming: read the rows of train one behind the other while training, again and again;
            for what is too large to be fetched or counted.
        shuffle_buffer: with streaming, so many rows are read and given in random order; 1 leaves
            them in order.
    """

    name = "messages"

    train: str | None = None
    test: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    image_root: str | None = None
    allow_urls: bool = False
    prompt: str | list[str] | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self):
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}; it must be 1 or more.")

    def rows(self, split):
        from mmpeft.formats import open_rows

        if self.streaming and split == "train":
            raise ValueError(
                "task messages: train is streamed, but here its rows are needed by number; set "
                "streaming: false."
            )
        return self._open(open_rows, split)

    def stream(self, split, seed):
        from mmpeft.formats.stream import open_stream

        return self._open(open_stream, split, shuffle=self.shuffle_buffer, seed=seed)

    def _open(self, open_, split, **options):
        source = getattr(self, split)
        if source is None:
            raise ValueError(f"task messages has no {split} file; set {split}: FILE.jsonl.")
        try:
            return open_(
                source, split, format=self.format, columns=self.columns, prompt=self.prompt,
                image_root=self.image_root, allow_urls=self.allow_urls, **options,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise FileNotFoundError(f"task messages: {split}: {error}") from None

    def where(self, row, index):
        return row["where"]

    def messages(self, row):
        return row["messages"]
