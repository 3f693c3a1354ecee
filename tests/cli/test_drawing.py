"""Tables line up, and drawn graphs are well-formed, complete and without overlaps."""

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest

from tritontower.drawing import DrawnGroup, DrawnNode, collapse_repeats, graph_svg
from tritontower.drawing.layout import lay_out
from tritontower.errors import UsageError
from tritontower.text_table import text_table

SVG = "{http://www.w3.org/2000/svg}"


def _tower(depth: int, full_blocks: tuple[int, ...] = ()) -> tuple[list[DrawnNode], list[tuple[str, str]]]:
    """A tower as graphs have it: an input, a table that every block reads, residual connections, a tap."""
    nodes = [DrawnNode("pixels", "input"), DrawnNode("patches", "patch_projection"), DrawnNode("table", "rotary_table")]
    edges = [("pixels", "patches")]
    rows = "patches"
    for block in range(depth):
        norm, attention, mlp = (f"blocks.{block}.{name}" for name in ("norm", "attention", "mlp"))
        nodes.append(DrawnNode(norm, "norm"))
        nodes.append(DrawnNode(attention, "attention", ("full",) if block in full_blocks else ("window", "8 × 8")))
        nodes.append(DrawnNode(mlp, "linear"))
        edges += [(rows, norm), (norm, attention), ("table", attention), (attention, mlp), (rows, mlp)]
        rows = mlp
        if block in full_blocks:
            nodes.append(DrawnNode(f"tap{block}", "tap"))
            edges.append((rows, f"tap{block}"))
    nodes.append(DrawnNode("projector", "projector"))
    edges += [(rows, "projector"), *((f"tap{block}", "projector") for block in full_blocks)]
    return nodes, edges


class TestTable:
    def test_aligns_numbers_right_and_words_left(self):
        table = text_table("Costs", ("node", "GFLOP"), [("norm", "1.5"), ("attention", "1,024.25"), ("rope", None)])
        assert table.splitlines() == [
            "Costs",
            "node          GFLOP",
            "─────────  ────────",
            "norm            1.5",
            "attention  1,024.25",
            "rope              –",
        ]

    def test_units_signs_and_exponents_are_numbers(self):
        table = text_table("", ("x",), [("3.4 GiB",), ("-1.2e-05",), ("12 %",), ("×32",)])
        assert {len(line) for line in table.splitlines()} == {8}
        assert table.splitlines()[-1] == "     ×32"

    def test_a_word_among_numbers_makes_a_column_of_words(self):
        assert text_table("", ("x",), [("10",), ("none",)]).splitlines()[2] == "10"

    def test_wide_characters_take_two_columns_and_accents_none(self):
        lines = text_table("", ("name", "n"), [("猫.png", 1), ("e\u0301.png", 22)]).splitlines()
        assert lines[2:] == ["猫.png   1", "e\u0301.png   22"]

    def test_no_rows(self):
        assert text_table("", ("a", "bc"), []).splitlines() == ["a  bc", "─  ──"]

    def test_ragged_rows_are_refused(self):
        with pytest.raises(UsageError, match="row 1 has 1 cells for 2 columns"):
            text_table("", ("a", "b"), [(1, 2), (1,)])


class TestCollapse:
    def test_identical_blocks_become_one(self):
        nodes, edges, groups = collapse_repeats(*_tower(32))
        assert [node.name for node in nodes][3:6] == ["blocks.0.norm", "blocks.0.attention", "blocks.0.mlp"]
        assert [node.heading for node in nodes][3:6] == ["norm", "attention", "mlp"]
        assert groups == [DrawnGroup("blocks 0–31", ("blocks.0.norm", "blocks.0.attention", "blocks.0.mlp"), 32)]
        assert set(edges) == {
            ("pixels", "patches"),
            ("patches", "blocks.0.norm"),
            ("patches", "blocks.0.mlp"),
            ("blocks.0.norm", "blocks.0.attention"),
            ("table", "blocks.0.attention"),
            ("blocks.0.attention", "blocks.0.mlp"),
            ("blocks.0.mlp", "projector"),
        }

    def test_a_block_that_differs_stands_alone(self):
        _, edges, groups = collapse_repeats(*_tower(6, full_blocks=(3,)))
        assert [(group.title, group.repeats) for group in groups] == [
            ("blocks 0–2", 3),
            ("blocks 3", 1),
            ("blocks 4–5", 2),
        ]
        assert ("blocks.0.mlp", "blocks.3.norm") in edges
        assert ("blocks.3.mlp", "tap3") in edges

    @pytest.mark.parametrize(
        ("full_blocks", "titles"),
        [
            ((2, 5, 8), [("blocks 0–1, 3–4, 6–7", 6), ("blocks 2, 5, 8", 3)]),
            ((2, 8), [("blocks 0–1, 3–7", 7), ("blocks 2, 8", 2)]),
            ((2, 5), [("blocks 0–1, 3–4", 4), ("blocks 2, 5", 2), ("blocks 6–8", 3)]),
        ],
    )
    def test_kinds_that_take_turns_are_drawn_once(self, full_blocks, titles):
        nodes, edges = _tower(9, full_blocks)
        nodes = [node for node in nodes if node.kind != "tap"]
        nodes, edges, groups = collapse_repeats(nodes, [edge for edge in edges if "tap" not in "".join(edge)])
        assert [(group.title, group.repeats) for group in groups] == titles
        assert ("blocks.0.mlp", "blocks.2.norm") in edges
        assert ("blocks.2.mlp", "blocks.0.norm") not in edges
        last = f"blocks.{2 if len(titles) == 2 else 6}.mlp"
        assert [edge for edge in edges if edge[1] == "projector"] == [(last, "projector")]

    def test_title_of_the_caller(self):
        assert collapse_repeats(*_tower(2), "layers")[2][0].title == "layers 0–1"

    def test_nothing_repeats(self):
        nodes, edges = _tower(0)
        assert collapse_repeats(nodes, edges) == (nodes, edges, [])


