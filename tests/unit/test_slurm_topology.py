"""Which nodes are near one another, by topology.conf."""

from __future__ import annotations

from pathlib import Path

from bootseer_slurm.slurm.topology import near_nodes, read_topology

TREE = """
# a comment
SwitchName=s1 Nodes=n[3-4]
switchname=s2 LinkSpeed=1 nodes=n1,n2
SwitchName=top Switches=s[1-2]
"""


def test_nodes_under_one_switch_stand_together() -> None:
    assert near_nodes(["n1", "n2", "n3", "n4"], TREE) == ((2, 3), (0, 1))


def test_nodes_that_the_file_does_not_name_come_last() -> None:
    assert near_nodes(["n1", "x1", "n3", "x2"], TREE) == ((2,), (0,), (1, 3))
    assert near_nodes(["x1", "x2"], "") == ((0, 1),)


def test_a_node_counts_where_it_stands_first() -> None:
    assert near_nodes(["n1", "n2"], "SwitchName=a Nodes=n1\nSwitchName=b Nodes=n[1-2]") == ((0,), (1,))


def test_blocks_and_continued_lines_are_read() -> None:
    assert near_nodes(["n1", "n2"], "BlockName=b1 \\\n Nodes=n2\nBlockSizes=4") == ((1,), (0,))


def test_a_line_that_is_no_nodelist_is_left() -> None:
    assert near_nodes(["n1", "n2"], "SwitchName=a Nodes=n[2-\nSwitchName=b Nodes=n2") == ((1,), (0,))


def test_the_first_file_counts(tmp_path: Path) -> None:
    (tmp_path / "second").write_text(TREE)
    assert read_topology([tmp_path / "first", tmp_path / "second"]) == TREE
    assert read_topology([tmp_path / "first"]) == ""
    (tmp_path / "first").write_text("x" * (4 * 2**20 + 1))
    assert read_topology([tmp_path / "first"]) == ""
