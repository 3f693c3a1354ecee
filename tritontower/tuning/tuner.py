"""Chooses configurations: compiles the likeliest, drops what breaks a rule, and, on a GPU, checks and times the rest.

Without a GPU the choice is the model's (:mod:`.predict`), fed with what each configuration compiled to.  On a GPU the
model only says which are worth the time: those, the default, and what only a GPU can vouch for are checked against fp32
numbers first; one that is wrong is dropped and named.  Those that are right are timed.

Both stop when their time is up: what is chosen by then is kept, and the next run goes on from there, since compiles are
kept on disk (:mod:`.compile_result`) and times in a journal (:mod:`.journal`) beside the table.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.measuring import can_capture, time_on_device
from tritontower.errors import BackendUnavailableError
from tritontower.kernels.runtime import config as configs

from .compile.aot_compile import CompileResult, Order, compile_orders, problems
from .journal import ATTEMPTS, Journal
from .operations import prepare
from .predict import Prediction
from .search_space import candidates, default_fields, guess, prediction, uniform
from .tasks import Task

__all__ = [
    "COMPILED",
    "Candidate",
    "Choice",
    "Gauge",
    "Progress",
    "choose_measured",
    "choose_static",
    "error_limit",
]

COMPILED = 6
"""How many configurations of a task are compiled in a round, beside the default."""

TILE = ("block_rows", "block_columns", "num_warps", "operands")
ROUNDS = 2
ENOUGH = 2
"""Configurations that have to survive a round, the default among them, for there to be no other."""

MARGIN = {"predicted": 1.05, "measured": 1.02}
"""By how much another configuration has to be faster than the default to take its place: figures are not exact."""

FINALISTS = 4
"""How many of those that compile well are timed, beside the default."""

REPEATS = 20
"""Launches of a check that have to give the same bits; ten times as many where warps wait for one another."""

LARGEST_CHECK = 4096
"""Rows of a check: its fp32 scores would fill the memory otherwise."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it are done, and how many there are."""


def error_limit(dtype: str) -> float:
    """How far, relative to its length, a result may be from the fp32 one: two and a half roundings of ``dtype``."""
    return {"bfloat16": 6e-3, "float16": 8e-4, "float32": 1e-5}[dtype]


@dataclass(frozen=True)
class Candidate:
    """One configuration of a task and what is known of it."""

    config: Mapping[str, Any]
    compile_result: CompileResult | None = None
    predicted: Prediction | None = None
    microseconds: float | None = None
    """Measured."""
    error: float | None = None
    """Distance from the fp32 result, relative to its length."""
    dropped: str = ""
    """Why it may not be taken; empty where it may."""

    @property
    def cost(self) -> float:
        """Microseconds of one launch, measured where that was done; infinite where it may not be taken."""
        if self.dropped or (self.microseconds is None and self.predicted is None):
            return math.inf
        return self.predicted.microseconds if self.microseconds is None else self.microseconds  # type: ignore[union-attr]

    @property
    def identity(self) -> tuple[tuple[str, Any], ...]:
        """The configuration as something that can be looked up."""
        return tuple(sorted(self.config.items()))


