"""The fetch process: everything that is done with the rights of a job's user.

The agent starts one for each job and node, as that user. It looks names up, reads ranges of files and store
objects into memory shared with the agent, and writes the job's events. It holds no secret and decides
nothing: the agent believes no byte of it unless a digest agrees, or unless the bytes are shown to this user
alone. When a file system hangs, the agent kills this process and stays well itself.

    python -I -m bootseer_slurm.fetch.child <socket fd>

One SEQPACKET message is one JSON object. The first says whom to become, and comes with the ring's descriptor:
until then the process is root, and reads nothing else. All others are requests with an "id" that the reply
repeats. The process ends when the agent's end of the socket is closed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from bootseer_slurm.blob.jobclass import RECORD_LIMIT_BYTES, class_path, decode_wishes
from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, decode
from bootseer_slurm.blob.names import Base, Name, file_fingerprint, read_published, user_folder
from bootseer_slurm.blob.plans import Shape, keep_trace, plan_of
from bootseer_slurm.blob.squashfs import head_and_tables
from bootseer_slurm.blob.stripes import Stripes, open_stripes
from bootseer_slurm.checkpoint.locate import named_files, share_of
from bootseer_slurm.checkpoint.striped import MANIFEST, identity_of, open_file
from bootseer_slurm.env.key import Key, differences, fingerprint_of, key_of, stored_name
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, NotFound
from bootseer_slurm.fetch.original import fingerprint_now, open_original, reason
from bootseer_slurm.fetch.turns import HOLD_S
from bootseer_slurm.identity import User, close_to_tracers
from bootseer_slurm.image.reference import registry_reference
from bootseer_slurm.store import ObjectReader, Store, clock_offset, open_store

_MESSAGE_BYTES = 64 * 1024
_SNAPSHOTS = ("docker://", "dir:/")  # names of images that stand for what was there when they were made


class Child:
    """Answers the agent's requests; one thread for each slot of the ring."""

    def __init__(self, link: socket.socket, ring: mmap.mmap, slot_bytes: int, store_uri: str) -> None:
        self._link = link
        self._ring = memoryview(ring)
        self._slot_bytes = slot_bytes
        self._store_uri = store_uri
        self._store: Store | None = None
        self._handles: list[list[ObjectReader]] = []
        self._keys: dict[str, tuple[str, Key]] = {}  # of each environment: the job's image, and its key
        self._lock = threading.Lock()
        self._demands = 0  # reads that somebody waits for
        self._no_demand = threading.Condition()
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], list[int]]] = queue.SimpleQueue()
        self._operations: dict[str, Callable[..., tuple[dict[str, Any], list[int]]]] = {
            "resolve": self._resolve,
            "reopen": self._reopen,
            "read": self._read,
            "locate": self._locate,
            "same": self._same,
            "write": self._write,
            "clock": self._clock,
            "plan": self._plan,
            "trace": self._trace,
            "recall": self._recall,
            "remember": self._remember,
        }

    def run(self, threads: int) -> None:
        """Serve until the agent goes away."""
        for number in range(threads):
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()
        while True:
            message, fds, _, _ = socket.recv_fds(self._link, _MESSAGE_BYTES, 1)
            if not message:
                return
            self._requests.put((json.loads(message), fds))

    def _work(self) -> None:
        while True:
            request, received = self._requests.get()
            reply: dict[str, Any]
            fds: list[int] = []
            try:
                reply, fds = self._operations[request["op"]](request, received)
            except BootseerError as error:
                reply = {"error": error.message, "class": type(error).__name__}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}", "class": "StoreError"}
            try:
                socket.send_fds(self._link, [json.dumps({**reply, "id": request["id"]}).encode()], fds)
            except OSError:
                os._exit(0)  # the agent is gone
            for fd in (*fds, *received):
                os.close(fd)

    def _open_store(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = open_store(self._store_uri)
            return self._store

    def _keep(self, readers: list[ObjectReader]) -> int:
        with self._lock:
            self._handles.append(readers)
            return len(self._handles) - 1

    def _locate(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """What files a checkpoint is that a user named: one, or those of the newest in a folder."""
        files, message = named_files(request["name"], newest_step=request["newest"])
        some = share_of(files, request["limit"], rank=request["rank"], nodes=request["nodes"])
        return {"files": some, "count": len(files), "message": message}, []

    def _resolve(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Look a target up: what the user named, what the store has of it, and handles to read both."""
        kind, name = request["kind"], request["name"]
        if kind == "checkpoint" and "://" not in name and os.path.exists(f"{name}/{MANIFEST}"):
            return self._remote(f"file://{quote(os.path.realpath(name))}")
        reply: dict[str, Any] = {}
        fds: list[int] = []
        original: ObjectReader | None = None
        if "://" in name or name.startswith(_SNAPSHOTS):
            fingerprint = ""
        else:
            name, fd, fingerprint, original = open_original(kind, name)
            fds.append(fd)
            reply["path"] = name
        if original is not None:
            reply |= {"size_bytes": original.size_bytes, "origin": self._keep([original])}
        readable = original
        try:
            installed = None
            if kind == "environment":
                used = request.get("image", ""), request.get("job_class", "")
                installed, record, fingerprint, reply["image"] = self._environment(name, *used)
            else:
                record = self._record(name, request.get("digest", ""))
            if record and kind == "image" and name.startswith(_SNAPSHOTS):
                fingerprint = record.fingerprint  # what its tag means now is asked elsewhere, if at all
            opened = self._open_blobs(installed) if installed else []
            if not opened and record and record.kind == kind and record.fingerprint == fingerprint:
                opened = self._open_blobs(record, or_fail=True)
            if record is None and kind == "checkpoint" and "://" in name:
                return self._remote(name)
            if opened:
                reply["blobs"] = [blob for blob, _, _ in opened]
                fds += [_memory_file(manifest) for _, manifest, _ in opened]
                readable = opened[0][2]
            elif record:
                parts = differences(record.key, self._keys[name][1]) if name in self._keys else ()
                reply["warning"] = f"{name} was changed since it was put into the store"
                reply["warning"] += f": {', '.join(parts)}" if parts else ""
        except BootseerError as error:
            reply["warning"] = error.message
        reply["fingerprint"] = fingerprint
        if kind == "image" and readable is not None:
            with contextlib.suppress(BootseerError):  # without them a mount reads them itself
                reply["first"] = head_and_tables(readable, name)
        return reply, fds

    def _remote(self, uri: str) -> tuple[dict[str, Any], list[int]]:
        """A checkpoint that is named by its URI: a striped file, or one that is read as it lies."""
        opened = open_file(uri)
        if opened.manifest is not None:
            blob = {"folder": uri, "handle": self._keep(opened.objects), "signature": ""}
            return {"blobs": [blob]}, [_memory_file(opened.manifest.encode())]
        opened.close()
        identity = identity_of(uri)  # before and after it is opened: its bytes are kept under that
        opened = open_file(uri)
        if identity_of(uri) != identity:
            raise InputError(f"checkpoint {uri}: was written while it was looked up")
        handle, size_bytes = self._keep(opened.objects), opened.layout.size_bytes
        return {"origin": handle, "size_bytes": size_bytes, "identity": identity}, []

    def _environment(
        self, path: str, image: str, job_class: str
    ) -> tuple[Name | None, Name | None, str, str]:
        """What a start of this class installed over an environment as it lies now; what was saved of it, for
        the image that it is used in, else for the node itself; its fingerprint; and that image's digest.
        """
        digest = self._image_digest(image)
        record = self._record(stored_name(path, digest), "")
        if record is None and digest:
            digest, record = "", self._record(path, "")
        fingerprint = self._note_key(path, digest, record.key if record else None)
        installed = self._record(stored_name(path, digest, job_class), "") if job_class else None
        if installed and installed.fingerprint != fingerprint:
            installed = None
        return installed, record, fingerprint, digest

    def _image_digest(self, name: str) -> str:
        """What tells the image that an environment is used in; of one that the store has not, its name."""
        if not name:
            return ""
        if name.startswith("/"):
            with contextlib.suppress(OSError):
                return file_fingerprint(os.stat(name))
        record = read_published(self._open_store(), os.getuid(), name)
        return record.fingerprint if record else name

    def _note_key(self, path: str, image: str, known: Key | None) -> str:
        """Look an environment over; gives its fingerprint. Raises InputError."""
        try:
            key = key_of(path, home=os.path.expanduser("~"), image=image, known=known)
        except OSError as error:
            raise InputError(f"environment {path}: {reason(error)}") from error
        self._keys[path] = image, key
        return fingerprint_of(key)

    def _record(self, name: str, digest: str) -> Name | None:
        """What the store has under a name, or of an image under the digest that its tag stands for now."""
        store, uid = self._open_store(), os.getuid()
        record = read_published(store, uid, name)
        if digest and name.startswith("docker://") and not (record and record.fingerprint == digest):
            pinned = read_published(store, uid, registry_reference(name).pinned(digest).name)
            return pinned if pinned and pinned.fingerprint == digest else record
        return record

    def _reopen(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Open a blob again, whatever its name stands for now."""
        blob = Base(request["blob"], request["folder"])
        if "://" in blob.folder:
            opened = open_file(blob.folder)
            if opened.manifest is None or opened.manifest.id != blob.blob:
                raise IntegrityError(f"{blob.folder}: was written again since it was looked up")
            return {"handle": self._keep(opened.objects)}, []
        reply, _manifest, _reader = self._open_blob(blob)
        return reply, []

    def _open_blobs(
        self, record: Name, *, or_fail: bool = False
    ) -> list[tuple[dict[str, Any], bytes, ObjectReader]]:
        """What a name stands for, and what that lies over; nothing where a part is not there any more."""
        try:
            return [self._open_blob(blob) for blob in (record, record.base) if blob]
        except BootseerError:
            if or_fail:
                raise
            return []

    def _open_blob(self, blob: Name | Base) -> tuple[dict[str, Any], bytes, ObjectReader]:
        """What the agent needs of a blob, its manifest, and itself. Raises IntegrityError."""
        store, folder = self._open_store(), blob.folder
        content = store.read(f"{folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        manifest = decode(content)
        if manifest.id != blob.blob:
            raise IntegrityError(f"{folder}: the manifest in the store is not the one that was saved")
        readers = open_stripes(store, folder, manifest.layout)
        reply = {"folder": folder, "handle": self._keep(readers), "signature": blob.signature}
        return reply, content, Stripes(manifest.layout, readers)

    def _read(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        start = request["slot"] * self._slot_bytes
        reader = self._handles[request["handle"]][request["object"]]
        if request.get("demand"):
            with self._somebody_waits():
                view = self._ring[start : start + request["size_bytes"]]
                return {"count": reader.read_into(request["offset"], view)}, []
        count = 0
        while count < request["size_bytes"]:
            with self._no_demand:
                self._no_demand.wait_for(lambda: not self._demands, HOLD_S)
            step_bytes = min(request["step_bytes"], request["size_bytes"] - count)
            view = self._ring[start + count : start + count + step_bytes]
            done = reader.read_into(request["offset"] + count, view)
            count += done
            if done < step_bytes:
                break
        return {"count": count}, []

    @contextlib.contextmanager
    def _somebody_waits(self) -> Iterator[None]:
        """No other read begins a step meanwhile."""
        with self._no_demand:
            self._demands += 1
        try:
            yield
        finally:
            with self._no_demand:
                self._demands -= 1
                if not self._demands:
                    self._no_demand.notify_all()

    def _same(self, request: dict[str, Any], received: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Whether the original is still what it was."""
        kind, name = request["kind"], request["name"]
        if kind == "environment":
            image, known = self._keys[name]
            fingerprint = self._note_key(name, image, known)
        else:
            fingerprint = fingerprint_now(kind, name)
        return {"same": fingerprint == request["fingerprint"]}, []

    def _write(self, request: dict[str, Any], received: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Write a small object of the user, such as events."""
        self._open_store().write(f"{user_folder(os.getuid())}/{request['path']}", _content(received))
        return {}, []

    def _clock(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """How this node's clock differs from the store's."""
        known = clock_offset(self._open_store(), f"{user_folder(os.getuid())}/{request['path']}")
        return dict(zip(("offset_s", "error_s"), known, strict=True)), []

    def _trace(self, request: dict[str, Any], received: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Keep a trace."""
        keep_trace(self._open_store(), os.getuid(), request["class"], request["blob"], _content(received))
        return {}, []

    def _plan(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """What earlier starts touched of a blob."""
        plan, warning = plan_of(
            self._open_store(),
            os.getuid(),
            request["class"],
            request["blob"],
            Shape(request["blocks"], request["block_bytes"]),
            any_class=request["any_class"],
        )
        return {"warning": warning} if warning else {}, [_memory_file(plan.encode())]

    def _recall(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """What the last start of a class asked for."""
        path = class_path(os.getuid(), request["class"])
        try:
            content = self._open_store().read(path, limit_bytes=RECORD_LIMIT_BYTES)
        except NotFound:
            return {"wishes": []}, []
        return {"wishes": decode_wishes(content)}, []

    def _remember(self, request: dict[str, Any], received: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Keep what this start of a class asked for."""
        self._open_store().write(class_path(os.getuid(), request["class"]), _content(received))
        return {}, []


def _content(received: list[int]) -> bytes:
    return os.pread(received[0], os.fstat(received[0]).st_size, 0)


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("bootseer-manifest", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def _become(order: dict[str, Any]) -> None:
    """Be the job's user for good; an agent that is not root has its own rights to give only."""
    if os.geteuid() == 0:
        User(order["uid"], order["gid"], tuple(order["groups"])).become()
    if "home" in order:
        os.environ["HOME"] = order["home"]
    close_to_tracers()


def main() -> None:
    """The process the agent starts; see the module's first lines for its argument."""
    os.umask(0o077)
    link = socket.socket(fileno=int(sys.argv[1]))
    message, fds, _, _ = socket.recv_fds(link, _MESSAGE_BYTES, 1)
    if not message:
        return  # it was a spare one, and is not needed
    order = json.loads(message)
    _become(order)
    ring = mmap.mmap(fds[0], 0)
    os.close(fds[0])
    Child(link, ring, order["slot_bytes"], order["store"]).run(order["slots"])
    os._exit(0)  # threads may hang in a file system that does not answer


if __name__ == "__main__":
    main()
