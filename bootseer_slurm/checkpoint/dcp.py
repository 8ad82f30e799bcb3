"""Reading what torch.distributed.checkpoint wrote, in parallel: a storage reader for its `load`.

    dcp.load(state_dict, storage_reader=ParallelReader("hdfs://nn:8020/ckpt/step_9000"))

For folders of FileSystemWriter or FsspecWriter, whose files may be striped or lie as they are. Their format
is torch's: an item is what torch.save makes of one tensor, a zip archive whose members are not compressed. A
large tensor is read straight to its place, where that is in the CPU's memory, contiguous and of the same
type; of one that is cut along its first dimension, only the part that is wanted. Small ones are read
together. What is of no such kind is left to torch's reader, over files of ours. Not for folders of
safetensors, which are read as files.

The only module that imports torch. Threads: `_FILES` files at a time, `_BATCHES` batches of each; the
planner is called by one at a time. A batch takes `_BATCH_BYTES` of memory beside the tensors, or one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import mmap
import os
import pickle
import struct
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType
from torch.storage import _get_dtype_from_pickle_storage_type

from bootseer_slurm.checkpoint.file import STREAMS, ParallelFile

_FILES = 4
_BATCHES = 2
_BATCH_BYTES = 128 * 2**20
# Up to this an item is read whole: with its ends alone half of it would be read, and then all of it.
_WHOLE_BYTES = 8 * 2**20
_END_BYTES = 4096  # of a larger one's archive: the pickle in front, the directory behind
_MEMBER = struct.Struct("<26xHH")  # a member's header: the lengths of its name and of what follows that


class ParallelReader(FileSystemReader):  # type: ignore[misc]  # torch is not there where types are checked
    """Reads a checkpoint in a folder. Not thread-safe, as torch's own is not."""

    def __init__(self, path: str | os.PathLike[str], *, streams: int = STREAMS) -> None:
        """path: a path, or a URI: file, hdfs, s3, or "bootseer+" and one of these. streams: reads at once.

        Its methods raise BootseerError where something cannot be read.
        """
        super().__init__("")
        self.fs = _Files()
        self.path = self.fs.init_path(path)
        self._streams = streams

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Read the items of a plan (see StorageReader)."""
        files: dict[str, list[Any]] = {}
        rest = []
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            if getattr(info, "transform_descriptors", None):
                rest.append(item)  # it was compressed, say
            else:
                files.setdefault(info.relative_path, []).append(item)
        streams = max(1, self._streams // max(1, min(_FILES, len(files))))
        calls = _Planner(planner)
        with ThreadPoolExecutor(_FILES, "bootseer-dcp") as pool:
            for future in [pool.submit(self._read_file, *each, calls, streams) for each in files.items()]:
                rest += future.result()
        return super().read_data(dataclasses.replace(plan, items=rest), planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _Files.validate_checkpoint_id(checkpoint_id)

    def _read_file(self, name: str, items: list[Any], planner: _Planner, streams: int) -> list[Any]:
        """Read what lies in one file; gives what torch must read itself."""
        infos = {item.storage_index: self.storage_data[item.storage_index] for item in items}
        works: list[_Whole | _Straight] = []
        left = []
        with ParallelFile(self.fs.concat_path(self.path, name), streams=streams) as file:
            tensors = (infos[item.storage_index] for item in items if item.type != LoadItemType.BYTE_IO)
            saved = _look(file, [info for info in tensors if info.length > _WHOLE_BYTES])
            for item in sorted(items, key=lambda item: infos[item.storage_index].offset):
                info = infos[item.storage_index]
                tensor = saved.get(info.offset)
                if item.type == LoadItemType.BYTE_IO or info.length <= _WHOLE_BYTES:
                    works.append(_Whole(item, info, planner))
                elif tensor and (begin := tensor.begin_of(item.storage_offsets, item.lengths)) is not None:
                    works.append(_Straight(item, info.offset + begin, tensor.dtype, planner))
                else:
                    left.append(item)
            with ThreadPoolExecutor(_BATCHES, "bootseer-dcp-file") as pool:
                for future in [pool.submit(_read_batch, file, each) for each in _batches(works)]:
                    future.result()
        return left


def _read_batch(file: ParallelFile, works: list[_Whole | _Straight]) -> None:
    file.read_ranges((work.offset, work.buffer()) for work in works)
    for work in works:
        work.end()


def _batches(works: list[_Whole | _Straight]) -> Iterator[list[_Whole | _Straight]]:
    batch: list[_Whole | _Straight] = []
    batch_bytes = 0
    for work in works:
        if batch and batch_bytes + work.memory_bytes > _BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(work)
        batch_bytes += work.memory_bytes
    yield batch


class _Planner:
    """A LoadPlanner, which is asked by one thread at a time."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner
        self._lock = threading.Lock()

    def target(self, item: Any) -> Any:
        """The tensor to fill. Raises ValueError where it is of another shape than what is read."""
        with self._lock:
            target = self._planner.resolve_tensor(item).detach()
        if target.size() != torch.Size(item.lengths):
            raise ValueError(f"{item.dest_index}: {tuple(item.lengths)} is read to {tuple(target.size())}")
        return target

    def commit(self, item: Any, target: Any) -> None:
        with self._lock:
            self._planner.commit_tensor(item, target)

    def load(self, item: Any, content: io.BytesIO) -> None:
        with self._lock:
            self._planner.load_bytes(item, content)


