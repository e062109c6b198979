"""How training ends before its time: a signal, a full disk, a dead worker; each in one line."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from mmpeft import durable

PATIENCE = 20  # SIGTERMs, 0.1 s apart, before a worker is killed


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and did so behind a whole checkpoint.

    Attributes:
        code: what a process exits with, 128 and the number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class FinishStep(TrainerCallback):
    """Inside its ``with``, SIGTERM and SIGINT let the step end and a checkpoint be written.

    A second signal does not wait. Only the main thread can receive signals; elsewhere nothing is
    changed.

    Attributes:
        signal: the one that was received, or ``None``.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal, self._before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._receive) for one in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for one, before in self._before.items():
            signal.signal(one, before)

    def _receive(self, number, frame):
        if self.signal is not None:
            raise Stopped("stopped at once", number)
        self.signal = signal.Signals(number)
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{self.signal.name}: ending the step, then saving.\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside its ``with``, SIGTERM raises :class:`Stopped`; in the main thread alone."""

    def stop(number, frame):
        raise Stopped("", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_signals_to_trainer(begin, worker_id: int) -> None:
    """How a data worker begins: what a terminal or scheduler sends to all processes is not for it.

    It passes over one SIGTERM and ends at the second, see :func:`no_worker_left`.

    Args:
        begin: what else it does then, given ``worker_id``.
    """
    received = []

    def receive(number, frame):
        if received:
            os._exit(0)
        received.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, receive)
    begin(worker_id)


@contextmanager
def no_worker_left() -> Iterator[None]:
    """End the child processes that were started inside and still run.

    After an error the loader lives on, and Python at its exit sends each worker one SIGTERM, which
    it passes over, and waits. Told twice it ends with 0, of which torch makes no error.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        left = set(multiprocessing.active_children()) - before
        for _ in range(PATIENCE):
            for worker in left:
                worker.terminate()
            for worker in left:
                worker.join(0.1)
            left = {worker for worker in left if worker.is_alive()}
        for worker in left:  # stuck in something that handles no signal
            worker.kill()


@contextmanager
def resumable(stage: str, folder: Path) -> Iterator[FinishStep]:
    """Around the training of a stage, or its saving: what ends it says how to go on.

    Args:
        folder: its checkpoints.

    Raises:
        Stopped: a signal was received.
        NotWritten: the disk is full, or cannot be written to.
        ValueError: a worker process is gone.
    """
    finish = FinishStep()
    try:
        with finish:
            yield finish
    except Stopped as stopped:
        raise Stopped(f"{stopped}; {how_to_go_on(stage, folder)}", finish.signal) from None
    except Exception as error:
        if worker_died(error):
            raise ValueError(
                f"stage {stage}: a process that makes samples is gone (often out of memory; fewer "
                f"dataloader_num_workers need less); {how_to_go_on(stage, folder)}"
            ) from error
        full = durable.no_room(error)
        if not full and not isinstance(error, durable.NotWritten):
            raise
        remedy = f"{'. Make room' if full else ''}; {how_to_go_on(stage, folder)}"
        raise durable.NotWritten(f"{error}{remedy}", error.errno) from error
    if finish.signal is not None:
        raise Stopped(how_to_go_on(stage, folder), finish.signal)


def worker_died(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, that of torch for a worker process that is gone.

    torch raises it wherever training is at that moment, in other code that may raise its own of it.
    What goes wrong inside a worker that lives is not meant.
    """
    while error is not None:
        if "DataLoader worker (pid" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def how_to_go_on(stage: str, folder: Path) -> str:
    """What is whole on disk, and the option that goes on from there."""
    if not (folder.parents[1] / "config.yaml").is_file():  # of a candidate, see mmpeft.rank
        return "with --resume, the search for a rank begins anew."
    newest = next(iter(durable.checkpoints(folder)), None)
    since = "begins" if newest is None else f"goes on from step {durable.step_of(newest)}"
    return f"with --resume, stage {stage} {since}."
