"""A job's nodes: which of them this one is, and lists that are cut or missing."""

from __future__ import annotations

import pytest

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm.allocation import Job, Rank
from tests.nodelists import nodelist_of


def job(nodelist: str, node_count: int = 0) -> Job:
    return Job(7, 0, 20001, 20001, nodelist=nodelist, node_count=node_count)


def test_each_node_knows_its_rank() -> None:
    assert job("n[1-3]", 3).rank("n2") == Rank("1/3", 1, 3)
    assert [job("n[1-3]", 3).is_first_node(node) for node in ("n1", "n2")] == [True, False]


def test_a_list_of_10_000_nodes_is_read_whole() -> None:
    nodelist = nodelist_of(10_000)
    last = nodelist.rpartition(",")[2]
    assert job(nodelist, 10_000).rank(last) == Rank("9999/10000", 9999, 10_000)


@pytest.mark.parametrize(
    ("nodelist", "words"),
    [
        ("n[1-3],gpu-a,gpu-b", "names 5 of the job's 6 nodes"),
        ("n[1-3],gpu-a,gpu-b,gpu-c,gpu-d", "names 7 of the job's 6 nodes"),
        ("n[1-3],gpu-a,gpu-[", "not a node name or range"),
        ("", "no list came of the job's 6 nodes"),
    ],
    ids=["shorter", "longer", "in brackets", "missing"],
)
def test_a_list_that_was_cut_is_refused(nodelist: str, words: str) -> None:
    """Also where it reads as the list of fewer nodes: "n[1-3],gpu-a,gpu-b,gpu-c" was whole."""
    cut = job(nodelist, 6)
    with pytest.raises(InputError, match=words):
        cut.nodes("n1")
    assert cut.rank("n1") == Rank("n1"), "it reads alone"
    assert not cut.is_first_node("n1"), "no node works for all, as each would"


def test_a_node_that_is_not_in_its_own_list_refuses_it() -> None:
    """As where the cut goes through its name, and the number is right."""
    cut = job("n[1-3],gpu-a,gpu-b,g", 6)
    with pytest.raises(InputError, match="does not name this node, gpu-c"):
        cut.nodes("gpu-c")
    assert cut.rank("gpu-c") == Rank("gpu-c") and not cut.is_first_node("gpu-c")


def test_a_job_that_only_a_step_told_of() -> None:
    """The plugin knows no list: a node works for itself."""
    assert job("").nodes("n1") == []
    assert job("").rank("n1") == Rank("n1") and job("").is_first_node("n1")
