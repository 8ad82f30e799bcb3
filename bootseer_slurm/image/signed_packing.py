"""The ways to pack an image so that it is signed, and the kernel may mount it: by the agent, or by root.

A user's own squashfs is never signed. The agent packs what a user's process sends it as a tar (see `packer`),
and signs the result; root signs what it packed itself. Where neither is to be had, the user packs, and the
image works all the same, through squashfuse.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.client import request_descriptors
from bootseer_slurm.agentapi.protocol import first
from bootseer_slurm.errors import AgentUnavailable, BootseerError
from bootseer_slurm.image.convert import pack
from bootseer_slurm.image.signing import Key, sign

_START_TIMEOUT_S = 10.0
_FINISH_TIMEOUT_S = 900.0  # mksquashfs has most of its work done when the tar ends


class Packing(Protocol):
    """A way to make a squashfs of a root file system."""

    def pack(self, rootfs: Path, target: Path) -> None:
        """Make `target` of `rootfs`. Raises BootseerError."""

    def signature(self, blob: str) -> str:
        """The signature of what was packed, when this is its blob's id; "" without one."""


class OwnPacking:
    """By this process. Signed when it is root's and the site has a key."""

    def __init__(self, key: Key | None = None) -> None:
        self._key = key

    def pack(self, rootfs: Path, target: Path) -> None:
        pack(rootfs, target)

    def signature(self, blob: str) -> str:
        return sign(self._key, 0, blob) if self._key and os.geteuid() == 0 else ""


class AgentPacking:
    """By the agent of this node, for a job of this user; by this process where the agent does not."""

    def __init__(self, socket_path: Path, job_id: str, *, warn: Callable[[str], None]) -> None:
        """warn: told why the agent does not pack, or what it packed is not signed."""
        self._socket_path = socket_path
        self._job_id = job_id
        self._warn = warn
        self._signed = ("", "")

    def pack(self, rootfs: Path, target: Path) -> None:
        if not self.pack_stream(lambda out: _write_tar(rootfs, out), target, kind="image"):
            pack(rootfs, target)

    def pack_stream(
        self, write: Callable[[int], None], target: Path, *, kind: str, compression: str = ""
    ) -> bool:
        """Make `target` of a tar, which `write` writes to a descriptor; False where the agent does not pack.

        kind: of the blob that it becomes. compression: see Packer.start. Raises BootseerError when the job
        ends meanwhile.
        """
        try:
            fd, self._signed = self._packed(write, kind, compression)
        except (BootseerError, OSError, ValueError) as error:
            self._warn(f"packed without the agent, so the kernel will not mount it: {error}")
            return False
        with open(fd, "rb") as image, target.open("xb") as file:
            size_bytes = os.fstat(fd).st_size
            shutil.copyfileobj(image, file, 1 << 20)
            if file.tell() != size_bytes:
                raise BootseerError(f"{target}: the agent took its image back: the job is over")
        return True

    def signature(self, blob: str) -> str:
        signed, signature = self._signed
        if signed not in ("", blob):
            self._warn("stored with other digests than the agent's, so the kernel will not mount it")
        return signature if blob == signed else ""

    def _packed(
        self, write: Callable[[int], None], kind: str, compression: str
    ) -> tuple[int, tuple[str, str]]:
        """Send the tar; gives a descriptor of the image, and (its blob's id, signature)."""
        asked = [("KIND", kind), ("COMPRESSION", compression)]
        reply, fds = self._ask("pack", asked, _START_TIMEOUT_S)
        ticket = [("TICKET", first(reply, "TICKET"))]
        try:
            try:
                if len(fds) != 1:
                    raise AgentUnavailable("the agent does not pack")
                write(fds[0])
            finally:
                for fd in fds:
                    os.close(fd)
        except BaseException:
            with contextlib.suppress(BootseerError, OSError, ValueError):  # so that the next one can begin
                for fd in self._ask("packed", ticket, _START_TIMEOUT_S)[1]:
                    os.close(fd)
            raise
        reply, fds = self._ask("packed", ticket, _FINISH_TIMEOUT_S)
        if len(fds) != 1:
            raise BootseerError("the agent gave no image")
        return fds[0], (first(reply, "MANIFEST_ID"), first(reply, "SIGNATURE"))

    def _ask(self, op: str, fields: protocol.Message, timeout_s: float) -> tuple[protocol.Message, list[int]]:
        """One question, whose answer may bring a descriptor. Raises BootseerError, OSError or ValueError."""
        asked = [("JOB_ID", self._job_id), *fields]
        return request_descriptors(op, asked, socket_path=str(self._socket_path), timeout_s=timeout_s)


def _write_tar(rootfs: Path, out: int) -> None:
    """A root file system as a tar. Raises BootseerError."""
    tar = ["tar", "-C", str(rootfs), "-c", "--numeric-owner", "--exclude=./dev/*", "."]
    done = subprocess.run(tar, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise BootseerError(f"{rootfs}: tar failed: {done.stderr.decode(errors='replace')[-300:]}")
