"""The answers of the agent: one method for each operation of agentapi/operations.py, with its name."""

from __future__ import annotations

import json
import os
import time

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.artifacts.open_blobs import OpenBlobs
from bootseer_slurm.config import Config
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.image.packer import Packer
from bootseer_slurm.image.signing import read_key, sign
from bootseer_slurm.job.inspection import inspect
from bootseer_slurm.job.request import number
from bootseer_slurm.job.session import Session
from bootseer_slurm.service.departures import end_job
from bootseer_slurm.service.sessions import Sessions
from bootseer_slurm.service.sockets.parking import Waiting
from bootseer_slurm.slurm.allocation import Job

_PACK_BEGIN_S = 10.0
_PACK_TIMEOUT_S = 800.0  # for mksquashfs, after its last byte came
_IMAGE_MARGIN_S = 60.0  # for looking it up, twice
_ATTACH_MARGIN_S = 8.0  # for seeing that the originals are the same, and making the mounts


class Answers:  # size: a method for each operation
    """Answers requests. Each method gives the reply, and appends the descriptors that go with it to `fds`."""

    def __init__(
        self, config: Config, node: str, sessions: Sessions, blobs: OpenBlobs, packer: Packer
    ) -> None:
        self._config = config
        self._node = node
        self._sessions = sessions
        self._blobs = blobs
        self._packer = packer
        self._start_ns = time.time_ns()

    def prolog(self, message: Message, uid: int, fds: list[int]) -> Message:
        self._sessions.begin(message)
        return []

    def epilog(self, message: Message, uid: int, fds: list[int]) -> Message:
        # Not by restart count: the epilog of a requeued run already says the next one (Slurm 22.05).
        hook_start_ns = number(message, "HOOK_START_NS", "0")
        end_job(self._sessions, self._packer, number(message, "JOB_ID"), "job ended", hook_start_ns)
        return []

    def attach(self, message: Message, uid: int, fds: list[int]) -> Message | Waiting:
        session = self._sessions.step(message)
        if session is None:
            return []
        step = first(message, "STEP_ID")
        session.step(step, number(message, "MEMORY_MB", "0") * 2**20)
        return Waiting(
            session.context.job.uid,
            session.can_show,
            time.monotonic() + self._config.prefetch.attach_wait_s,
            lambda fds: self._show(session, step, fds),
        )

    def _show(self, session: Session, step: str, fds: list[int]) -> Message:
        """What a step is shown."""
        binds, environ = session.attach(step)
        reply: Message = [("SETENV", f"{name}={value}") for name, value in environ.items()]
        for bind in binds:
            if len(fds) == protocol.DESCRIPTOR_LIMIT:
                os.close(bind.fd)
                continue
            reply.append(("BIND", f"{len(fds)}:{bind.device}:{bind.inode}:{bind.path}"))
            fds.append(bind.fd)
        return reply

    def stage(self, message: Message, uid: int, fds: list[int]) -> Message:
        self._sessions.find(number(message, "JOB_ID")).stage(
            first(message, "NAME"),
            t_ns=number(message, "TIME_NS"),
            step=first(message, "STEP_ID"),
            task=_task(message),
            detail=first(message, "DETAIL") or None,
        )
        return []

    def mark(self, message: Message, uid: int, fds: list[int]) -> Message:
        time_ns, step = number(message, "TIME_NS"), first(message, "STEP_ID") or None
        self._own(message, uid).mark(first(message, "NAME"), t_ns=time_ns, step=step, task=_task(message))
        return []

    def status(self, message: Message, uid: int, fds: list[int]) -> Message:
        jobs = [{"job": each.job_id, "restart": each.restart} for each in self._jobs()]
        status = {"node": self._node, "pid": os.getpid(), "start_ns": self._start_ns, "jobs": jobs}
        return [("STATUS_JSON", json.dumps(status))]

    def debug(self, message: Message, uid: int, fds: list[int]) -> Message:
        return [("DEBUG_JSON", json.dumps(inspect(self._own(message, uid))))]

    def image(self, message: Message, uid: int, fds: list[int]) -> Message:
        session = self._own(message, uid)
        try:
            path, digest = session.image(first(message, "URI"), first(message, "DIGEST"))
        except NotFound:
            return [("NOTFOUND", "1")]
        return [("PATH", path), ("DIGEST", digest)]

    def mount(self, message: Message, uid: int, fds: list[int]) -> Message:
        fds.append(self._blobs.clone_mount(first(message, "IMAGE"), uid))
        return []

    def pack(self, message: Message, uid: int, fds: list[int]) -> Message:
        if not read_key(self._config.image.site_key) or self._config.image.kernel_mount == "off":
            raise InputError("this node signs no images")
        kind = "environment" if first(message, "KIND") == "environment" else "image"
        owner = self._own(message, uid).context.job.uid
        fd, ticket = self._packer.start(owner, kind, first(message, "COMPRESSION"))
        fds.append(fd)
        return [("TICKET", ticket)]

    def packed(self, message: Message, uid: int, fds: list[int]) -> Message:
        owner = self._own(message, uid).context.job.uid
        packed = self._packer.finish(owner, first(message, "TICKET"), timeout_s=_PACK_TIMEOUT_S)
        fds.append(packed.fd)
        signature = sign(read_key(self._config.image.site_key), owner, packed.manifest.id)
        return [("MANIFEST_ID", packed.manifest.id), ("SIGNATURE", signature)]

    def _jobs(self) -> list[Job]:
        return [session.context.job for session in self._sessions.all()]

    def _own(self, message: Message, uid: int) -> Session:
        session = self._sessions.find(number(message, "JOB_ID"))
        if uid not in (0, session.context.job.uid):
            raise InputError(f"job {session.context.job.job_id} is another user's")
        return session


def slow_operations(config: Config) -> dict[str, float]:
    """How long each operation may take that is slow, in seconds."""
    return {
        "attach": config.prefetch.attach_wait_s + _ATTACH_MARGIN_S,
        "image": config.prefetch.hot_wait_s + _IMAGE_MARGIN_S,
        "pack": _PACK_BEGIN_S,
        "packed": _PACK_TIMEOUT_S,
    }


def _task(message: Message) -> int | None:
    return number(message, "TASK") if first(message, "TASK") else None
