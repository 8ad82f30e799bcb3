"""Finding the newest complete checkpoint in a folder of any store.

That one is complete is told by what its writer leaves last:

    Megatron-LM     latest_checkpointed_iteration.txt beside the checkpoints says N of iter_<N>, or "release"
    DeepSpeed       latest beside them names the folder, such as global_step<N>
    torch DCP       .metadata in the folder, written when all ranks are done
    Transformers    trainer_state.json in checkpoint-<N>
    striped files   their manifest
    anything else   nothing in it was changed for a minute, and nothing has the name of a part

One that is being written, or was left half, is passed over, whatever names it. To take another one than the
job loads costs time at most: it never sees other bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from bootseer_slurm.checkpoint.striped import MANIFEST, split
from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import Store, StoreEntry, open_store

_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
_TRACKER_LIMIT_BYTES = 256
_STEP = re.compile(r"(?:.*?[^0-9])?([0-9]+)(?:\.[A-Za-z][A-Za-z0-9_.]*)?")  # the number in step_9000.pt
_PART = re.compile(r".*\.(tmp|part|partial|incomplete|lock)|\..*\.[0-9a-f]{12}")
_NUMBER = re.compile(r"[0-9]")
_SAYS_STEP = re.compile(r"step|iter|epoch|checkpoint|ckpt|^[0-9]+(\.[A-Za-z].*)?$", re.IGNORECASE)
_SHARD = re.compile(r"-of-|rank|consolidated")  # a part of one checkpoint, by number
# What lies beside checkpoints.
_NONE = (".out", ".err", ".log", ".json", ".txt", ".yaml", ".yml", ".csv", ".sh", ".py")
_LAST = (".metadata", "trainer_state.json")
_QUIET_S = 60.0
_DEPTH = 3


@dataclass(frozen=True)
class Checkpoint:
    """path and files: below the folder that `split` gives of what was asked for. why: it is complete.

    striped: those of the files that are.
    """

    path: str
    files: tuple[str, ...]
    striped: frozenset[str]
    why: str


def newest(uri: str, *, now_s: float | None = None) -> Checkpoint:
    """The newest complete checkpoint in a folder, or the one that is named.

    uri: a URI or absolute path of a file, of a checkpoint, of a folder of checkpoints, or of a pattern with
    "*" in its last part. Raises NotFound when there is none that is complete, StoreError.
    """
    now_s = time.time() if now_s is None else now_s
    folder, name = split(uri)
    store = open_store(folder, plain=True)
    beside = store.scan("")
    if "*" in name:
        pattern = re.compile(".*".join(map(re.escape, name.split("*"))))
        found = _newest_of(store, "", [each for each in beside if pattern.fullmatch(each.name)], now_s)
    else:
        entry = next((each for each in beside if each.name == name), None)
        if entry is None:
            raise NotFound(f"{uri}: no such checkpoint")
        inside = store.scan(name) if entry.is_folder else []
        if _holds_checkpoints(inside):
            found = _newest_of(store, f"{name}/", inside, now_s)
        else:
            found = _looked_at(store, name, entry, now_s if entry.is_folder else None)
    if found is None:
        raise NotFound(f"{uri}: no complete checkpoint")
    return found


class NamedFile(NamedTuple):
    """A file of a checkpoint: its path or URI, and its path within the checkpoint, "" of one that is a file.

    role: the same for the file that has its part in the checkpoint of any other step.
    """

    path: str
    role: str
    within: str


def named_files(name: str, *, newest_step: bool = False) -> tuple[list[NamedFile], str]:
    """The files that a name stands for, and why if they had to be found; the name itself of a file.

    name: as of `newest`; a path may be a link. newest_step: instead of the checkpoint that is named, the
    newest one that is called alike. Raises NotFound or StoreError.
    """
    if newest_step:
        with contextlib.suppress(NotFound):
            return _of_newest_step(name.rstrip("/"))
    role = _without_step(name)
    path = os.path.realpath(name) if "://" not in name else ""
    if path and not (os.path.isdir(path) or "*" in os.path.basename(path)):
        return [NamedFile(name, role, "")], ""
    if path and os.path.exists(f"{path}/{MANIFEST}"):
        return [NamedFile(name, role, "")], ""
    found = newest(path or name)
    folder = (os.path.dirname(path) if path else split(name)[0]).rstrip("/")
    files = []
    for file in found.files:
        is_striped = path and file in found.striped
        full = f"file://{quote(f'{folder}/{file}')}" if is_striped else f"{folder}/{file}"
        within = file.removeprefix(found.path)
        files.append(NamedFile(full, role + within, within.lstrip("/")))
    return files, f"{found.path}: {found.why}"


def _of_newest_step(name: str) -> tuple[list[NamedFile], str]:
    """As `named_files`, of the newest checkpoint that is called as this one but for the step.

    name: of a checkpoint, or of a file in the folder of one. Raises NotFound or StoreError.
    """
    folder, _, last = name.rpartition("/")
    if _SAYS_STEP.search(last):
        return named_files(_without_step(name))
    if not _SAYS_STEP.search(folder.rpartition("/")[2]):
        raise NotFound(f"{name}: names no step")
    files, message = named_files(_without_step(folder))
    if not (found := [file._replace(within="") for file in files if file.within == last]):
        raise NotFound(f"{name}: the newest step has no such file")
    return found, message


def share_of(files: list[NamedFile], limit: int, *, rank: int, nodes: int) -> list[NamedFile]:
    """Of files as `named_files` gives them at most `limit`, those that a node most likely reads.

    rank: of the node, of so many. What has no number in its name is for all; of the rest, which belongs to
    processes in order (__7_0.distcp, mp_rank_07), each node has its share, and what comes behind it.
    """
    if len(files) <= limit:
        return files
    common = [each for each in files if not _NUMBER.search(each.within)][:limit]
    numbered = sorted(
        (each for each in files if _NUMBER.search(each.within)), key=lambda each: _natural(each.within)
    )
    left = limit - len(common)
    first = max(0, min(len(numbered) * rank // nodes, len(numbered) - left))
    return common + numbered[first : first + left]


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts 10 behind 9."""
    return [(text, int(digits)) for text, digits in re.findall(r"([^0-9]*)([0-9]{1,18}|$)", name) if digits]


