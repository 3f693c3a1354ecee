"""Where the boxes, frames and edges of a layered graph go.

The drawing reads from top to bottom.  A node stands one layer below the lowest of those it reads from.  Edges that skip
layers (residual connections) run down a lane beside the boxes, one lane for all that start at the same box.  What feeds
or taps a repeated block without belonging to it stands beside the block's frame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from .nodes import DrawnGroup, DrawnNode, Edge

MARGIN = 28.0
ROW_GAP = 30.0  # between two layers
COLUMN_GAP = 26.0  # between two boxes of a layer
STACK_GAP = 12.0  # between two boxes above each other beside a frame
LANE_WIDTH = 18.0  # between two edges that skip layers
PADDING = 12.0  # inside a box
FRAME_PADDING = 22.0  # between a group's frame and its boxes
BADGE_SPACE = 14.0  # for the upper half of a frame's title
HEADING_SIZE = 13.0
TEXT_SIZE = 11.0
# Average advance widths in em.  An SVG cannot measure its own text, so these are on the generous side.
BOLD_EM = 0.64
MONOSPACE_EM = 0.615


@dataclass
class Box:
    """A node with its place on the page."""

    node: DrawnNode
    layer: int
    width: float
    height: float
    aside: bool = False  # beside a frame instead of in the main column
    x: float = 0.0
    y: float = 0.0

    @property
    def center(self) -> float:
        """Half way across."""
        return self.x + self.width / 2

    @property
    def middle(self) -> float:
        """Half way down."""
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + self.height


@dataclass(frozen=True)
class Frame:
    """A group with its place on the page."""

    group: DrawnGroup
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """A drawing, ready for the pen.

    Attributes:
        boxes: by the names of their nodes.
        frames: behind the boxes.
        lanes: the x at which an edge that skips layers runs down, by the name of the node it starts from.
        width: of the page.
        height: of the page.
    """

    boxes: Mapping[str, Box]
    frames: Sequence[Frame]
    lanes: Mapping[str, float]
    width: float
    height: float


def lay_out(nodes: Sequence[DrawnNode], edges: Sequence[Edge], groups: Sequence[DrawnGroup], top: float) -> Layout:
    """Places everything; the topmost box begins at ``top``."""
    group_of = {member: number for number, group in enumerate(groups) for member in group.members}
    layers = _layers(nodes, edges, group_of)
    spans = [_span([layers[member] for member in group.members]) for group in groups]
    boxes = {node.name: Box(node, layers[node.name], *_box_size(node)) for node in nodes}
    for box in boxes.values():
        box.aside = box.node.name not in group_of and any(low <= box.layer <= high for low, high in spans)

    skipping = [edge for edge in edges if boxes[edge[1]].layer - boxes[edge[0]].layer > 1]
    left_lanes = _lane_numbers(boxes, [edge for edge in skipping if boxes[edge[0]].aside])
    right_lanes = _lane_numbers(boxes, [edge for edge in skipping if not boxes[edge[0]].aside])

    aside_left = MARGIN + _lanes_width(left_lanes)
    aside_width = max((box.width + COLUMN_GAP for box in boxes.values() if box.aside), default=0.0)
    left = aside_left + aside_width + (FRAME_PADDING if groups else 0.0)
    right, bottom = _place_boxes(_in_order(boxes, edges), spans, aside_left, left, top)
    lanes = {name: right + (1 + lane) * LANE_WIDTH for name, lane in right_lanes.items()}
    lanes |= {name: aside_left - (1 + lane) * LANE_WIDTH for name, lane in left_lanes.items()}
    frame_right = right + _lanes_width(right_lanes) + FRAME_PADDING
    frames = [
        _frame(group, [boxes[member] for member in group.members], left - FRAME_PADDING, frame_right)
        for group in groups
    ]
    return Layout(boxes, frames, lanes, width=frame_right + MARGIN, height=bottom + MARGIN)


def _layers(nodes: Sequence[DrawnNode], edges: Sequence[Edge], group_of: Mapping[str, int]) -> dict[str, int]:
    writers: dict[str, list[str]] = {node.name: [] for node in nodes}
    readers: dict[str, list[str]] = {node.name: [] for node in nodes}
    for source, target in edges:
        writers[target].append(source)
        readers[source].append(target)
    layers: dict[str, int] = {}
    for node in nodes:
        layers[node.name] = max((layers[writer] + 1 for writer in writers[node.name]), default=0)
    members: dict[int, list[int]] = {}
    for name, group in group_of.items():
        members.setdefault(group, []).append(layers[name])
    framed = {layer for span in members.values() for layer in range(min(span), max(span) + 1)}

    # Inputs, and what is computed from inputs alone, move down to their first reader: just above it, or level with it
    # if it stands in the middle of a frame or right below one.
    for node in reversed(nodes):
        from_inputs = all(len(readers[writer]) == 1 for writer in writers[node.name])
        if node.name in group_of or not readers[node.name] or not from_inputs:
            continue
        reader = min(readers[node.name], key=layers.__getitem__)
        above = layers[reader] - 1
        below_frame = above in framed and layers[reader] not in framed
        beside = above >= min(members[group_of[reader]]) if reader in group_of else below_frame
        layers[node.name] = max(layers[node.name], layers[reader] if beside else above)
    return layers


def _span(layers: Sequence[int]) -> tuple[int, int]:
    return min(layers), max(layers)


def _in_order(boxes: Mapping[str, Box], edges: Sequence[Edge]) -> list[Box]:
    """The boxes as they stand in each layer from left to right: what reads, behind what it reads beside it, then the rest."""
    ordered: dict[str, Box] = {}
    for target in dict.fromkeys(target for _, target in edges):
        beside = [source for source, reader in edges if reader == target and boxes[source].layer == boxes[target].layer]
        ordered |= {name: boxes[name] for name in (*beside, target)}
    return list({**ordered, **boxes}.values())


def _place_boxes(
    boxes: Sequence[Box], spans: Sequence[tuple[int, int]], aside_left: float, left: float, top: float
) -> tuple[float, float]:
    """Sets x and y of every box; returns the right edge of the main column and the bottom of the lowest layer."""
    rows = [[box for box in boxes if box.layer == layer] for layer in sorted({box.layer for box in boxes})]
    width = max(_row_width([box for box in row if not box.aside]) for row in rows)
    aside_width = max((box.width for box in boxes if box.aside), default=0.0)
    y = top
    for row in rows:
        spine, aside = [box for box in row if not box.aside], [box for box in row if box.aside]
        y += sum(FRAME_PADDING + BADGE_SPACE for low, _ in spans if low == row[0].layer)
        height = max([_stack_height(aside), *(box.height for box in spine)])
        x = left + (width - _row_width(spine)) / 2
        for box in spine:
            box.x, box.y = x, y + (height - box.height) / 2
            x += box.width + COLUMN_GAP
        stack_y = y + (height - _stack_height(aside)) / 2
        for box in aside:
            box.x, box.y = aside_left + (aside_width - box.width) / 2, stack_y
            stack_y += box.height + STACK_GAP
        y += height + ROW_GAP + sum(FRAME_PADDING for _, high in spans if high == row[0].layer)
    return left + width, y - ROW_GAP


def _frame(group: DrawnGroup, members: Sequence[Box], left: float, right: float) -> Frame:
    upper = min(box.y for box in members) - FRAME_PADDING - BADGE_SPACE / 2
    lower = max(box.bottom for box in members) + FRAME_PADDING
    return Frame(group, left, upper, right - left, lower - upper)


def _box_size(node: DrawnNode) -> tuple[float, float]:
    heading = HEADING_SIZE * BOLD_EM * len(node.heading) + 18 + 10 * 0.62 * len(node.kind)
    lines = max((TEXT_SIZE * MONOSPACE_EM * len(line) for line in node.lines), default=0.0)
    return max(heading, lines, 150.0) + 2 * PADDING, 34.0 + 15.0 * len(node.lines) + (4 if node.lines else 0)


def _row_width(row: Sequence[Box]) -> float:
    return sum(box.width for box in row) + COLUMN_GAP * max(0, len(row) - 1)


def _stack_height(boxes: Sequence[Box]) -> float:
    return sum(box.height for box in boxes) + STACK_GAP * max(0, len(boxes) - 1)


def _lane_numbers(boxes: Mapping[str, Box], edges: Sequence[Edge]) -> dict[str, int]:
    """Gives every box where such an edge starts, shortest way first, the innermost lane that is free all the way."""
    spans: dict[str, tuple[int, int]] = {}
    for source, target in edges:
        begin, end = spans.get(source, (boxes[source].layer, 0))
        spans[source] = begin, max(end, boxes[target].layer)
    lanes: dict[str, int] = {}
    for name in sorted(spans, key=lambda name: spans[name][1] - spans[name][0]):
        begin, end = spans[name]
        taken = {lane for other, lane in lanes.items() if begin < spans[other][1] and spans[other][0] < end}
        lanes[name] = next(lane for lane in count() if lane not in taken)
    return lanes


def _lanes_width(lanes: Mapping[str, int]) -> float:
    return LANE_WIDTH * max((1 + lane for lane in lanes.values()), default=0)