@dataclass(frozen=True)
class Choice:
    """A task and what was chosen for it."""

    task: Task
    best: Candidate
    runner_up: Candidate | None
    default: Candidate
    dropped: Sequence[Candidate] = field(default=())

    @property
    def tflops(self) -> float | None:
        """Useful operations per second of the best, 10¹²; ``None`` for what does no products."""
        predicted = self.best.predicted
        if predicted is None or not predicted.tflops:
            return None
        return predicted.tflops * predicted.microseconds / self.best.cost

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default; ``None`` where that could not be compared."""
        return self.default.cost / self.best.cost if math.isfinite(self.default.cost) else None


def _silent(what: str, done: int, total: int) -> None:
    """Reports to nobody."""


# -- without a device -------------------------------------------------------------------------------------------------


def choose_static(
    tasks: Sequence[Task],
    architecture: str,
    *,
    workers: int = 1,
    cache: Path | None = None,
    deadline: float = math.inf,
    progress: Progress = _silent,
    compiled: int = COMPILED,
) -> list[Choice]:
    """The choices for ``tasks`` by prediction, norms left out; those are missing that were not done at ``deadline``.

    Args:
        tasks: what to tune.
        architecture: one of ``configs.ARCHITECTURES``.
        workers: compiler processes at the same time.
        cache: where compiles are kept; ``None``: nowhere.
        deadline: of ``time.monotonic()``.
        progress: told after every compile.
        compiled: configurations of a task that are compiled, beside the default.
    """
    # How fast a norm is hardly depends on its configuration, and what little does no model tells.
    products = [task for task in tasks if task.kernel != "rowwise.norm"]
    known = _compile(products, architecture, workers, cache, deadline, progress, compiled, measured=False)
    return _choices(known, architecture, MARGIN["predicted"])


def _compile(
    tasks: Sequence[Task],
    architecture: str,
    workers: int,
    cache: Path | None,
    deadline: float,
    progress: Progress,
    compiled: int,
    *,
    measured: bool,
) -> dict[Task, list[Candidate]]:
    """Every task with its candidates, the default first; without those whose compiles were not all done in time.

    In two rounds: where few of the first survive, the next likeliest follow.
    """
    found: dict[Task, list[Candidate]] = {task: [] for task in tasks}
    waiting = {task: _ranked(task, architecture, measured=measured) for task in tasks}
    for number in range(ROUNDS):
        orders: list[tuple[Task, Order]] = []
        for task in tasks:
            good = sum(not each.dropped for each in found[task])
            take = compiled + 1 if not number else (compiled if good <= ENOUGH else 0)
            chosen, waiting[task] = waiting[task][:take], waiting[task][take:]
            found[task] += [Candidate(fields) for fields in chosen if fields.get("vendor")]
            for fields in chosen:
                if not fields.get("vendor"):
                    orders.append((task, Order(task, tuple(sorted(fields.items())), architecture)))
        late = _compile_orders(orders, found, workers, cache, deadline, progress)
        if late:
            return {task: each for task, each in found.items() if task not in late}
    return found


def _compile_orders(
    orders: Sequence[tuple[Task, Order]],
    found: dict[Task, list[Candidate]],
    workers: int,
    cache: Path | None,
    deadline: float,
    progress: Progress,
) -> set[Task]:
    """Compiles and judges ``orders``, each into its task's list; returns the tasks that the deadline left incomplete."""
    missing = {index: task for index, (task, _) in enumerate(orders)}
    results: dict[int, Candidate] = {}
    progress("compiling", 0, len(orders))
    wanted = [order for _, order in orders]
    with closing(compile_orders(wanted, workers=workers, cache=cache, deadline=deadline)) as compile_results:
        for index, compile_result in compile_results:
            task, order = orders[index]
            results[index] = _judged(task, dict(order.config), compile_result, order.architecture)
            del missing[index]
            progress("compiling", len(results), len(orders))
            if time.monotonic() > deadline:
                break
    for index in sorted(results):
        found[orders[index][0]].append(results[index])
    return set(missing.values())


def _ranked(task: Task, architecture: str, *, measured: bool) -> list[dict[str, Any]]:
    """The default, then the likeliest configurations: of every kind the likeliest first, lest all have the same flaw.

    A kind is what sizes have in common, or else a tile: where one way to load its operands spills, another rarely does
    better, but a smaller tile does.
    """
    default = default_fields(task, architecture)
    listed = candidates(task, architecture, measured=measured)
    shared = uniform(task.kernel, architecture)
    often: dict[tuple[Any, ...], int] = {}
    places = []
    for fields in listed:
        value = tuple(fields.get(name) for name in shared or TILE)
        often[value] = often.get(value, 0) + 1
        # Two of each value, so that every size has a candidate whatever value the others decide for.
        places.append(often[value] > (2 if shared else 1))
    first = [fields for fields, later in zip(listed, places, strict=True) if not later]
    rest = [fields for fields, later in zip(listed, places, strict=True) if later]
    vendor = [fields for fields in (*first, *rest) if fields.get("vendor")]
    unique = {tuple(sorted(fields.items())): fields for fields in (default, *vendor, *first, *rest)}
    return list(unique.values())


