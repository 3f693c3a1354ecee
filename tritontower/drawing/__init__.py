"""Tables for a terminal and layered graphs for a page: plain data in, text or SVG out.

Nothing here knows what a tower is.
"""

from .nodes import DrawnGroup, DrawnNode, Edge, collapse_repeats, number_ranges
from .svg import graph_svg

__all__ = ["DrawnGroup", "DrawnNode", "Edge", "collapse_repeats", "graph_svg", "number_ranges"]
