"""Draws a layered graph as SVG: a string, no fonts or style sheets from outside."""

from collections.abc import Mapping, Sequence
from html import escape

from tritontower.errors import UsageError

from .layout import BOLD_EM, HEADING_SIZE, MARGIN, PADDING, TEXT_SIZE, Box, Frame, Layout, lay_out
from .nodes import DrawnGroup, DrawnNode, Edge

__all__ = ["graph_svg"]

# Fill and outline of a box by kind; a kind that is not listed takes the next spare pair.
_COLORS = {
    "input": ("#f3f4f6", "#9ca3af"),
    "output": ("#f3f4f6", "#6b7280"),
    "patch_projection": ("#dcfce7", "#22a35a"),
    "add_positions": ("#ecfccb", "#7ba30f"),
    "norm": ("#fef3c7", "#d19a08"),
    "linear": ("#dbeafe", "#3f7fe0"),
    "rotary_table": ("#f5f0ff", "#9478d8"),
    "rope": ("#fae8ff", "#b04ed0"),
    "qkv_projection": ("#e5e0ff", "#6a55d8"),
    "attention": ("#ffe4e6", "#e0506b"),
    "activation": ("#ffedd5", "#e07f24"),
    "mlp": ("#d9efe9", "#2a9a86"),
    "add": ("#e5e7eb", "#6b7280"),
    "gather": ("#e0f2fe", "#2b95cf"),
    "pool": ("#cffafe", "#1597ae"),
    "projector": ("#ede9fe", "#7a5ae6"),
    "tap": ("#ccfbf1", "#149485"),
}
_SPARE_COLORS = (
    ("#f5f0e6", "#a08556"),
    ("#e8f0e4", "#6c8f5b"),
    ("#e6ecf5", "#5a78a8"),
    ("#f3e6ee", "#a3587f"),
    ("#eeeae4", "#7d7468"),
)


