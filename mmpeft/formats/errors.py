"""What is wrong with a row: where, in which field, and what to do about it; always one line."""


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        file: file, folder or hub name that holds the row.
        row: its number from 1: the line in a JSONL file, else the row.
        field: the field, as ``messages[2].content``; empty where it is the row as a whole.
        problem: what is wrong, to be read behind the field: ``is missing``.
        remedy: what to do: ``write one object a line``.
        where: ``FILE line N`` or ``FILE row N``.
    """

    def __init__(
        self, file: str, row: int = 0, field: str = "", problem: str = "", remedy: str = "",
        unit: str = "row",
    ):  # fmt: skip
        self.file, self.row, self.field = str(file), row, one_line(field)
        self.problem, self.remedy = one_line(problem), one_line(remedy)
        self.unit = unit
        said = "; ".join(filter(None, (self.problem, self.remedy)))
        super().__init__(f"{self.where}: {' '.join(filter(None, (self.field, said)))}.")

    @property
    def where(self) -> str:
        return f"{self.file} {self.unit} {self.row}"

    def __reduce__(self):
        given = (self.file, self.row, self.field, self.problem, self.remedy, self.unit)
        return type(self), given


def one_line(text: str) -> str:
    """The text without line breaks and other characters that a terminal would act on."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
