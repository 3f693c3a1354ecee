"""Child processes for compilation: each takes a list of orders and returns the answers one by one.

A failed assertion inside the compiler ends its process, and a process that *interprets* Triton (``TRITON_INTERPRET=1``)
cannot compile, so the parent never compiles.  A child that dies or takes too long fails only its current order.
"""

import base64
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import TIMEOUT_MAX, Event, Thread
from typing import Any

import tritontower

_MARK = "answer: "
"""Distinguishes a child's answers from the output of the compiler."""
_READY = "ready for orders"
"""First line of a child; a child that ends before it fails all its orders."""

SECONDS = 180.0
"""Time limit of one order; a compile takes seconds on an idle core."""


@dataclass(frozen=True)
class Death:
    """End of a child process before it answered its order."""

    reason: str
    aborted: bool = False
    """Whether the compiler aborted (a failed assertion), which will happen again."""


def answers(
    orders: Sequence[Any], code: str, *, workers: int = 1, deadline: float = math.inf, seconds: float = SECONDS
) -> Iterator[tuple[int, dict[str, Any] | Death]]:
    """Distributes ``orders`` to ``workers`` child processes and yields the index and the answer of each, as they come.

    Closing the iterator ends the children.  So does the deadline; orders without an answer are then not yielded.

    Args:
        orders: anything that can be pickled.
        code: Python code of a child; it ends in :func:`answer_orders`.
        workers: children at the same time.
        deadline: of ``time.monotonic()``.
        seconds: time limit of one order.
    """
    found: queue.SimpleQueue[tuple[int, dict[str, Any] | Death] | BaseException | None] = queue.SimpleQueue()
    stop = Event()
    shares = [range(first, len(orders), workers) for first in range(min(workers, len(orders)))]

    def work(share: Sequence[int]) -> None:
        try:
            with closing(_share([orders[index] for index in share], code, stop, seconds)) as results:
                for index, answer in zip(share, results, strict=False):
                    found.put((index, answer))
        except BaseException as error:  # raised again in the thread that iterates
            found.put(error)
        finally:
            found.put(None)

    threads = [Thread(target=work, args=(share,), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            try:
                answer = found.get(timeout=min(max(0.0, deadline - time.monotonic()), TIMEOUT_MAX))
            except queue.Empty:
                return
            if answer is None:
                running -= 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                yield answer
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def answer_orders(answer: Callable[[Any], dict[str, Any]]) -> None:
    """Runs a child: reads its orders and writes each answer as a line of JSON."""
    print(_READY, flush=True)
    for order in pickle.loads(base64.b64decode(sys.stdin.read())):
        print(_MARK + json.dumps(answer(order)), flush=True)


def _share(orders: list[Any], code: str, stop: Event, seconds: float) -> Generator[dict[str, Any] | Death]:
    """Yields the answers to one worker's orders; if a child dies, a new one continues with the next order."""
    done = 0
    while done < len(orders) and not stop.is_set():
        for answer in _child(orders[done:], code, stop, seconds):
            done += 1
            yield answer


def _child(orders: list[Any], code: str, stop: Event, seconds: float) -> Iterator[dict[str, Any] | Death]:
    """Yields the answers of one child and, if it died before the last one, its :class:`Death`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(tritontower.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # Files, not pipes: a compiler may print more than a pipe holds while it is not read.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(base64.b64encode(pickle.dumps(orders)))
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=environment
        )
        watch = _Watch(child, stop, seconds)
        watch.start()
        try:
            missing, ready = len(orders), False
            for line in child.stdout or ():
                watch.since = time.monotonic()
                ready = ready or line.strip() == _READY.encode()
                if line.startswith(_MARK.encode()):
                    yield json.loads(line.removeprefix(_MARK.encode()))
                    missing -= 1
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            watch.join()
            if child.stdout:
                child.stdout.close()
        if missing:
            stderr.seek(0)
            last_line = stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            cause = f"the compiler's process ended with {status}: {last_line[0][:200]}"
            if watch.late:
                cause = f"the compiler took longer than {seconds:g} seconds"
            # A shell, or a child of the child's, passes an abort on as 128 and the signal's number.
            aborted = status in (-signal.SIGABRT, 128 + signal.SIGABRT)
            yield from [Death(cause, aborted)] * (1 if ready else missing)


class _Watch(Thread):
    """Kills a child on request, or after too long without output."""

    def __init__(self, child: "subprocess.Popen[bytes]", stop: Event, seconds: float) -> None:
        super().__init__(daemon=True)
        self.child, self.stop, self.seconds = child, stop, seconds
        self.since = time.monotonic()
        self.late = False

    def run(self) -> None:
        while self.child.poll() is None:
            self.late = time.monotonic() - self.since > self.seconds
            if self.late or self.stop.wait(0.2):
                self.child.kill()
                return