def graph_svg(
    nodes: Sequence[DrawnNode],
    edges: Sequence[Edge],
    groups: Sequence[DrawnGroup] = (),
    *,
    title: str = "",
    subtitle: str = "",
    colors: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Draws a layered graph.

    Args:
        nodes: the boxes, writers before readers.
        edges: who writes for whom.
        groups: frames; a node belongs to one at most.
        title: drawn above the graph, and the document's title.
        subtitle: drawn below the title.
        colors: fill and outline by kind, where they should differ from the standard ones.

    Returns:
        A complete SVG document.

    Raises:
        UsageError: there are no nodes, names repeat, an edge leads upward or to a node that does not exist, or a group does.
    """
    _check(nodes, edges, groups)
    layout = lay_out(nodes, edges, groups, top=MARGIN + (30 if title else 0) + (20 if subtitle else 0))
    width = max(layout.width, 2 * MARGIN + 17 * BOLD_EM * len(title), 2 * MARGIN + 12 * 0.58 * len(subtitle))
    palette = _palette(nodes, colors or {})
    body = [
        f'<rect width="{width:.0f}" height="{layout.height:.0f}" fill="#fcfcfb"/>',
        *_headings(title, subtitle),
        *map(_frame_svg, layout.frames),
        *(_edge_svg(layout, edge) for edge in edges),
        *(_box_svg(box, *palette[box.node.kind]) for box in layout.boxes.values()),
        *map(_badge_svg, layout.frames),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{layout.height:.0f}" '
            f'viewBox="0 0 {width:.0f} {layout.height:.0f}" '
            "font-family=\"'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
            f"<title>{escape(title or 'graph')}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0.6 L7.5 4 L0 7.4 z" fill="#6b7280"/></marker></defs>',
            *body,
            "</svg>",
            "",
        ]
    )


def _check(nodes: Sequence[DrawnNode], edges: Sequence[Edge], groups: Sequence[DrawnGroup]) -> None:
    if not nodes:
        raise UsageError("there is nothing to draw: no nodes")
    place = {node.name: index for index, node in enumerate(nodes)}
    if len(place) != len(nodes):
        raise UsageError("two nodes of the drawing have the same name")
    for source, target in edges:
        if source not in place or target not in place:
            raise UsageError(f"the drawing has an edge {source!r} to {target!r}, but not both nodes")
        if place[source] >= place[target]:
            raise UsageError(f"the drawing's edge {source!r} to {target!r} leads upward: list writers before readers")
    grouped = [member for group in groups for member in group.members]
    if len(set(grouped)) != len(grouped) or not place.keys() >= set(grouped):
        raise UsageError("a group of the drawing names a node twice, or one that does not exist")


def _palette(nodes: Sequence[DrawnNode], colors: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    known = {**_COLORS, **colors}
    unknown = [kind for kind in dict.fromkeys(node.kind for node in nodes) if kind not in known]
    return known | {kind: _SPARE_COLORS[index % len(_SPARE_COLORS)] for index, kind in enumerate(unknown)}


def _headings(title: str, subtitle: str) -> list[str]:
    parts = []
    if title:
        parts.append(
            f'<text x="{MARGIN:.0f}" y="{MARGIN + 12:.0f}" font-size="17" font-weight="600" fill="#111827">'
            f"{escape(title)}</text>"
        )
    if subtitle:
        parts.append(
            f'<text x="{MARGIN:.0f}" y="{MARGIN + 33:.0f}" font-size="12" fill="#4b5563">{escape(subtitle)}</text>'
        )
    return parts


def _box_svg(box: Box, fill: str, outline: str) -> str:
    node = box.node
    heading_y = box.y + 21.5
    text = [
        f'<text x="{box.x + PADDING:.1f}" y="{heading_y:.1f}" font-size="{HEADING_SIZE:.0f}" font-weight="600" '
        f'fill="#111827">{escape(node.heading)}</text>',
        f'<text x="{box.right - PADDING:.1f}" y="{heading_y:.1f}" font-size="10" text-anchor="end" '
        f'fill="{outline}" font-weight="600">{escape(node.kind)}</text>',
    ]
    text += [
        f'<text x="{box.x + PADDING:.1f}" y="{heading_y + 17 + 15 * index:.1f}" font-size="{TEXT_SIZE:.0f}" '
        f'font-family="\'DejaVu Sans Mono\', Menlo, Consolas, monospace" fill="#374151" xml:space="preserve">'
        f"{escape(line)}</text>"
        for index, line in enumerate(node.lines)
    ]
    return (
        f'<g><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="8" '
        f'fill="{fill}" stroke="{outline}" stroke-width="1.2"/>{"".join(text)}</g>'
    )


def _edge_svg(layout: Layout, edge: Edge) -> str:
    source, target = (layout.boxes[name] for name in edge)
    if target.layer - source.layer > 1:
        path = _lane_path(source, target, layout.lanes[edge[0]])
    elif source.layer == target.layer:
        x = (source.right + target.x) / 2
        path = (
            f"M{source.right:.1f} {source.middle:.1f} C{x:.1f} {source.middle:.1f} {x:.1f} {target.middle:.1f} "
            f"{target.x - 1:.1f} {target.middle:.1f}"
        )
    else:
        y = (source.bottom + target.y) / 2
        path = (
            f"M{source.center:.1f} {source.bottom:.1f} C{source.center:.1f} {y:.1f} {target.center:.1f} {y:.1f} "
            f"{target.center:.1f} {target.y - 1:.1f}"
        )
    return f'<path d="{path}" fill="none" stroke="#6b7280" stroke-width="1.3" marker-end="url(#tip)"/>'


def _lane_path(source: Box, target: Box, lane: float) -> str:
    """Sideways out of one box, down the lane, sideways into the other, round at the corners."""
    on_the_right = lane > source.right
    begin, end = (source.right, target.right + 1) if on_the_right else (source.x, target.x - 1)
    # Out of the lower half of a box and into the upper half, so that two lanes never meet at one.
    begin_y, end_y = source.y + 0.68 * source.height, target.y + 0.32 * target.height
    corner = -9.0 if on_the_right else 9.0
    return (
        f"M{begin:.1f} {begin_y:.1f} H{lane + corner:.1f} Q{lane:.1f} {begin_y:.1f} {lane:.1f} "
        f"{begin_y + abs(corner):.1f} V{end_y - abs(corner):.1f} Q{lane:.1f} {end_y:.1f} {lane + corner:.1f} {end_y:.1f} "
        f"H{end:.1f}"
    )


def _frame_svg(frame: Frame) -> str:
    def sheet(shift: int, fill: str, outline: str) -> str:
        return (
            f'<rect x="{frame.x + shift:.1f}" y="{frame.y + shift:.1f}" width="{frame.width:.1f}" '
            f'height="{frame.height:.1f}" rx="14" fill="{fill}" stroke="{outline}"/>'
        )

    # Sheets peeping out behind the frame: this block stands for more than one.
    behind = [sheet(shift, "#f7f7f5", "#d6d8dc") for shift in (8, 4)] if frame.group.repeats > 1 else []
    return "".join([*behind, sheet(0, "#ffffff", "#b6bac2")])


def _badge_svg(frame: Frame) -> str:
    label = frame.group.title + (f"  × {frame.group.repeats}" if frame.group.repeats > 1 else "")
    width = 12 * BOLD_EM * len(label) + 20
    return (
        f'<rect x="{frame.x + 14:.1f}" y="{frame.y - 11:.1f}" width="{width:.1f}" height="22" rx="11" fill="#374151"/>'
        f'<text x="{frame.x + 14 + width / 2:.1f}" y="{frame.y + 4:.1f}" font-size="12" font-weight="600" '
        f'text-anchor="middle" fill="#ffffff" xml:space="preserve">{escape(label)}</text>'
    )
