"""Compilers in processes of their own: orders go in, answers come out one by one, and a death costs one order.

A failed assertion inside the compiler ends its process, and a process that *interprets* Triton (``TRITON_INTERPRET=1``)
cannot compile; so the parent never compiles.  Nor does it wait for ever: a child that takes too long is ended.
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

__all__ = ["SECONDS", "Death", "answer_orders", "answers"]

_MARK = "answer: "
"""Tells a child's answers from whatever else a compiler prints."""
_READY = "ready for orders"
"""What a child says first: one that never does will not do better the next time."""

SECONDS = 180.0
"""How long a child may be at one order: a compile takes seconds on an idle core."""


@dataclass(frozen=True)
class Death:
    """How the child ended that was at an order."""

    reason: str
    aborted: bool = False
    """Whether the compiler gave up by itself, as it does where one of its assertions fails; it will the next time."""


def answers(
    orders: Sequence[Any], code: str, *, workers: int = 1, deadline: float = math.inf, seconds: float = SECONDS
) -> Iterator[tuple[int, dict[str, Any] | Death]]:
    """Hands ``orders`` to ``workers`` child processes and yields each order's index and its answer, as they come.

    Closing the iterator ends the children; so does the deadline, and the orders that have no answer then get none.

    Args:
        orders: anything that can be pickled.
        code: what a child runs; it ends in :func:`answer_orders`.
        workers: children at the same time.
        deadline: of ``time.monotonic()``.
        seconds: how long a child may take for one order before it is ended.
    """
    found: queue.SimpleQueue[tuple[int, dict[str, Any] | Death] | BaseException | None] = queue.SimpleQueue()
    stop = Event()
    shares = [range(first, len(orders), workers) for first in range(min(workers, len(orders)))]

    def work(share: Sequence[int]) -> None:
        try:
            with closing(_share([orders[index] for index in share], code, stop, seconds)) as results:
                for index, answer in zip(share, results, strict=False):
                    found.put((index, answer))
        except BaseException as error:  # it has to surface where the answers are waited for
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
    """The child: reads its orders and writes ``answer`` of each as a line of JSON, as soon as it has it."""
    print(_READY, flush=True)
    for order in pickle.loads(base64.b64decode(sys.stdin.read())):
        print(_MARK + json.dumps(answer(order)), flush=True)


def _share(orders: list[Any], code: str, stop: Event, seconds: float) -> Generator[dict[str, Any] | Death]:
    """The answers to one worker's orders; where a child dies, a new one goes on behind the order that it was at."""
    done = 0
    while done < len(orders) and not stop.is_set():
        for answer in _child(orders[done:], code, stop, seconds):
            done += 1
            yield answer


def _child(orders: list[Any], code: str, stop: Event, seconds: float) -> Iterator[dict[str, Any] | Death]:
    """The answers that one child lives to give, and, if it died before the last, how."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(tritontower.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # Files, not pipes: a compiler may say more on its way out than a pipe holds while nobody reads it.
    with tempfile.TemporaryFile() as letter, tempfile.TemporaryFile() as complaints:
        letter.write(base64.b64encode(pickle.dumps(orders)))
        letter.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=letter, stdout=subprocess.PIPE, stderr=complaints, env=environment
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
            complaints.seek(0)
            last_words = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
            cause = f"the compiler's process ended with {status}: {last_words[0][:200]}"
            if watch.late:
                cause = f"the compiler took longer than {seconds:g} seconds"
            # A shell, or a child of the child's, passes an abort on as 128 and the signal's number.
            aborted = status in (-signal.SIGABRT, 128 + signal.SIGABRT)
            yield from [Death(cause, aborted)] * (1 if ready else missing)


class _Watch(Thread):
    """Ends a child when that is told, or when it says nothing for too long."""

    def __init__(self, child: "subprocess.Popen[bytes]", stop: Event, seconds: float) -> None:
        super().__init__(daemon=True)
        self.child, self.stop, self.seconds = child, stop, seconds
        self.since = time.monotonic()
        self.late = False

    def run(self) -> None:
        """Looks five times a second."""
        while self.child.poll() is None:
            self.late = time.monotonic() - self.since > self.seconds
            if self.late or self.stop.wait(0.2):
                self.child.kill()
                return
