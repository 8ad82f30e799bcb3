"""Asking the node agent. Standard library only, for a training job imports this."""

from __future__ import annotations

import os
import socket
import struct
import time

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.errors import AgentUnavailable, BootseerError

_MARK_TIMEOUT_S = 1.0
_FIRST_BYTE_S = 5.0  # an agent that has to wait says so at once
# What may be asked where any user can be who answers: nothing that comes back is believed. Not from
# operations.py, which takes longer to load than a mark to send.
PUBLIC = ("mark", "status")
_AGAIN_S = 0.02


def request(
    op: str, fields: protocol.Message | None = None, *, socket_path: str | None = None, timeout_s: float = 5.0
) -> protocol.Message:
    """Send one request and give the reply's entries.

    timeout_s: for the whole reply; one that does not begin within 5 s does not come.
    Raises AgentUnavailable when no agent answers within `timeout_s`, BootseerError with what it refused.
    """
    reply, fds = request_descriptors(op, fields, socket_path=socket_path, timeout_s=timeout_s)
    for fd in fds:
        os.close(fd)
    return reply


def request_descriptors(
    op: str, fields: protocol.Message | None = None, *, socket_path: str | None = None, timeout_s: float = 5.0
) -> tuple[protocol.Message, list[int]]:
    """As `request`, with the descriptors that came with the reply; the caller closes them."""
    paths = [socket_path or os.environ.get("BOOTSEER_AGENT_SOCKET") or protocol.SOCKET]
    if op in PUBLIC:
        paths.append(protocol.ABSTRACT_SOCKET)
    message = protocol.encode([("OP", op), *(fields or [])])
    failure: Exception | None = None
    for path in paths:
        try:
            reply, fds = _ask(path, message, timeout_s)
        except (OSError, ValueError) as error:
            failure = error
            continue
        if protocol.first(reply, "STATUS") != "ok":
            for fd in fds:
                os.close(fd)
            raise BootseerError(protocol.first(reply, "MESSAGE", "the agent refused without a reason"))
        return reply, fds
    raise AgentUnavailable(
        f"no agent answers on this node: {failure}",
        hint="an admin looks with `systemctl status bootseer-agent`",
    )


def _ask(path: str, message: bytes, timeout_s: float) -> tuple[protocol.Message, list[int]]:
    """The reply of the agent at `path`, and its descriptors. Raises OSError or ValueError when none comes."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            first_byte_s = min(timeout_s, _FIRST_BYTE_S)
            # Python's own timeout would not wait for room in the backlog, which another may have filled.
            timeval = struct.pack("ll", int(first_byte_s), int(first_byte_s % 1 * 1e6))
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            link.connect(path)
            link.settimeout(first_byte_s)
            try:
                link.sendall(message)
                link.shutdown(socket.SHUT_WR)
                reply, fds = protocol.receive(link, rest_s=timeout_s)
            except ConnectionError:
                reply, fds = [], []
        if protocol.first(reply, "STATUS"):
            return reply, fds
        for fd in fds:
            os.close(fd)
        # Closed without an answer: this user has too many connections at this moment, as when all tasks mark.
        if time.monotonic() > deadline_s:
            raise ConnectionResetError("it closed the connection without an answer")
        time.sleep(_AGAIN_S)


def mark(name: str) -> bool:
    """Tell Bootseer where the job is, for instance mark("training_started").

    name: image_loaded, environment_loaded, checkpoint_loaded, training_started (which ends the start), or
    any other of up to 64 letters, digits, "_", "." and "-".
    Gives False, and never raises, when there is no job or no agent: a job must not fail of being measured.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        return False
    fields = [("JOB_ID", job_id), ("NAME", name), ("TIME_NS", str(time.time_ns()))]
    for key, variable in (("STEP_ID", "SLURM_STEP_ID"), ("TASK", "SLURM_PROCID")):
        if variable in os.environ:
            fields.append((key, os.environ[variable]))
    try:
        request("mark", fields, timeout_s=_MARK_TIMEOUT_S)
    except Exception:
        return False
    return True