def _judged(task: Task, config: dict[str, Any], compile_result: CompileResult, architecture: str) -> Candidate:
    broken = problems(compile_result, architecture, task.dtype, products=task.kernel != "rowwise.norm")
    if broken:
        return Candidate(config, compile_result, dropped="; ".join(dict.fromkeys(broken)))
    compiled = compile_result.main.compiled(architecture)
    return Candidate(config, compile_result, prediction(task, architecture, config, compiled))


def _choices(known: Mapping[Task, Sequence[Candidate]], architecture: str, margin: float) -> list[Choice]:
    """The best of each task, where all tasks of a group agree in the fields that they have to agree in."""
    best: dict[Task, Choice] = {}
    for tasks in _groups(known):
        shared = uniform(tasks[0].kernel, architecture)
        defaults = {task: tuple(sorted(default_fields(task, architecture).items())) for task in tasks}
        values = {_values(each, shared) for task in tasks for each in known[task] if math.isfinite(each.cost)}
        ways = [
            {task: _sorted(known[task], shared, value, defaults[task], margin) for task in tasks}
            for value in sorted(values, key=repr)
        ]
        possible = [way for way in ways if all(way.values())]
        if not possible:
            continue

        def cost(way: Mapping[Task, Sequence[Candidate]], defaults: Mapping[Task, Any] = defaults) -> float:
            usual = all(ranked[0].identity == defaults[task] for task, ranked in way.items())
            total = sum(task.launches * ranked[0].cost for task, ranked in way.items())
            return total / margin if usual else total

        for task, ranked in min(possible, key=cost).items():
            best[task] = Choice(
                task,
                ranked[0],
                ranked[1] if len(ranked) > 1 else None,
                next((one for one in known[task] if one.identity == defaults[task]), Candidate(dict(defaults[task]))),
                [one for one in known[task] if one.dropped],
            )
    return [best[task] for task in known if task in best]


