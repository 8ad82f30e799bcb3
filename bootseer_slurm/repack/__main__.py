"""Pack an image or a snapshot again in the order in which starts touch it: one task of the agent's.

    python -I -m bootseer_slurm.repack <task as JSON, see Task>

Runs as the job's user, once its start is over, with the least claim on processor and disk. First it looks
which files the start read (touched.py), since their pages may leave memory. Then it waits until its stdin is
closed, which says that all of the blob is on the node. What it packs holds the same files as before. It takes
the old one's place under all its names, with a trace, so that the next start has a plan of it. It does
nothing where the new layout would save little, or the store has another blob under the names by then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bootseer_slurm import config as configuration
from bootseer_slurm import scratch
from bootseer_slurm.blob.lease import make_once
from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, SQUASHFS_BLOCK_BYTES, Layout, decode
from bootseer_slurm.blob.names import Name, list_names, write_name
from bootseer_slurm.blob.plans import Shape, keep_trace, plan_of
from bootseer_slurm.blob.squashfs.compression import measure
from bootseer_slurm.blob.squashfs.files import Squashfs, StoredFile, read_files
from bootseer_slurm.blob.squashfs.superblock import head_and_tables
from bootseer_slurm.blob.trace import Plan, Trace
from bootseer_slurm.blob.writer import BlobWriter
from bootseer_slurm.env.archive import squash, write_tar
from bootseer_slurm.env.layer import FILES, FILES_LIMIT_BYTES, decode_files, encode_files
from bootseer_slurm.env.tree import FileState, survey
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image.signed_packing import AgentPacking
from bootseer_slurm.repack.order import (
    HotFile,
    blocks_bytes,
    content_bytes,
    hot_extents,
    hot_files,
    in_order_of_touch,
    plan_touches,
)
from bootseer_slurm.repack.touched import is_tail_in_memory
from bootseer_slurm.repack.worth import Scene, Start, best, is_worth_it
from bootseer_slurm.signals import exit_on
from bootseer_slurm.store import FileReader, Store, open_store
from bootseer_slurm.units import format_bytes

_SCRATCH_HINT = "TMPDIR must name a folder with room for the image"
_SAMPLES = 32  # blocks, of all the files that a start touches: 0.1 s of a core


@dataclass(frozen=True, slots=True)
class Task:
    """The blob to pack again, and its job.

    kind: image or environment. blob, folder: in the store. image: where its bytes can be read. mount: the
    descriptor of a mount of it. link_bytes_per_s: what this node got of the store, 0 when that is not known.
    beside_bytes: what came over the link for other blobs during the start.
    """

    kind: str
    blob: str
    folder: str
    image: str
    mount: int
    job_class: str
    job: int
    restart: int
    node: str
    link_bytes_per_s: float
    beside_bytes: int


def main(task: Task) -> str:
    """Do it; gives what came of it in one line. Raises BootseerError or OSError."""
    work = _Work(task, open_store(configuration.load(None).store.uri))
    hot = work.look()
    if not hot:
        return "lies as starts touch it"
    sys.stdin.read()
    return work.pack(hot)


class _Work:
    """One task."""

    def __init__(self, task: Task, store: Store) -> None:
        self._task = task
        self._store = store
        self._root = Path(f"/proc/self/fd/{task.mount}")
        content = store.read(f"{task.folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        self._layout = decode(content).layout
        self._image = _files_of(Path(task.image))
        self._plan = Plan()

    def look(self) -> list[HotFile]:
        """The files that starts touch, in order; none where packing again would save little."""
        task, layout = self._task, self._layout
        self._plan, _ = plan_of(
            self._store,
            os.getuid(),
            task.job_class,
            task.blob,
            Shape(layout.blocks, layout.block_bytes),
            any_class=False,
        )
        if not self._plan.full_starts:
            return []  # on a node that was warm, less was seen than is read
        hot = hot_files(self._image, self._plan, layout, self._is_tail_touched)
        if not hot:
            return []
        self._now = Start(blocks_bytes(layout, self._plan.blocks), self._image.compression)
        self._scene = Scene(
            content_bytes=content_bytes(self._image, hot),
            beside_bytes=task.beside_bytes,
            worked_s=max(self._plan.times_ms, default=0) / 1000,
            link_bytes_per_s=task.link_bytes_per_s,
            measured=measure(self._samples(hot)) if task.link_bytes_per_s else {},
        )
        hot_bytes = sum(extent.size_bytes for extent in hot_extents(self._image, hot))
        new = best(self._now, hot_bytes, self._scene)
        if new is None:
            return []
        self._compression = new.compression
        return hot

    def _is_tail_touched(self, path: str, file: StoredFile) -> bool:
        try:
            return is_tail_in_memory(self._root / path, file.size_bytes, self._image.block_bytes)
        except OSError:
            return False

    def pack(self, hot: list[HotFile]) -> str:
        """Pack it anew; what came of it. One process of the cluster does, if several begin."""
        task = self._task
        said, _ = make_once(
            self._store,
            os.getuid(),
            f"repack {task.blob}",
            look=lambda: None if self._names() else "another one took its place",
            make=lambda: self._made(hot),
            on_wait=lambda holder: None,
        )
        return said

    def _names(self) -> list[Name]:
        """The names that stand for the blob now, in no particular order."""
        records, _ = list_names(self._store, os.getuid())
        return [each for each in records if (each.folder, each.blob) == (self._task.folder, self._task.blob)]

    def _made(self, hot: list[HotFile]) -> str:
        with scratch.folder("repack", Path(tempfile.gettempdir()), hint=_SCRATCH_HINT) as work:
            file = work / "packed.sqsh"
            packing = AgentPacking(
                configuration.load(None).agent.socket, str(self._task.job), warn=lambda message: None
            )
            written = self._packed(file, hot, packing)
            layout = Layout(file.stat().st_size, SQUASHFS_BLOCK_BYTES)
            tables = head_and_tables(FileReader(file), str(file))
            touches = plan_touches(hot_extents(_files_of(file), hot), layout, tables)
            new_bytes = blocks_bytes(layout, (block for block, _ in touches))
            if not is_worth_it(self._now, Start(new_bytes, self._compression), self._scene):
                return f"lies as starts touch it: {format_bytes(new_bytes)} would be fetched in another order"
            beside = self._listed(written)
            scratch.mark_finished(file)
            blob, folder = BlobWriter(self._store, beside=beside).store_unnamed(file, self._task.kind)
        self._publish(blob, folder, packing.signature(blob), touches)
        now = format_bytes(self._now.fetched_bytes)
        how = f"packed anew in the order of touch, with {self._compression}"
        return f"{how}: a start fetches {format_bytes(new_bytes)}, not {now}"

    def _packed(self, file: Path, hot: list[HotFile], packing: AgentPacking) -> dict[str, FileState]:
        """Make the squashfs; gives what it holds. By the agent if it made the first one too."""
        tree = in_order_of_touch(survey(self._root), hot)
        written: dict[str, FileState] = {}

        def write(fd: int) -> None:
            with open(fd, "wb", closefd=False) as out:
                special = self._task.kind == "image"
                written.update(write_tar(out, self._root, tree, special=special))

        if packing.pack_stream(write, file, kind=self._task.kind, compression=self._compression):
            return written
        if any(name.signature for name in self._names()):
            raise BootseerError("the agent does not pack it, and the kernel would not mount another's")
        squash(write, file, self._compression)
        return written

    def _samples(self, hot: list[HotFile]) -> list[bytes]:
        """Some blocks of what starts touch, evenly chosen."""
        blocks = [(file.path, number) for file in hot for number in file.blocks]
        samples = []
        for path, number in blocks[:: max(1, len(blocks) // _SAMPLES)]:
            with (self._root / path).open("rb") as stream:
                stream.seek(number * self._image.block_bytes)
                samples.append(stream.read(self._image.block_bytes))
        return samples

    def _listed(self, written: dict[str, FileState]) -> dict[str, bytes]:
        """The objects beside an environment's blob. Raises BootseerError when other files were packed."""
        if self._task.kind != "environment":
            return {}
        content = self._store.read(f"{self._task.folder}/{FILES}", limit_bytes=FILES_LIMIT_BYTES)
        before = decode_files(content)
        if _contents(before) != _contents(written):
            raise BootseerError("what was packed is not what the snapshot held")
        return {FILES: encode_files(before)}

    def _publish(self, blob: str, folder: str, signature: str, touches: tuple[tuple[int, int], ...]) -> None:
        """Let the names stand for the new blob, of which the next start has a plan already."""
        task, uid = self._task, os.getuid()
        layout = decode(self._store.read(f"{folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)).layout
        trace = Trace(
            blob=blob,
            node=task.node,
            job=task.job,
            restart=task.restart,
            made_ns=time.time_ns(),
            blocks=layout.blocks,
            block_bytes=layout.block_bytes,
            partial=False,
            ended="mark",
            touches=touches,
        )
        keep_trace(self._store, uid, task.job_class, blob, trace.encode())
        for name in self._names():  # one that was saved meanwhile keeps what it has
            write_name(self._store, uid, replace(name, blob=blob, folder=folder, signature=signature))


def _files_of(path: Path) -> Squashfs:
    reader = FileReader(path)
    try:
        return read_files(reader, str(path))
    finally:
        reader.close()


def _contents(files: dict[str, FileState]) -> dict[str, tuple[int, int, str, bytes]]:
    return {path: (each.mode, each.size_bytes, each.link, each.digest) for path, each in files.items()}


if __name__ == "__main__":
    exit_on(signal.SIGTERM, signal.SIGHUP)
    try:
        print(main(Task(**json.loads(sys.argv[1]))))
    except (BootseerError, OSError) as _error:
        sys.exit(f"bootseer: {_error}")