def _holds_checkpoints(inside: list[StoreEntry]) -> bool:
    """Whether what lies in a folder are checkpoints, and not the files of one."""
    names = {entry.name for entry in inside}
    if names & {MANIFEST, *_LAST} or any(name.endswith(".distcp") for name in names):
        return False
    return bool(names & set(_TRACKERS)) or any(_step_of(name) is not None for name in names)


def _step_of(name: str) -> int | None:
    """The step that a checkpoint is of; None of what is none."""
    match = _step_in(name)
    return int(match[1]) if match else None


def _step_in(name: str) -> re.Match[str] | None:
    is_one = not (_SHARD.search(name) or name.endswith(_NONE) or name.startswith("."))
    return _STEP.fullmatch(name) if is_one else None


def _without_step(path: str) -> str:
    """The pattern that the checkpoints of all steps match, or a file in their folders."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    if match := _step_in(name):
        return f"{folder}{slash}{name[: match.start(1)]}*{name[match.end(1) :]}"
    above = folder.rpartition("/")[2]
    if _SAYS_STEP.search(above) and _step_in(above):
        folder = _without_step(folder)
    return f"{folder}{slash}{name}"


def _newest_of(store: Store, prefix: str, entries: Iterable[StoreEntry], now_s: float) -> Checkpoint | None:
    by_name = {entry.name: entry for entry in entries}
    for tracker in _TRACKERS:
        name = _named(store, f"{prefix}{tracker}") if tracker in by_name else ""
        if name in by_name and (found := _looked_at(store, prefix + name, by_name[name], None)):
            return found
    steps = [(step, name) for name in by_name if (step := _step_of(name)) is not None]
    for _, name in sorted(steps, reverse=True):
        if found := _looked_at(store, prefix + name, by_name[name], now_s):
            return found
    return None


def _named(store: Store, tracker: str) -> str:
    """The folder that a tracker file names."""
    try:
        text = store.read(tracker, limit_bytes=_TRACKER_LIMIT_BYTES).decode(errors="replace").strip()
    except (NotFound, StoreError):
        return ""
    return f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text


def _looked_at(store: Store, path: str, entry: StoreEntry, now_s: float | None) -> Checkpoint | None:
    """A file or folder as a checkpoint; None when it is not complete. now_s: None: it may still change."""
    files = list(_files_of(store, path, entry))
    if not files or any(_PART.fullmatch(file.name) for _, file in files):
        return None
    names = {name.removeprefix(f"{path}/") for name, _ in files}

    def complete(why: str) -> Checkpoint:
        striped = frozenset(name for name, file in files if file.is_folder)
        return Checkpoint(path, tuple(name for name, _ in files), striped, why)

    for last in _LAST:
        if last in names:
            return complete(f"its {last} is there")
    if any(name.endswith(".distcp") for name in names) or entry.name.startswith("checkpoint-"):
        return None
    if len(files) == 1 and files[0][1].is_folder:
        return complete("its manifest is there")
    newest_s = max(file.changed_s for _, file in files)
    if now_s is not None and now_s - newest_s < _QUIET_S:
        return None
    return complete("nothing in it changes")


def _files_of(store: Store, path: str, entry: StoreEntry, depth: int = 0) -> Iterator[tuple[str, StoreEntry]]:
    """The files of a checkpoint, by path; a striped one is a folder."""
    if not entry.is_folder:
        yield path, entry
        return
    inside = store.scan(path)
    if any(each.name == MANIFEST for each in inside):
        yield path, entry
    elif depth < _DEPTH:
        for each in sorted(inside):
            yield from _files_of(store, f"{path}/{each.name}", each, depth + 1)