def _groups(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks, those of different sizes of the same launch together."""
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    return list(groups.values())


def _values(candidate: Candidate, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(candidate.config.get(name) for name in names)


def _sorted(
    known: Sequence[Candidate],
    names: Sequence[str],
    value: tuple[Any, ...],
    default: Any = None,
    margin: float = 1.0,
) -> list[Candidate]:
    """Those with ``value`` that may be taken, the fastest first; the default before those that are hardly faster."""
    fitting = [each for each in known if math.isfinite(each.cost) and _values(each, names) == value]
    return sorted(fitting, key=lambda each: each.cost / (margin if each.identity == default else 1.0))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


class Gauge:
    """What a GPU is asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def captures(self) -> bool:
        """Whether calls are timed inside CUDA graphs here."""
        return can_capture(self.device)

    def error(self, task: Task, config: Mapping[str, Any]) -> tuple[float, str]:
        """The distance from the fp32 result, and what is wrong with the numbers; empty where nothing is."""
        size = {name: min(value, LARGEST_CHECK) for name, value in task.sizes}
        facts = {name: min(value, LARGEST_CHECK) if name == "rows" else value for name, value in task.facts}
        smaller = replace(task, sizes=tuple(sorted(size.items())), facts=tuple(sorted(facts.items())))
        repeats = REPEATS * (10 if config.get("variant") == "specialized" else 1)
        largest = 0.0
        for hard in (False, True) if task.kernel == "attention.attention" else (False,):
            operation = prepare(smaller, self.device, hard=hard)
            first = operation.run(config).clone()
            error, worst = distance(first, operation.expected())
            largest = max(largest, error)
            limit = error_limit(task.dtype)
            # A single row that is wrong hardly counts among thousands; a single row may be further off, too.
            if not error <= limit or not worst <= 5 * limit:
                return error, f"wrong by {error:.1e}, in the worst row by {worst:.1e}, the limit is {limit:.0e}"
            for _ in range(repeats):
                if not torch.equal(operation.run(config), first):
                    return error, "two launches on the same rows differ"
        return largest, ""

    def microseconds(self, task: Task, config: Mapping[str, Any]) -> float:
        """The time of one launch, with cold caches.

        All candidates are timed by one clock: in a CUDA graph, or, where the GPU captures nothing, between events.  A time
        between events has the start of the launch in it and would be ranked against times that have not.

        Raises:
            RuntimeError: this configuration cannot be captured where others can, or is too short to be timed.
        """
        operation = prepare(task, self.device)
        timing = time_on_device(
            lambda: operation.run(config), device=self.device, budget_seconds=0.1, graph=self.captures
        )
        if self.captures and timing.method != "graph":
            raise RuntimeError("it cannot be captured in a CUDA graph, as a tower's passes are")
        return timing.median * 1e6


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """How far ``found`` is from ``expected``, relative to its length: all of it, and the worst row; NaN counts."""
    off, rows = (found.float() - expected).flatten(1), expected.flatten(1)
    whole = off.norm() / rows.norm().clamp_min(1e-30)
    # Rows of hardly anything are held against the usual row.
    usual = rows.norm(dim=1).mean()
    worst = (off.norm(dim=1) / rows.norm(dim=1).clamp_min(0.1 * usual).clamp_min(1e-30)).max()
    return float(whole.nan_to_num(nan=math.inf)), float(worst.nan_to_num(nan=math.inf))


def choose_measured(
    tasks: Sequence[Task],
    gauge: Gauge,
    *,
    architecture: str = "",
    workers: int = 1,
    cache: Path | None = None,
    journal: Journal | None = None,
    deadline: float = math.inf,
    progress: Progress = _silent,
    compiled: int = COMPILED,
    finalists: int = FINALISTS,
) -> list[Choice]:
    """The choices for ``tasks`` by checks and times on a GPU; those are missing that were not done at ``deadline``.

    The tasks that take the most of a pass come first.

    Args:
        tasks: what to tune.
        gauge: the GPU.
        architecture: by default that of the gauge's device.
        workers: compiler processes at the same time.
        cache: where compiles are kept; ``None``: nowhere.
        journal: times from before, and where new ones go.
        deadline: of ``time.monotonic()``.
        progress: told after every compile and every time.
        compiled: configurations of a task that are compiled, beside the default.
        finalists: how many of them are timed, beside the default.

    Raises:
        BackendUnavailableError: a configuration left the GPU in a state in which nothing runs; the journal knows it.
    """
    architecture = architecture or configs.architecture(gauge.device)
    journal = journal or Journal(None, "")
    known = _compile(tasks, architecture, workers, cache, deadline, progress, compiled, measured=True)
    todo: list[tuple[float, list[tuple[Task, Candidate]]]] = []
    for group in _groups(known):
        chosen = _finalists({task: known[task] for task in group}, architecture, finalists)
        costs = (task.launches * each.cost for task, each in chosen if math.isfinite(each.cost))
        # Where nothing compiled that could be predicted, what is left is still tried, last.
        weight = max(costs, default=0.0)
        todo.append((weight, chosen))
    total, done = sum(len(chosen) for _, chosen in todo), 0
    timed: dict[Task, list[Candidate]] = {}
    progress("measuring", 0, total)
    for _, chosen in sorted(todo, key=lambda each: -each[0]):
        results: dict[Task, list[Candidate]] = {}
        for task, candidate in chosen:
            if time.monotonic() > deadline:
                break
            results.setdefault(task, []).append(_timed(task, candidate, gauge, journal, architecture))
            done += 1
            progress("measuring", done, total)
        else:
            for task, each in results.items():
                timed[task] = [*each, *(one for one in known[task] if one.dropped)]
    return _choices({task: timed[task] for task in tasks if task in timed}, architecture, MARGIN["measured"])


def _finalists(
    known: Mapping[Task, Sequence[Candidate]], architecture: str, count: int
) -> list[tuple[Task, Candidate]]:
    """What to time for the tasks of a group: the default, what has no prediction, and the best of the best values."""
    shared = uniform(next(iter(known)).kernel, architecture)
    values = {_values(each, shared) for each_task in known.values() for each in each_task if not each.dropped}

    def cost(value: tuple[Any, ...]) -> float:
        ranked = {task: _sorted(each, shared, value) for task, each in known.items()}
        return sum(task.launches * (each[0].cost if each else math.inf) for task, each in ranked.items())

    # Without anything in common there is one value, and the best of it are the finalists.
    kept = sorted(values, key=lambda value: (cost(value), repr(value)))[: max(1, count // 2) if shared else 1]
    chosen: list[tuple[Task, Candidate]] = []
    for task, each in known.items():
        default = tuple(sorted(default_fields(task, architecture).items()))
        best = [one for value in kept for one in _sorted(each, shared, value)[: 2 if shared else count]]
        always = [one for one in each if one.predicted is None and not one.dropped]
        always += [one for one in each if one.config.get("variant") == "specialized" and not one.dropped]
        first = [one for one in each if one.identity == default and not one.dropped]
        chosen += [(task, one) for one in {one.identity: one for one in (*first, *best, *always)}.values()]
    return chosen


def _timed(task: Task, candidate: Candidate, gauge: Gauge, journal: Journal, architecture: str) -> Candidate:
    key = journal.key(task, candidate)
    if key not in journal.known and journal.begun.get(key, 0) >= ATTEMPTS:
        ended = f"ended the process {ATTEMPTS} times, or hung until it was ended"
        journal.write(key, microseconds=None, error=1e9, dropped=ended)
    if key not in journal.known:
        journal.begin(key, journal.begun.get(key, 0) + 1)
        try:
            facts = _measurement(task, candidate, gauge)
        except BaseException:  # somebody wants the run to end
            journal.begin(key, 0)
            raise
        journal.write(key, **facts)
        if _DEAD.search(facts["dropped"]):
            raise BackendUnavailableError(
                f"{task.title}: the configuration {dict(candidate.config)} {facts['dropped']}; nothing runs on the GPU "
                "after that in this process: start again, and tuning goes on behind it"
            )
    facts = journal.known[key]
    predicted = candidate.predicted or _operations(task, candidate, architecture)
    return replace(candidate, predicted=predicted, **facts)


_DEAD = re.compile(r"(CUDA|HIP) error(?!: out of memory)")
"""Errors after which a process gets no other answer from its GPU."""


def _measurement(task: Task, candidate: Candidate, gauge: Gauge) -> dict[str, Any]:
    try:
        error, wrong = gauge.error(task, candidate.config)
        if wrong:
            return {"microseconds": None, "error": min(error, 1e9), "dropped": wrong}
        return {"microseconds": gauge.microseconds(task, candidate.config), "error": error, "dropped": ""}
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"fails on the GPU: {type(error).__name__}: {str(error)[:160]}".replace("\n", " ")
        return {"microseconds": None, "error": 1e9, "dropped": text}


def _operations(task: Task, candidate: Candidate, architecture: str) -> Prediction:
    """A prediction for what is not compiled here: only its operations are used."""
    return prediction(task, architecture, candidate.config, guess(task, architecture, candidate.config))