class TestDrawing:
    def test_shows_every_node_edge_and_group(self):
        nodes, edges, groups = collapse_repeats(*_tower(8, full_blocks=(3,)))
        root = ElementTree.fromstring(graph_svg(nodes, edges, groups, title="A <tower> & more", subtitle="8 blocks"))
        texts = [element.text for element in root.iter(f"{SVG}text")]
        assert texts[:2] == ["A <tower> & more", "8 blocks"]
        assert {"patches", "window", "8 × 8", "full", "tap3", "blocks 0–2  × 3", "blocks 3", "blocks 4–7  × 4"} <= {
            *texts
        }
        assert len([path for path in root.iter(f"{SVG}path") if path.get("marker-end")]) == len(edges)
        assert len(list(root.iter(f"{SVG}g"))) == len(nodes)

    def test_needs_nothing_from_outside(self):
        text = graph_svg(*collapse_repeats(*_tower(2)))
        assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
        assert "<style" not in text
        assert "<image" not in text

    def test_the_same_graph_gives_the_same_drawing(self):
        assert graph_svg(*_tower(3)) == graph_svg(*_tower(3))

    @pytest.mark.parametrize("full_blocks", [(), (1,), (0, 3, 5)])
    @pytest.mark.parametrize("collapsed", [True, False])
    def test_nothing_overlaps_and_everything_is_on_the_page(self, full_blocks, collapsed):
        nodes, edges = _tower(6, full_blocks)
        groups = []
        if collapsed:
            nodes, edges, groups = collapse_repeats(nodes, edges)
        layout = lay_out(nodes, edges, groups, top=40)
        for one, other in combinations(layout.boxes.values(), 2):
            apart = one.right < other.x or other.right < one.x or one.bottom < other.y or other.bottom < one.y
            assert apart, (one.node.name, other.node.name)
        for box in layout.boxes.values():
            assert box.x >= 0
            assert box.right <= layout.width
            assert box.y >= 40
            assert box.bottom <= layout.height
        for upper, lower in pairwise(layout.frames):
            assert upper.y + upper.height < lower.y
        for frame in layout.frames:
            for box in layout.boxes.values():
                inside = box.node.name in frame.group.members
                beside = box.right < frame.x or box.bottom <= frame.y or box.y >= frame.y + frame.height
                assert inside != beside, (frame.group.title, box.node.name)
        assert all(0 <= x <= layout.width for x in layout.lanes.values())

    def test_readers_stand_below_their_writers_or_level_beside_a_frame(self):
        nodes, edges, groups = collapse_repeats(*_tower(6, full_blocks=(2,)))
        boxes = lay_out(nodes, edges, groups, top=0).boxes
        for source, target in edges:
            level = boxes[source].aside and boxes[source].layer == boxes[target].layer
            assert level or boxes[source].bottom < boxes[target].y, (source, target)
        assert boxes["table"].aside

    def test_what_a_reader_below_a_frame_reads_stands_beside_the_reader(self):
        nodes, edges = _tower(4)
        nodes = [*nodes[:-1], DrawnNode("selection", "input"), DrawnNode("other", "select"), nodes[-1]]
        edges = [("blocks.3.mlp", "other"), *edges, ("selection", "projector")]
        boxes = lay_out(*collapse_repeats(nodes, edges), top=0).boxes
        assert boxes["selection"].layer == boxes["other"].layer == boxes["projector"].layer
        assert boxes["other"].right < boxes["selection"].x
        assert boxes["selection"].right < boxes["projector"].x

    def test_edges_that_skip_layers_at_the_same_height_take_different_lanes(self):
        nodes = [DrawnNode(name, "add") for name in "abcd"]
        lanes = lay_out(nodes, [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("b", "d")], (), top=0).lanes
        assert lanes["a"] > lanes["b"] > 0

    def test_kinds_have_their_colors(self):
        nodes = [DrawnNode("a", "norm"), DrawnNode("b", "rare"), DrawnNode("c", "mine")]
        text = graph_svg(nodes, [], colors={"mine": ("#123456", "#654321")})
        fills = [rect.get("fill") for rect in ElementTree.fromstring(text).findall(f"{SVG}g/{SVG}rect")]
        assert fills[2] == "#123456"
        assert len({*fills}) == 3

    @pytest.mark.parametrize(
        ("nodes", "edges", "groups", "message"),
        [
            ("", [], [], "no nodes"),
            ("aa", [], [], "same name"),
            ("ab", [("a", "x")], [], "not both nodes"),
            ("ab", [("b", "a")], [], "leads upward"),
            ("ab", [], [DrawnGroup("g", ("a", "x"), 2)], "does not exist"),
            ("ab", [], [DrawnGroup("g", ("a",), 2), DrawnGroup("h", ("a",), 2)], "twice"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, nodes, edges, groups, message):
        with pytest.raises(UsageError, match=message):
            graph_svg([DrawnNode(name, "add") for name in nodes], edges, groups)
