"""What can be drawn: boxes, edges, and frames around blocks that repeat."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

__all__ = ["DrawnGroup", "DrawnNode", "Edge", "collapse_repeats", "number_ranges"]


@dataclass(frozen=True)
class DrawnNode:
    """One box.

    Attributes:
        name: unique within the graph.
        kind: decides the color, and stands in the corner of the box.
        lines: further text, one line each.
        label: the heading of the box, where it should differ from the name.
    """

    name: str
    kind: str
    lines: tuple[str, ...] = ()
    label: str = ""

    @property
    def heading(self) -> str:
        """The text at the top of the box."""
        return self.label or self.name


@dataclass(frozen=True)
class DrawnGroup:
    """A frame around nodes that form one repeated block.

    Attributes:
        title: what the block is called.
        members: names of the nodes inside.
        repeats: how many such blocks follow each other; only the first of them is drawn.
    """

    title: str
    members: tuple[str, ...]
    repeats: int


Edge = tuple[str, str]
"""From the name of the node that writes to the name of the node that reads."""

_NUMBERED = re.compile(r"(?P<before>(?:.*?\.)?)(?P<number>\d+)\.(?P<rest>.+)")


def collapse_repeats(
    nodes: Sequence[DrawnNode], edges: Sequence[Edge], title: str = ""
) -> tuple[list[DrawnNode], list[Edge], list[DrawnGroup]]:
    """Keeps the first of every run of identical blocks and makes it a group.

    Runs that take turns, such as seven blocks with windows and one without, over and over, are drawn once as well.

    A block is a run of nodes whose names share a prefix and a number, such as ``blocks.7.norm`` and
    ``blocks.7.attention``.  Two blocks are identical if their nodes agree, one by one, in the rest of the name, the kind
    and the lines.  Edges of the blocks left out move to the one kept; those that lead from a block to the next vanish.

    Args:
        nodes: the boxes, writers before readers.
        edges: who writes for whom.
        title: what stands before a group's numbers; by default the prefix of its nodes' names.

    Returns:
        nodes, edges and groups, ready for :func:`graph_svg`.
    """
    kept: list[DrawnNode] = []
    groups: list[DrawnGroup] = []
    drawn_as: dict[str, str] = {}
    runs = [list(run) for _, run in groupby(_blocks(nodes), key=_signature)]
    for run in _taking_turns(runs):
        template = run[0]
        for block in run:
            drawn_as.update((node.name, drawn.name) for node, drawn in zip(block, template, strict=True))
        first = _NUMBERED.fullmatch(template[0].name)
        if first is None:
            kept += template
            continue
        prefix = f"{first['before']}{first['number']}."
        kept += (replace(node, label=node.label or node.name.removeprefix(prefix)) for node in template)
        numbers = ", ".join(number_ranges(_number(block) for block in run))
        heading = f"{title or first['before'].rstrip('.')} {numbers}".strip()
        groups.append(DrawnGroup(heading, tuple(node.name for node in template), len(run)))

    place = {node.name: index for index, node in enumerate(kept)}
    moved = dict.fromkeys((drawn_as[source], drawn_as[target]) for source, target in edges)
    return kept, [(source, target) for source, target in moved if place[source] < place[target]], groups


def _blocks(nodes: Sequence[DrawnNode]) -> list[list[DrawnNode]]:
    """Cuts the list into runs with the same prefix and number; a node without a number is a run of its own."""

    def key(item: tuple[int, DrawnNode]) -> object:
        match = _NUMBERED.fullmatch(item[1].name)
        return (match["before"], match["number"]) if match else item[0]

    return [[node for _, node in run] for _, run in groupby(enumerate(nodes), key=key)]


def _number(block: Sequence[DrawnNode]) -> int:
    match = _NUMBERED.fullmatch(block[0].name)
    return int(match["number"]) if match else 0


def number_ranges(numbers: Iterable[int]) -> list[str]:
    """Ascending whole numbers as text, those that follow each other as first–last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def _taking_turns(runs: Sequence[list[list[DrawnNode]]]) -> list[list[list[DrawnNode]]]:
    """Joins every run with those that stand at its place when a sequence of runs repeats."""
    signatures = [_signature(run[0]) for run in runs]
    joined: list[list[list[DrawnNode]]] = []
    start = 0
    while start < len(runs):
        period, times = _repetition(signatures[start:])
        stop = start + period * times
        joined += (
            [block for run in runs[place:stop:period] for block in run] for place in range(start, start + period)
        )
        start = stop
    return joined


def _repetition(signatures: Sequence[object]) -> tuple[int, int]:
    """The shortest beginning that is repeated at once: its length, and how often it stands there."""
    for period in range(2, len(signatures) // 2 + 1):
        times = 1
        while signatures[times * period : (times + 1) * period] == signatures[:period]:
            times += 1
        if times > 1:
            return period, times
    return 1, 1


def _signature(block: Sequence[DrawnNode]) -> object:
    """What identical blocks have in common; a node without a number is identical to nothing."""
    matches = [_NUMBERED.fullmatch(node.name) for node in block]
    return [
        (match["before"], match["rest"], node.kind, node.lines) if match else node.name
        for match, node in zip(matches, block, strict=True)
    ]
