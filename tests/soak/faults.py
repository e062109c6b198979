"""Torn files, full disks and dead workers at random places; the run goes on as if nothing was.

``make soak`` runs it. ``SOAK_FAULTS`` is the number of faults of each kind (10 by default).
"""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmpeft import durable
from mmpeft.train import train

from .forked import Child
from .kills import halves, logged, uninterrupted

FAULTS = int(os.environ.get("SOAK_FAULTS", 10))
SEED = int(os.environ.get("SOAK_SEED", 0))
OPTIONS = ["--align.save_steps", "1", "--instruct.save_steps", "1",
           "--model.adapter.init_args.lora_dropout", "0.1"]  # fmt: skip


class Fault(TrainerCallback):
    """Does something as a step of stage instruct begins."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if "instruct" in args.output_dir and state.global_step == self.step:
            self.action()


def tear(draw: random.Random, folder) -> str:
    """Damage one file of the newest checkpoint."""
    newest = durable.checkpoints(folder)[0]
    files = [path for path in newest.rglob("*") if path.is_file() and path.suffix != ".md"]
    path, kind = draw.choice(sorted(files)), draw.choice(("cut", "flip", "gone"))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if kind == "cut":
        path.write_bytes(data[:place])
    elif kind == "flip":
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    else:
        path.unlink()
    return f"{path.name} {kind}"


def fill_disk(draw: random.Random) -> None:
    """The n-th file that is put on disk from now on finds no room, nor any after it."""
    fsync, left = os.fsync, draw.randrange(24)

    def full(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "")
        return fsync(handle)

    os.fsync = full


def limit_files(draw: random.Random) -> None:
    """No file may have more than so many bytes; torch and safetensors then fail in their way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.ftruncate(1, 0)  # the log is a file, too, and has to say how it ended
    os.lseek(1, 0, os.SEEK_SET)
    sys.tracebacklimit = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(4000, 12_000),) * 2)


def kill_worker(draw: random.Random) -> None:
    os.kill(draw.choice(multiprocessing.active_children()).pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["torn", "full", "limit", "worker"])
def test_faults(recipe, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(
        "mmpeft.metrics_file.draw_loss", lambda rows, path: durable.write(path, "drawn")
    )
    draw, began, log = random.Random(SEED), time.time(), tmp_path / "log"
    expected = tmp_path / "whole"
    uninterrupted(lambda: train(recipe, [*OPTIONS, "--output_dir", str(expected)]))
    said = []
    for number in range(FAULTS):
        run = tmp_path / f"{kind} {number}"
        options = [*OPTIONS, "--output_dir", str(run)]
        workers = ["--instruct.dataloader_num_workers", "2"] if kind == "worker" else []
        step = draw.randrange(1, 7)
        action = {
            "torn": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "full": lambda: fill_disk(draw),
            "limit": lambda: limit_files(draw),
            "worker": lambda: kill_worker(draw),
        }[kind]
        child = Child(
            lambda o=[*options, *workers], s=step, a=action: train(
                recipe, o, callbacks=[Fault(s, a)]
            ),
            log,
        )
        code = child.finish()
        child.end_group()
        last = log.read_text().strip().splitlines()[-1]
        if kind == "torn":
            said.append(tear(draw, run / "stages" / "instruct"))
        elif code == 0:  # the room was enough, or the worker had nothing left to do
            said.append("nothing")
        else:
            assert code == 1 and "--resume, stage instruct goes on from step" in last, last
            said.append(last.partition(":")[0])
        child = Child(lambda o=options: train(recipe, o, resume=True), log)
        assert child.finish() == 0, log.read_text()[-3000:]
        if kind == "torn":
            assert "is torn" in log.read_text() and "going on from checkpoint-" in log.read_text()
        assert logged(run) == logged(expected)
        for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
            one, other = (load_file(r / "checkpoint" / file) for r in (run, expected))
            assert all(torch.equal(one[key], other[key]) for key in one | other)
        assert not halves(0, run)
    idle = said.count("nothing")
    found = {"what": kind, "faults": FAULTS - idle, "without_effect": idle,
             "seconds": round(time.time() - began)}  # fmt: skip
    print(json.dumps(found), flush=True)