class _Whole:
    """An item that is read whole and then understood."""

    def __init__(self, item: Any, info: Any, planner: _Planner) -> None:
        self.offset = info.offset
        self.memory_bytes = info.length
        self._item = item
        self._planner = planner
        self._content = io.BytesIO()

    def buffer(self) -> memoryview:
        self._content = io.BytesIO(bytes(self.memory_bytes))
        return self._content.getbuffer()

    def end(self) -> None:
        item, content = self._item, self._content
        self._content = io.BytesIO()
        if item.type == LoadItemType.BYTE_IO:
            self._planner.load(item, content)
            return
        tensor = torch.load(content, map_location="cpu", weights_only=True)
        target = self._planner.target(item)
        target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
        self._planner.commit(item, target)


class _Straight:
    """A tensor, or a part of one, whose bytes lie one after the other; read to where it goes if it can be."""

    def __init__(self, item: Any, offset: int, dtype: Any, planner: _Planner) -> None:
        self.offset = offset
        self._item = item
        self._dtype = dtype
        self._planner = planner
        self._target = target = planner.target(item)
        plain = type(target) is torch.Tensor and target.device.type == "cpu" and target.is_contiguous()
        self._direct = plain and target.dtype == dtype and not (target.is_conj() or target.is_neg())
        self.memory_bytes = 0 if self._direct else target.numel() * dtype.itemsize

    def buffer(self) -> memoryview:
        size = self._target.size()
        self._read = self._target if self._direct else torch.empty(size, dtype=self._dtype)
        return memoryview(self._read.reshape(-1).view(torch.uint8).numpy())

    def end(self) -> None:
        if not self._direct:
            self._target.copy_(self._read)
        del self._read
        self._planner.commit(self._item, self._target)


@dataclass(frozen=True)
class _Saved:
    """A tensor in an archive of torch.save. offset: of its first byte in the archive."""

    offset: int
    dtype: Any
    size: tuple[int, ...]

    def begin_of(self, offsets: Iterable[int], lengths: Iterable[int]) -> int | None:
        """Where a part of it begins in the archive; None if its bytes do not lie one after the other."""
        begin, stride, cut = 0, 1, False
        for size, offset, length in reversed(list(zip(self.size, offsets, lengths, strict=True))):
            if (cut and length != 1) or not 0 <= offset <= size - length:
                return None
            cut = cut or length != size
            begin += offset * stride
            stride *= size
        return self.offset + begin * int(self.dtype.itemsize)


def _look(file: ParallelFile, infos: list[Any]) -> dict[int, _Saved | None]:
    """How tensors are saved, by their offset in the file; None where torch alone can tell."""
    ends = {info.offset: (info, bytearray(_END_BYTES), bytearray(_END_BYTES)) for info in infos}
    fronts = [(info.offset, front) for info, front, _ in ends.values()]
    backs = [(info.offset + info.length - _END_BYTES, back) for info, _, back in ends.values()]
    file.read_ranges([*fronts, *backs])
    return {offset: _saved(info.length, front, back) for offset, (info, front, back) in ends.items()}


def _saved(length: int, front: bytearray, back: bytearray) -> _Saved | None:
    """The tensor in an archive of which only both ends are known."""
    try:
        with _Sparse(-1, length) as content:
            content[: len(front)], content[length - len(back) :] = front, back
            with zipfile.ZipFile(content) as archive:  # type: ignore[call-overload]  # it is file enough
                return _saved_in(archive, front)
    except Exception:  # whatever it is that was not understood, torch has the last word on it
        return None


class _Sparse(mmap.mmap):
    """A file in memory, of which what nobody wrote takes none."""

    def seekable(self) -> bool:
        return True


def _saved_in(archive: zipfile.ZipFile, front: bytearray) -> _Saved | None:
    (root,) = {name.partition("/")[0] for name in archive.namelist()}
    if archive.read(f"{root}/byteorder").decode() != sys.byteorder:
        return None
    tensor = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
    member = archive.getinfo(f"{root}/data/{tensor.storage.key}")
    name_bytes, extra_bytes = _MEMBER.unpack_from(front, member.header_offset)
    begin = member.header_offset + _MEMBER.size + name_bytes + extra_bytes
    dtype = tensor.storage.dtype
    strides = [math.prod(tensor.size[axis + 1 :]) for axis in range(len(tensor.size))]
    plain = not tensor.offset and list(tensor.strides) == strides and not member.compress_type
    if not plain or member.file_size != math.prod(tensor.size) * dtype.itemsize:
        return None
    return _Saved(begin, dtype, tuple(tensor.size))


@dataclass
class _Storage:
    kind: str
    dtype: Any
    key: str
    device: str
    elements: int


@dataclass
class _Tensor:
    """The arguments of torch._utils._rebuild_tensor_v2 for a tensor without anything special."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: OrderedDict[Any, Any]


class _Unpickler(pickle.Unpickler):
    """Makes a _Tensor of a saved tensor, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return _get_dtype_from_pickle_storage_type(name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(*pid)


class _Files(FileSystem):  # type: ignore[misc]
    """Where torch's reader finds files: on any store."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.BufferedIOBase]:
        if mode != "rb":
            raise io.UnsupportedOperation(f"{path}: mode {mode!r}: it is for reading only")
        with io.BufferedReader(ParallelFile(str(path)), 2**20) as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        parts = urlsplit(str(path), allow_fragments=False)
        if not parts.scheme:
            return f"{path}/{suffix}"
        return urlunsplit(parts._replace(path=f"{parts.path}/{suffix}"))  # before what follows a "?"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        uri = str(path).rstrip("/").removeprefix("bootseer+")
        return uri if "://" in uri else os.path.abspath(uri)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        scheme, separator, _ = str(checkpoint_id).removeprefix("bootseer+").partition("://")
        return not separator or scheme in ("file", "hdfs", "s3")
