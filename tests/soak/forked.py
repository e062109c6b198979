"""Work in a forked child of a process that has imported everything: seconds less for each try."""

import faulthandler
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

POLL = 0.001  # s


class Child:
    """A child that runs ``work`` and then ends; what it prints goes to ``log``.

    Args:
        before: also done in the child, first.
    """

    def __init__(self, work: Callable[[], object], log: Path, before: Callable = lambda: None):
        sys.stdout.flush()
        sys.stderr.flush()
        self.log, self.code = log, None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)  # so that its own children can be ended with it
            stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            torch.set_num_threads(1)  # a thread pool does not live on in a fork
            faulthandler.enable()  # kill -ABRT of one that hangs says where
            tqdm.set_lock(threading.RLock())  # else all share one, and one that dies may hold it
            before()
            work()
            code = 0
        except BaseException as error:
            traceback.print_exc()
            code = getattr(error, "code", 1)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, timeout: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether it still runs after ``timeout`` seconds, or when ``until`` first holds."""
        deadline = time.monotonic() + timeout
        while not self.ended():
            if until() or time.monotonic() > deadline:
                return True
            time.sleep(POLL)
        return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def finish(self, timeout: float = 600) -> int:
        """Its exit code; it is an error that it takes longer."""
        if self.wait(timeout):
            self.end_group()
            raise TimeoutError(f"still running after {timeout} s: {self.log.read_text()[-2000:]}")
        return self.code

    def end_group(self) -> None:
        """End it and what it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        while not self.ended():
            time.sleep(POLL)


def until_done(
    work: Callable[[], object],
    log: Path,
    draw: random.Random,
    seconds: float,
    writing: Callable[[float], bool],
    most: int,
) -> tuple[int, int]:
    """Start ``work``, kill it with SIGKILL, start it again ..., until it ends by itself.

    Half of the kills come at a random moment of ``seconds``; the other half wait for such a moment
    and then for something to be written, and come within milliseconds of that.

    Args:
        writing: whether something is half-written that was begun since a time.
        most: kills; after them it is let run.

    Returns:
        kills, and how many of them left something half-written.
    """
    kills = torn = 0
    children = []
    try:
        while True:
            since = time.time() - 0.01  # the clock of the files is coarser
            child = Child(work, log)
            children.append(child)
            if kills < most and child.wait(draw.uniform(0, seconds)):
                if draw.random() < 0.5:
                    child.wait(seconds, lambda since=since: writing(since))
                    time.sleep(draw.uniform(0, 0.02))
                child.kill()
            code = child.finish()
            if code == 0:
                return kills, torn
            if code != -signal.SIGKILL:
                raise AssertionError(f"ended with {code}: {log.read_text()[-3000:]}")
            kills += 1
            torn += writing(since)
    finally:
        for child in children:
            child.end_group()
