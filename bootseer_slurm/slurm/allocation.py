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
    """A job's start. gpus: of this node, as Slurm numbers them; () where they are not known."""

    job_id: int
    restart: int
    uid: int
    gid: int
    nodelist: str = ""
    partition: str = ""
    name: str = ""
    account: str = ""
    gpus: tuple[int, ...] = ()

    @property
    def folder_name(self) -> str:
        """The name of its folders on this node."""
        return f"{self.job_id}.{self.restart}"

    def rank(self, node: str) -> Rank:
        """Which of the job's nodes this is."""
        try:
            nodes = expand(self.nodelist)
            index = nodes.index(node)
        except (InputError, ValueError):  # the prolog's message was lost, or the list is too long for it
            return Rank(node)
        return Rank(f"{index}/{len(nodes)}", index, len(nodes))

    def is_first_node(self, node: str) -> bool:
        """Whether this is the one node of the job that works for all."""
        try:
            return expand(self.nodelist)[:1] in ([], [node])
        except InputError:
            return False
