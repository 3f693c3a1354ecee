"""Compilers in processes of their own: orders go in, answers come out one by one, and a death costs one order.

A failed assertion inside the compiler ends its process, and a process that *interprets* Triton (``TRITON_INTERPRET=1``)
cannot compile; so the parent never compiles.
"""

import base64
import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event, Thread
from typing import Any

import tritontower

__all__ = ["answer_orders", "answers"]

_MARK = "answer: "
"""Tells a child's answers from whatever else a compiler prints."""
_READY = "ready for orders"
"""What a child says first: one that never does will not do better the next time."""


def answers(orders: Sequence[Any], code: str, *, workers: int = 1) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Hands ``orders`` to ``workers`` child processes and yields each order's index and its answer, as they come.

    An answer that is a text says how the child died that was at this order.  Closing the iterator ends the children.

    Args:
        orders: anything that can be pickled.
        code: what a child runs; it ends in :func:`answer_orders`.
        workers: children at the same time.
    """
    found: queue.SimpleQueue[tuple[int, dict[str, Any] | str] | BaseException | None] = queue.SimpleQueue()
    stop = Event()
    shares = [range(first, len(orders), workers) for first in range(min(workers, len(orders)))]

    def work(share: Sequence[int]) -> None:
        try:
            with closing(_share([orders[index] for index in share], code, stop)) as results:
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
            answer = found.get()
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


def _share(orders: list[Any], code: str, stop: Event) -> Generator[dict[str, Any] | str]:
    """The answers to one worker's orders; where a child dies, a new one goes on behind the order that it was at."""
    done = 0
    while done < len(orders) and not stop.is_set():
        for answer in _child(orders[done:], code, stop):
            done += 1
            yield answer


def _child(orders: list[Any], code: str, stop: Event) -> Iterator[dict[str, Any] | str]:
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
        watch = Thread(target=_end_when_told, args=(child, stop), daemon=True)
        watch.start()
        try:
            missing, ready = len(orders), False
            for line in child.stdout or ():
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
            yield from [cause] * (1 if ready else missing)


def _end_when_told(child: "subprocess.Popen[bytes]", stop: Event) -> None:
    while child.poll() is None:
        if stop.wait(0.2):
            child.kill()
            return
