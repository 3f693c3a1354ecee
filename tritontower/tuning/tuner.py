"""Tuner: compiles the candidates of each task, drops those that break a rule, and measures the rest on a GPU.

Candidates are checked against an fp32 result first; one that is wrong is dropped and reported.  Those that are right are
timed.  A run stops at its deadline and keeps what it has: compile results are kept on disk (:mod:`.compile.aot_compile`) and
times in a journal (:mod:`.journal`) beside the table, so the next run continues.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.measuring import can_capture, time_on_device
from tritontower.errors import BackendUnavailableError

from .candidate import Candidate, Choice
from .compile.aot_compile import Order, compile_orders
from .journal import ATTEMPTS, Journal
from .operations import prepare
from .search_space import default_values, list_candidates, shared_fields
from .tasks import Task, make_pairs

COMPILED = 8
"""Configurations of a task that are compiled in a round, the default among them; three times as many with shared fields."""

ROUNDS = 2
ENOUGH = 2
"""Candidates that must survive the first round, the default among them; otherwise a second round follows."""

MARGIN = 1.02
"""Speedup over the default from which another configuration is chosen: times vary."""

REPEATS = 20
"""Launches of a check that must give the same bits."""

LARGEST_CHECK = 4096
"""Rows of a check: the fp32 scores of more would fill the memory."""

Progress = Callable[[str, int, int], None]
"""Called with the current activity, the number of finished steps, and the number of all steps."""

_FATAL = re.compile(r"(CUDA|HIP) error(?!: out of memory)")
"""Errors after which every call to the GPU fails in this process."""


ERROR_LIMIT = {"bfloat16": 6e-3, "float16": 8e-4, "float32": 1e-5}
"""Largest error of a result relative to the norm of the fp32 one: two and a half roundings of the dtype."""


def compile_tasks(
    tasks: Sequence[Task],
    architecture: str,
    *,
    workers: int = 1,
    cache: Path | None = None,
    deadline: float = math.inf,
    progress: Progress = lambda activity, done, total: None,
    compiled: int = COMPILED,
) -> dict[Task, list[Candidate]]:
    """Returns the candidates of every task, the default first; tasks that were not compiled at ``deadline`` are missing.

    ``workers`` processes compile ``compiled`` configurations of a task in a round; ``cache`` is the folder of the results.
    """
    found: dict[Task, list[Candidate]] = {task: [] for task in tasks}
    waiting = {task: list_candidates(task, architecture) for task in tasks}
    for number in range(ROUNDS):
        orders: list[tuple[Task, Order]] = []
        for task in found:
            take = compiled * (3 if shared_fields(task.kernel, architecture) else 1)
            if number and sum(not each.dropped for each in found[task]) > ENOUGH:
                take = 0
            chosen, waiting[task] = waiting[task][:take], waiting[task][take:]
            found[task] += [Candidate(values) for values in chosen if values.get("vendor")]
            orders += [
                (task, Order(task, make_pairs(**values), architecture)) for values in chosen if not values.get("vendor")
            ]
        results: dict[int, Candidate] = {}
        progress("compiling", 0, len(orders))
        todo = [order for _, order in orders]
        with closing(compile_orders(todo, workers=workers, cache=cache, deadline=deadline)) as answers:
            for index, result in answers:
                problems = dict.fromkeys(result.problems(orders[index][0], architecture))
                results[index] = Candidate(dict(todo[index].config), result, dropped="; ".join(problems))
                progress("compiling", len(results), len(orders))
                if time.monotonic() > deadline:
                    break
        for index, (task, _) in enumerate(orders):
            if index not in results:
                found.pop(task, None)
            elif task in found:
                found[task].append(results[index])
    return found


class Gauge:
    """Checks and times configurations on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def captures(self) -> bool:
        """True if calls are timed inside CUDA graphs on this device."""
        return can_capture(self.device)

    def error(self, task: Task, config: Mapping[str, Any]) -> tuple[float, str]:
        """Returns the distance from the fp32 result, and a description of what is wrong; empty if nothing is."""
        sizes = tuple((name, min(value, LARGEST_CHECK)) for name, value in task.sizes)
        details = dict(task.details)
        if "rows" in details:
            details["rows"] = min(details["rows"], LARGEST_CHECK)
        smaller = replace(task, sizes=sizes, details=make_pairs(**details))
        largest = 0.0
        for hard in (False, True) if task.kernel == "attention.attention" else (False,):
            operation = prepare(smaller, self.device, hard=hard)
            first = operation.run(config).clone()
            error, worst = distance(first, operation.expected())
            largest = max(largest, error)
            limit = ERROR_LIMIT[task.dtype]
            # A single wrong row hardly changes the norm of thousands, so rows have a limit of their own.
            if not error <= limit or not worst <= 5 * limit:
                return error, f"wrong by {error:.1e}, in the worst row by {worst:.1e}, the limit is {limit:.0e}"
            if not all(torch.equal(operation.run(config), first) for _ in range(REPEATS)):
                return error, "two launches on the same rows differ"
        return largest, ""

    def microseconds(self, task: Task, config: Mapping[str, Any]) -> float:
        """Returns the time of one launch with cold caches.

        All candidates are timed the same way: in a CUDA graph, or between events if the GPU cannot capture.  A time between
        events includes the start of the launch and must not be compared with one from a graph.
        """
        operation = prepare(task, self.device)
        timing = time_on_device(
            lambda: operation.run(config), device=self.device, budget_seconds=0.1, graph=self.captures
        )
        if self.captures and timing.method != "graph":
            raise RuntimeError("it cannot be captured in a CUDA graph, as a tower's forward passes are")
        return timing.median * 1e6


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Returns the relative L2 error of ``found``: of the whole tensor, and of the worst row; NaN gives infinity."""
    difference, rows = (found.float() - expected).flatten(1), expected.flatten(1)
    whole = difference.norm() / rows.norm().clamp_min(1e-30)
    # Rows near zero are compared with the mean row.
    mean = rows.norm(dim=1).mean()
    worst = (difference.norm(dim=1) / rows.norm(dim=1).clamp_min(0.1 * mean).clamp_min(1e-30)).max()
    return float(whole.nan_to_num(nan=math.inf)), float(worst.nan_to_num(nan=math.inf))


def choose(
    tasks: Sequence[Task],
    gauge: Gauge,
    *,
    architecture: str,
    journal: Journal | None = None,
    deadline: float = math.inf,
    progress: Progress = lambda activity, done, total: None,
    **options: Any,
) -> list[Choice]:
    """Chooses a configuration for each task by checks and times; tasks that were not done at ``deadline`` are missing.

    The tasks with the most operations per forward pass come first.  ``journal`` has the results of earlier runs, and gets the
    new ones; ``options`` are those of :func:`compile_tasks`.

    Raises:
        BackendUnavailableError: a configuration left the GPU in a state in which nothing runs; the journal records it.
    """
    journal = journal or Journal(None, "")
    known = compile_tasks(tasks, architecture, deadline=deadline, progress=progress, **options)
    todo = {task: [each for each in candidates if not each.dropped] for task, candidates in known.items()}
    total, done = sum(map(len, todo.values())), 0
    measured: dict[Task, list[Candidate]] = {}
    progress("measuring", 0, total)
    groups = sorted(_group(known), key=lambda group: -max(task.launches * task.flops for task in group))
    for group in groups:
        results: dict[Task, list[Candidate]] = {task: [] for task in group}
        for task, candidate in ((each, candidate) for each in group for candidate in todo[each]):
            if time.monotonic() > deadline:
                break
            results[task].append(_measure(task, candidate, gauge, journal))
            done += 1
            progress("measuring", done, total)
        else:
            for task, candidates in results.items():
                measured[task] = [*candidates, *(each for each in known[task] if each.dropped)]
    best = {choice.task: choice for choice in _choose_best(measured, architecture)}
    return [best[task] for task in tasks if task in best]


def _measure(task: Task, candidate: Candidate, gauge: Gauge, journal: Journal) -> Candidate:
    key = journal.key(task, candidate)
    if key not in journal.known and journal.begun.get(key, 0) >= ATTEMPTS:
        reason = f"ended the process {ATTEMPTS} times, or was killed while it hung"
        journal.write(key, microseconds=None, error=1e9, dropped=reason)
    if key not in journal.known:
        journal.begin(key, journal.begun.get(key, 0) + 1)
        try:
            result = _check_and_time(task, candidate, gauge)
        except BaseException:  # interrupted by the user: not the configuration's fault
            journal.begin(key, 0)
            raise
        journal.write(key, **result)
        if _FATAL.search(result["dropped"]):
            raise BackendUnavailableError(
                f"{task.title}: the configuration {dict(candidate.config)} {result['dropped']}; nothing runs on the GPU "
                "in this process any more: start tuning again, and it continues after this configuration"
            )
    return replace(candidate, **journal.known[key])


def _check_and_time(task: Task, candidate: Candidate, gauge: Gauge) -> dict[str, Any]:
    try:
        error, problem = gauge.error(task, candidate.config)
        if problem:
            return {"microseconds": None, "error": min(error, 1e9), "dropped": problem}
        return {"microseconds": gauge.microseconds(task, candidate.config), "error": error, "dropped": ""}
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"fails on the GPU: {type(error).__name__}: {str(error)[:160]}".replace("\n", " ")
        return {"microseconds": None, "error": 1e9, "dropped": text}


def _choose_best(known: Mapping[Task, Sequence[Candidate]], architecture: str) -> list[Choice]:
    """Chooses the fastest candidates such that all tasks of a group have the same shared fields."""
    chosen: list[Choice] = []
    for group in _group(known):
        shared = shared_fields(group[0].kernel, architecture)
        defaults = {task: make_pairs(**default_values(task, architecture)) for task in group}
        values = {_values(each, shared) for task in group for each in known[task] if math.isfinite(each.cost)}
        options = [
            {task: _rank(known[task], shared, value, defaults[task]) for task in group}
            for value in sorted(values, key=repr)
        ]
        complete = [option for option in options if all(option.values())]
        if not complete:
            continue

        def cost(option: Mapping[Task, Sequence[Candidate]], defaults: Mapping[Task, Any] = defaults) -> float:
            is_default = all(ranked[0].identity == defaults[task] for task, ranked in option.items())
            total = sum(task.launches * ranked[0].cost for task, ranked in option.items())
            return total / MARGIN if is_default else total

        for task, ranked in min(complete, key=cost).items():
            default = Candidate(dict(defaults[task]))
            default = next((each for each in known[task] if each.identity == default.identity), default)
            dropped = [each for each in known[task] if each.dropped]
            chosen.append(Choice(task, ranked[0], ranked[1] if len(ranked) > 1 else None, default, dropped))
    return chosen


def _group(tasks: Iterable[Task]) -> list[list[Task]]:
    """Groups the tasks of one launch with different sizes."""
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    return list(groups.values())


def _values(candidate: Candidate, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(candidate.config.get(name) for name in names)


def _rank(
    known: Sequence[Candidate], names: Sequence[str], value: tuple[Any, ...], default: tuple[Any, ...]
) -> list[Candidate]:
    """Sorts the measured candidates with ``value`` by time; the default precedes those that are hardly faster."""
    fitting = [each for each in known if math.isfinite(each.cost) and _values(each, names) == value]
    return sorted(fitting, key=lambda each: each.cost / (MARGIN if each.identity == default else 1.0))
