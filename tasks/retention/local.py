"""How lm-eval gets the `standard_local` tasks: JSONL files in a folder of the user's.

The forms are those of llm-foundry's `scripts/eval/local_data`, and google-research's for IFEval.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets import Dataset

from mmpeft.tasks.retention import verify

TEXT, TEXTS, INDEX = "a text", "a list of two texts or more", "the index of a choice"
FORMS: dict[str, dict[str, str]] = {  # what each field of a row has to be
    "choices": {"query": TEXT, "choices": TEXTS, "gold": INDEX},
    "contexts": {"context_options": TEXTS, "continuation": TEXT, "gold": INDEX},
    "last_word": {"context": TEXT, "continuation": TEXT},
    "ifeval": {"prompt": TEXT},
}


def documents(file: str, form: str, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """The rows of `data_dir`/`file` as the split `test`; for IFEval see `judgeable`.

    `data_dir` is lm-eval metadata: `TaskManager(metadata={"data_dir": ...})`, or on lm-eval's
    command line `--metadata '{"data_dir": "..."}'`.

    Raises:
        ValueError: no folder given, no such file in it, or a row that is not JSON, lacks a field or
            has something else in it.
    """
    if data_dir is None:
        raise ValueError(
            f"{file} is to be read from a folder of yours; name the folder as `data_dir` (in the "
            "metadata, for lm-eval)"
        )
    path = Path(data_dir).expanduser() / file
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `data_dir` has to be the folder with {file}")
    rows = [parse(line, f"{path}, row {i}") for i, line in enumerate(lines(path), 1)]
    for i, row in enumerate(rows, 1):
        check(row, FORMS[form], f"{path}, row {i}")
    return judgeable(rows, str(path)) if form == "ifeval" else {"test": Dataset.from_list(rows)}


def ifeval_from_hub(**_) -> dict[str, Dataset]:
    """google/IFEval, as `judgeable` leaves it."""
    return judgeable(datasets.load_dataset("google/IFEval", split="train"), "google/IFEval")


def lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if not text:
        raise ValueError(f"{path} is empty; it needs one JSON object a line")
    return text.split("\n")  # not splitlines(): a text may hold Unicode's other line separators


def parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} has to be a JSON object with named fields")
    return row


def check(row: dict, form: dict[str, str], where: str) -> None:
    choices = 0
    for field, kind in form.items():  # the choices come before the index of the right one
        if field not in row:
            raise ValueError(
                f"{where} has no field `{field}`; a row of this task has: {', '.join(form)}"
            )
        value = row[field]
        if kind is TEXT:
            good = _is_text(value)
        elif kind is TEXTS:
            good = isinstance(value, list) and len(value) >= 2 and all(map(_is_text, value))
            choices = len(value) if good else 0
        else:
            good = type(value) is int and 0 <= value < choices
        if not good:
            raise ValueError(f"{where}: `{field}` has to be {kind}, not {value!r}")


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def judgeable(rows: Iterable[dict], where: str) -> dict[str, Dataset]:
    """IFEval rows whose every instruction verify.py can judge as `test`, the others as `excluded`,
    with a warning that counts them.

    Raises:
        ValueError: arguments that are not their instruction's, or no row that can be judged.
    """
    test, excluded, unknown = [], [], set()
    for i, row in enumerate(rows, 1):
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not (isinstance(names, list) and isinstance(arguments, list) and names):
            raise ValueError(
                f"{where}, row {i}: `instruction_id_list` and `kwargs` have to be lists"
            )
        if len(names) != len(arguments):
            raise ValueError(
                f"{where}, row {i}: {len(names)} in `instruction_id_list`, {len(arguments)} in "
                "`kwargs`; every instruction needs its arguments, {} if it has none"
            )
        pairs = [(name, verify.given(each)) for name, each in zip(names, arguments, strict=True)]
        reasons = [reason for pair in pairs if (reason := verify.unsupported(*pair))]
        if reasons:
            unknown.update(reasons)
            excluded.append(row)
            continue
        for name, each in pairs:
            if mistake := verify.mistake(name, each):
                raise ValueError(f"{where}, row {i}, `kwargs`: {mistake}")
        test.append(row)
    if not test:
        raise ValueError(f"{where} has no item that can be judged: {'; '.join(sorted(unknown))}")
    if excluded:
        warnings.warn(
            f"{where}: {len(excluded)} of {len(test) + len(excluded)} items are left out because "
            f"they cannot be judged: {'; '.join(sorted(unknown))}",
            stacklevel=2,
        )
    return {"test": Dataset.from_list(test), "excluded": Dataset.from_list(excluded)}
