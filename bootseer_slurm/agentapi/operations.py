"""The operations of the node agent: one row for each.

The agent answers from this table and refuses what is not in it; docs/protocol.md shows it, which a test
compares. Hook, plugin and the stand-in of squashfuse write their messages themselves: tests compare keys.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Asker(enum.Enum):
    """Who may ask an operation, by the agent's socket."""

    ANYONE = "any user"  # by the abstract socket too
    USER = "any user on the node"  # not in a container's network: only by the socket's path
    ROOT = "root"


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of a message. key: with "?" behind it where it may lack, "*" where it may stand often."""

    key: str
    what: str

    @property
    def name(self) -> str:
        return self.key.rstrip("?*")

    @property
    def required(self) -> bool:
        return self.key == self.name


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. descriptors: what those that come with its reply are; "": none come.

    slow: the reply may take long, and so begins with WAIT=<milliseconds>.
    """

    name: str
    asker: Asker
    what: str
    fields: tuple[Field, ...] = ()
    reply: tuple[Field, ...] = ()
    descriptors: str = ""
    slow: bool = False


_JOB_ID = Field("JOB_ID", "the job, as Slurm numbers it")
_OWN_JOB_ID = Field("JOB_ID", "a job of the asker's; root may name any")
_TIME_NS = Field("TIME_NS", "when, in ns since the epoch")
_JOB = (
    _JOB_ID,
    Field("RESTART?", "how often it was requeued"),
    Field("UID", "its user"),
    Field("GID?", "and his group; without it, the one that this node knows"),
    Field("NODELIST?", "its nodes, as Slurm writes them; whole, or not there"),
    Field("NODES?", "how many these are"),
    Field("NODENAME?", "this node, as Slurm names it"),
    Field("PARTITION?", "as Slurm has it"),
    Field("ACCOUNT?", "as Slurm has it"),
    Field("JOB_NAME?", "as Slurm has it"),
    Field("GPUS?", "of this node, as Slurm numbers them: 0,1,4-7"),
)
_REQUEST = (
    Field("BOOTSEER?", "the job asked: 1, or observe"),
    Field("PROFILE?", "the content of a profile"),
    Field("IMAGE?", "of --bootseer-image"),
    Field("ENV?", "of --bootseer-env"),
    Field("CHECKPOINT?", "of --bootseer-checkpoint"),
    Field("CONTAINER_IMAGE?", "of pyxis's --container-image"),
)

OPERATIONS = {
    each.name: each
    for each in (
        Operation(
            "prolog",
            Asker.ROOT,
            "a job comes to this node (the hook)",
            (*_JOB, *_REQUEST, Field("HOOK_START_NS?", "when the hook began, in ns since the epoch")),
        ),
        Operation(
            "epilog",
            Asker.ROOT,
            "a job leaves this node (the hook)",
            (
                _JOB_ID,
                Field("RESTART?", "not to be relied on: of a requeued job it is the next start's"),
                Field("HOOK_START_NS?", "when the hook began, in ns since the epoch"),
            ),
        ),
        Operation(
            "attach",
            Asker.ROOT,
            "what a step is shown (the plugin)",
            (
                *_JOB,
                *_REQUEST,
                Field("STEP_ID", "the step"),
                Field("MEMORY_MB?", "that it may use on this node; 0: no limit"),
                Field("GIDS?", "all groups of the user; not read yet"),
            ),
            (
                Field("SETENV*", "NAME=VALUE for its environment"),
                Field("BIND*", "N:DEVICE:INODE:PATH: descriptor N goes to PATH, while that is this file"),
            ),
            descriptors="mounts, which BIND numbers",
            slow=True,
        ),
        Operation(
            "stage",
            Asker.ROOT,
            "where a step is (the plugin)",
            (
                _JOB_ID,
                Field("NAME", "the stage"),
                _TIME_NS,
                Field("STEP_ID", "the step"),
                Field("TASK?", "its rank in the step"),
                Field("DETAIL?", "a line of text"),
            ),
        ),
        Operation(
            "mark",
            Asker.ANYONE,
            "where a job says that it is (`bootseer mark`)",
            (
                _OWN_JOB_ID,
                Field("NAME", "the mark"),
                _TIME_NS,
                Field("STEP_ID?", "the step"),
                Field("TASK?", "its rank in the step"),
            ),
        ),
        Operation(
            "status",
            Asker.ANYONE,
            "whether the agent runs, and for which jobs (`bootseer status`)",
            reply=(Field("STATUS_JSON", "as `bootseer status` prints it"),),
        ),
        Operation(
            "debug",
            Asker.USER,
            "how far a job's start is on this node (`bootseer debug job`)",
            (_OWN_JOB_ID,),
            reply=(Field("DEBUG_JSON", "as `bootseer debug job --json` prints it"),),
        ),
        Operation(
            "image",
            Asker.USER,
            "the image that pyxis asks for (the importer)",
            (
                _OWN_JOB_ID,
                Field("URI", "as pyxis names it"),
                Field("DIGEST?", "that its tag stands for now"),
                Field("STEP_ID?", "the step; not read yet"),
            ),
            (
                Field("PATH?", "of a squashfs, which is there until the job ends"),
                Field("DIGEST?", "of the image"),
                Field("NOTFOUND?", "1: neither the store nor the node has it"),
            ),
            slow=True,
        ),
        Operation(
            "mount",
            Asker.USER,
            "the kernel's mount of an image (the stand-in of squashfuse)",
            (Field("IMAGE", "a path below the agent's blobs"),),
            descriptors="the mount",
        ),
        Operation(
            "pack",
            Asker.USER,
            "have the agent make a squashfs, which it signs",
            (
                _OWN_JOB_ID,
                Field("KIND?", "image or environment"),
                Field("COMPRESSION?", "zstd or lz4"),
            ),
            (Field("TICKET", "for `packed`"),),
            descriptors="a pipe that takes a tar",
            slow=True,
        ),
        Operation(
            "packed",
            Asker.USER,
            "take what was packed, or give it up",
            (_OWN_JOB_ID, Field("TICKET", "of `pack`")),
            (Field("MANIFEST_ID", "of its blob"), Field("SIGNATURE", "of that, by the site's key")),
            descriptors="the squashfs",
            slow=True,
        ),
    )
}
