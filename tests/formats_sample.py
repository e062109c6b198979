"""Rows, pictures and files in every form that tests of data read."""

import io
import json
import tarfile

import datasets
import pytest
from PIL import Image

from mmpeft.formats import open_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def rows_of(jsonl, rows, **kwargs):
    return [row["messages"] for row in open_rows(jsonl(rows), **kwargs)]


def refusal(call):
    """The error of a call: its one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    line = str(error.value)
    assert line.isprintable() and line.endswith(".") and len(line) < 600, line
    return line


CAPTIONS = ["NA", 'a "red", \n cat', "007", "日本 🙂", "None"]


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_jsonl(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_array(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    return folder / "data.json"


def write_table(kind, name):
    def write(folder, rows):
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(folder / name)
        return folder / name

    return write


def write_metadata(folder, rows):
    rows = [{"file_name": row["image"], "caption": row["caption"]} for row in rows]
    write_jsonl(folder, rows).rename(folder / "metadata.jsonl")
    return folder


def write_splits(folder, rows):
    (folder / "train").mkdir()
    for row in rows:
        (folder / row["image"]).rename(folder / "train" / row["image"])
    write_metadata(folder / "train", rows)
    return folder


def with_pictures(folder, rows):
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = [row | {"image": str(folder / row["image"])} for row in rows]
    return datasets.Dataset.from_list(rows, features=features)


def write_saved(folder, rows):
    data = datasets.DatasetDict({"train": with_pictures(folder, rows)})
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def write_bytes(folder, rows):
    with_pictures(folder, rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def write_ipc(folder, rows):
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(folder / "data.arrow", table.schema) as file:
        file.write_table(table)
    return folder / "data.arrow"


def write_shards(folder, rows):
    for n in (0, 1):
        files = []
        for row in rows[n * 3 : n * 3 + 3]:
            stem = row["image"].split(".")[0]
            files += [(row["image"], (folder / row["image"]).read_bytes()),
                      (f"{stem}.txt", row["caption"].encode())]  # fmt: skip
        write_tar(folder / f"{n}.tar", files)
    return folder / "*.tar"


WRITERS = [
    write_jsonl, write_array, write_table("csv", "data.csv"), write_table("parquet", "a.parquet"),
    write_ipc, write_metadata, write_splits, write_saved, write_bytes, write_shards,
]  # fmt: skip
