"""Child processes for compilation: a child that dies, hangs or never starts fails no more than it must."""

import time

import pytest

from tritontower.tuning.compile.worker import Death, answers

SERVE = "import os, time\nfrom tritontower.tuning.compile.worker import answer_orders\nanswer_orders(lambda order: {})"


def serve(answer: str) -> str:
    return SERVE.replace("{}", answer)


def test_a_child_that_cannot_start_fails_all_orders_at_once():
    start = time.monotonic()
    found = dict(answers(list(range(50)), "raise SystemExit(3)", workers=2))
    assert found == dict.fromkeys(range(50), Death("the compiler's process ended with 3: no message"))
    assert time.monotonic() - start < 60


def test_a_child_that_hangs_at_the_start_fails_all_orders():
    found = dict(answers([1, 2], "import time; time.sleep(1000)", seconds=1))
    assert found == dict.fromkeys(range(2), Death("the compiler took longer than 1 seconds"))


def test_a_dead_child_fails_one_order():
    code = serve("os._exit(order) if order > 99 else os.kill(os.getpid(), order) if order else order")
    found = dict(answers([0, 134, 6, 9, 0, 107], code))
    assert [found[index] for index in (0, 4)] == [0, 0]
    assert found[5] == Death("the compiler's process ended with 107: no message")
    assert [found[index].aborted for index in (1, 2, 3)] == [True, True, False]


def test_a_hanging_order_fails_alone():
    found = dict(answers([0, 1000, 0], serve("time.sleep(order) or {'slept': order}"), seconds=6))
    assert found == {0: {"slept": 0}, 1: Death("the compiler took longer than 6 seconds"), 2: {"slept": 0}}


@pytest.mark.parametrize("code", [serve("time.sleep(order) or {}"), "import time; time.sleep(1000)"])
def test_the_deadline_ends_the_children(code):
    start = time.monotonic()
    assert list(answers([1000, 1000], code, workers=2, deadline=start + 2)) == []
    assert time.monotonic() - start < 30


def test_closing_the_iterator_ends_the_children():
    found = answers([0, 1000], serve("time.sleep(order) or {}"))
    assert next(found) == (0, {})
    start = time.monotonic()
    found.close()
    assert time.monotonic() - start < 30
