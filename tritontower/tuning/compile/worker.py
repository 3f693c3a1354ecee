"""Child processes for compilation: each answers one order after the other.

A failed assertion inside the compiler ends its process, and a process that *interprets* Triton (``TRITON_INTERPRET=1``)
cannot compile, so the parent never compiles.  A child that dies or takes too long fails only its current order.
"""

import math
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tritontower.benchmarks.documents import child_environment

SECONDS = 180.0
"""Time limit of one order; a compile takes seconds on an idle core."""


@dataclass(frozen=True)
class Death:
    """End of a child process before it answered its order."""

    reason: str
    aborted: bool = False
    """True if the compiler aborted (a failed assertion), which will happen again."""


def answers(
    orders: Sequence[Any], code: str, *, workers: int = 1, deadline: float = math.inf, seconds: float = SECONDS
) -> Iterator[tuple[int, Any]]:
    """Distributes ``orders`` to child processes and yields the index and the answer, or :class:`Death`, of each.

    Closing the iterator ends the children.  So does the deadline; orders without an answer are then not yielded.  ``code``
    is Python code of a child that ends in :func:`answer_orders`; ``seconds`` limit the time of one order.
    """
    waiting = deque(range(len(orders)))
    children: dict[Connection, _Child] = {}
    workers = min(workers, len(orders))
    try:
        while waiting or children:
            while waiting and len(children) < workers:
                started = _Child(code, seconds)
                children[started.connection] = started
            due = min(deadline, *(child.due for child in children.values()))
            ready = wait(list(children), max(0.0, due - time.monotonic()))
            if time.monotonic() > deadline:
                return
            for connection, child in list(children.items()):
                if connection not in ready and time.monotonic() < child.due:
                    continue
                answer, order = child.receive(), child.order
                if isinstance(answer, Death):
                    del children[connection]
                elif waiting:
                    child.begin(waiting.popleft(), orders)
                else:
                    children.pop(connection).end()
                if order is not None:
                    yield order, answer
                elif isinstance(answer, Death):
                    # A child that cannot start is not replaced; without any child, all orders fail.
                    workers -= 1
                    if not workers:
                        yield from ((index, answer) for index in waiting)
                        return
    finally:
        for child in children.values():
            child.end()


def answer_orders(answer: Callable[[Any], Any]) -> None:
    """Runs a child: answers orders until the parent closes the connection."""
    connection = Connection(int(sys.argv[1]))
    connection.send("ready")
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        connection.send(answer(order))


class _Child:
    def __init__(self, code: str, seconds: float) -> None:
        self.connection, theirs = Pipe()
        self.order: int | None = None
        self.seconds, self.due = seconds, time.monotonic() + seconds
        # A file, not a pipe: a compiler may print more than a pipe holds while it is not read.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                env=child_environment(),
                pass_fds=[number],
            )

    def begin(self, order: int, orders: Sequence[Any]) -> None:
        self.order, self.due = order, time.monotonic() + self.seconds
        with suppress(OSError):  # the child died, which its connection reports
            self.connection.send(orders[order])

    def receive(self) -> Any:
        """Returns the answer; if there is none, ends the process and returns its :class:`Death`."""
        is_late = not self.connection.poll()
        if not is_late:
            with suppress(EOFError, OSError):
                return self.connection.recv()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.process.kill()
        status = self.process.wait()
        self.stderr.seek(0)
        last_line = self.stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        self.end()
        if is_late:
            return Death(f"the compiler took longer than {self.seconds:g} seconds")
        # A shell, or a child of the child's, passes an abort on as 128 and the signal's number.
        aborted = status in (-signal.SIGABRT, 128 + signal.SIGABRT)
        return Death(f"the compiler's process ended with {status}: {last_line[0][:200]}", aborted)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.stderr.close()
