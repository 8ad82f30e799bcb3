"""One start of one job on this node, as Slurm describes it to the prolog and to steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm.hostlist import expand


class Rank(NamedTuple):
    """A node of a job. key: the same for what reads the same; the node's name where its rank is not known."""

    key: str
    number: int = 0
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """A job's start. gpus: of this node, as Slurm numbers them; () where they are not known.

    nodelist: as it came, "" where none came. node_count: of the job, 0 where nobody said.
    """

    job_id: int
    restart: int
    uid: int
    gid: int
    nodelist: str = ""
    node_count: int = 0
    partition: str = ""
    name: str = ""
    account: str = ""
    gpus: tuple[int, ...] = ()

    @property
    def folder_name(self) -> str:
        """The name of its folders on this node."""
        return f"{self.job_id}.{self.restart}"

    def nodes(self, node: str) -> list[str]:
        """Its nodes in Slurm's order, of which `node` is one; none where only a step told of the job.

        Raises InputError where the list is missing, or not the whole one: that of fewer nodes would mislead.
        """
        if not self.nodelist and self.node_count:
            raise InputError(f"no list came of the job's {self.node_count} nodes")
        names = expand(self.nodelist)
        # A list that was cut may read well. So may a step's, which the prolog has without PrologFlags=Alloc.
        if self.node_count and len(names) != self.node_count:
            raise InputError(f"the nodelist names {len(names)} of the job's {self.node_count} nodes")
        if names and node not in names:
            raise InputError(f"the nodelist does not name this node, {node}")
        return names

    def rank(self, node: str) -> Rank:
        """Which of the job's nodes this is."""
        try:
            names = self.nodes(node)
        except InputError:
            return Rank(node)
        if not names:
            return Rank(node)
        index = names.index(node)
        return Rank(f"{index}/{len(names)}", index, len(names))

    def is_first_node(self, node: str) -> bool:
        """Whether this is the one node of the job that works for all."""
        try:
            return self.nodes(node)[:1] in ([], [node])
        except InputError:
            return False
