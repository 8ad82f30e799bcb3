"""Saving an environment: its folder as a squashfs blob in the store, byte-compiled, with its mtimes.

Runs as the environment's user. Byte code is worth more than the mount (`import torch` 8.4 s without, 2.6 s
with it), so what is not compiled yet is compiled aside; the original is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from bootseer_slurm import scratch
from bootseer_slurm.blob.lease import Lease
from bootseer_slurm.blob.names import Name, read_name
from bootseer_slurm.blob.writer import store_file
from bootseer_slurm.env.key import fingerprint_of, key_of, package_folders, stored_name
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError
from bootseer_slurm.store import Store

# Of 3.8 GB of packages zstd at level 3 makes 1.05 GB, lz4 1.50 GB in 7 s, lz4 at its slowest 1.21 GB in two
# minutes (2 cores); imports from the kernel's mount of these take 2.72, 2.39 and 2.25 s, from ext4 2.39 s. A
# snapshot is made once, and nobody waits for it; the link goes on while the job starts.
_MKSQUASHFS = (
    "-comp",
    "lz4",
    "-Xhc",
    "-noappend",
    "-quiet",
    "-no-progress",
    "-no-xattrs",
    "-exit-on-error",
    "-tar",
    "-root-mode",
    "755",
)
_COMPILE_TIMEOUT_S = 1800
_PLACE = "TMPDIR must name a folder with room for the environment"
_KEY_LIMIT_BYTES = 32 * 2**10  # of what is kept to tell what changed


def save(
    store: Store,
    folder: Path,
    *,
    image: str = "",
    packing: Packing | None = None,
    stage: Callable[[str, int | None], None] = lambda text, size_bytes: None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Name, bool]:
    """Save the environment in `folder`; gives its name in the store, and whether it was saved now.

    image: the digest of the image that it is for, "" without one. packing: who else may pack it, so that the
    kernel may mount it. stage: told what is being done, and of how
    many bytes if known. progress: told the bytes just stored. Of several processes in the cluster that save
    it at once, one does; what is in the store already is not saved again.
    Raises BootseerError when `folder` is no environment, cannot be read, changed meanwhile, or does not pack.
    """
    real = folder.resolve(strict=True)
    name = stored_name(str(real), image)
    home = os.path.expanduser("~")
    key = key_of(str(real), home=home, image=image)
    fingerprint = fingerprint_of(key)

    def found() -> Name | None:
        try:
            record = read_name(store, os.getuid(), name)
        except IntegrityError:
            return None  # it is written anew
        return record if record and record.fingerprint == fingerprint and store_has(record) else None

    def store_has(record: Name) -> bool:
        return "manifest" in store.list(record.folder)

    lease = Lease(store, os.getuid(), name)
    if not lease.acquire(
        done=lambda: found() is not None, on_wait=lambda holder: stage(f"waiting for {holder}", None)
    ):
        record = found()
        if record is None:
            raise BootseerError(f"{folder}: its snapshot was there a moment ago and is not there now")
        return record, False
    with lease, scratch.folder("env", Path(tempfile.gettempdir()), hint=_PLACE) as place:
        if record := found():  # between the last look and the lease
            return record, False
        before = _survey(real)
        image_file = _packed(real, place, before, packing, stage)
        unchanged = fingerprint_of(key_of(str(real), home=home, image=image)) == fingerprint
        # A run that starts meanwhile leaves byte code.
        if not unchanged or _without_byte_code(_survey(real)) != _without_byte_code(before):
            raise BootseerError(
                f"{folder}: was changed while it was saved", hint="save it again when it is complete"
            )
        stage("storing", image_file.stat().st_size)
        os.utime(image_file, (0, 0))  # its own time says nothing, and a young file would be waited for
        record = store_file(
            store,
            image_file,
            kind="environment",
            name=name,
            fingerprint=fingerprint,
            progress=progress,
            sign=packing.signature if packing else lambda blob: "",
            key=_shortened(key),
        )
    return record, True


class Packing(Protocol):
    """Who packs instead of this process (image.packing.AgentPacking)."""

    def pack_stream(self, write: Callable[[int], None], target: Path, *, kind: str) -> bool:
        """Make the squashfs `target` of a tar, which `write` writes to a descriptor; False: it does not."""

    def signature(self, blob: str) -> str:
        """The signature of what was packed, when this is its blob's id; "" without one."""


class _Entry(NamedTuple):
    """What must stay the same of a file while it is read. special: neither file nor folder nor link."""

    special: bool
    mode: int
    size_bytes: int
    mtime_ns: int


def _survey(root: Path) -> dict[str, _Entry]:
    """All that lies in a folder, by path within it. Raises InputError that names what cannot be read."""
    found = {}

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders.sort()
        for name in (*folders, *sorted(files)):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            plain = stat.S_ISREG(status.st_mode)
            if plain and not os.access(path, os.R_OK):
                raise InputError(f"{path}: cannot be read", hint="a snapshot would lack this file")
            special = not (plain or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode))
            # A folder's own size and time change with what lies in it.
            size_time = (status.st_size, status.st_mtime_ns) if plain else (0, 0)
            found[os.path.relpath(path, root)] = _Entry(special, status.st_mode, *size_time)
    return found


def _without_byte_code(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    return {path: entry for path, entry in entries.items() if "__pycache__" not in path.split("/")}


def _packed(
    real: Path,
    place: Path,
    entries: dict[str, _Entry],
    packing: Packing | None,
    stage: Callable[[str, int | None], None],
) -> Path:
    """The environment as a squashfs file in the folder `place`; entries: what `_survey` found.

    Without sockets, pipes and device nodes, which no environment needs. mksquashfs gets it as a tar, to which
    byte code is added that was compiled aside: nothing else is copied, and the original stays as it is.
    """
    compiled = place / "compiled"
    if _lacks_byte_code(real):
        stage("compiling", None)
        _compile(real, compiled)
    stage("packing", None)
    file = place / "snapshot.sqsh"

    def write(fd: int) -> None:
        with open(fd, "wb", closefd=False) as out:
            _write_tar(out, real, compiled, entries)

    if packing is not None and packing.pack_stream(write, file, kind="environment"):
        return file
    with (place / "said").open("w+", errors="replace") as said:
        with subprocess.Popen(
            ["mksquashfs", "-", str(file), *_MKSQUASHFS], stdin=subprocess.PIPE, stdout=said, stderr=said
        ) as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has failed, and says why
                write(process.stdin.fileno())
                process.stdin.close()
        said.seek(0)
        lines = said.read().strip().splitlines() or ["no message"]
    if process.returncode:
        raise BootseerError(f"{real}: mksquashfs failed: {lines[-1]}", hint=_PLACE)
    return file


def _write_tar(out: IO[bytes], real: Path, compiled: Path, entries: dict[str, _Entry]) -> None:
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for path, entry in entries.items():
            if not entry.special:
                _add(tar, real / path, path)
        for path, made in _byte_code(real, compiled):
            _add(tar, made, path)


def _add(tar: tarfile.TarFile, file: Path, path: str) -> None:
    """A file, folder or link under this path, with what of it is the same on every node."""
    info = tar.gettarinfo(file, arcname=path)
    info.mtime, info.uname, info.gname = int(info.mtime), "", ""
    if not info.isreg():
        tar.addfile(info)
        return
    with file.open("rb") as content:
        tar.addfile(info, content)


def _byte_code(real: Path, compiled: Path) -> Iterator[tuple[str, Path]]:
    """What was compiled aside, and its place beside the sources, where there is none of that name."""
    made = compiled / real.relative_to("/")
    for folder, _, files in os.walk(made):
        cache = os.path.join(os.path.relpath(folder, made), "__pycache__")
        for name in sorted(files):
            path = os.path.normpath(os.path.join(cache, name))
            if not (real / path).exists():
                yield path, Path(folder, name)


def _shortened(key: dict[str, str]) -> dict[str, str]:
    """A key that a name's record has room for: of the longest parts the first line only."""
    short = dict(key)
    for part in sorted(short, key=lambda part: -len(short[part])):
        if sum(map(len, short.values())) <= _KEY_LIMIT_BYTES:
            break
        short[part] = short[part].partition("\n")[0]
    return short


def _lacks_byte_code(root: Path) -> bool:
    """Whether any module of a package folder is not compiled."""
    for packages in package_folders(str(root)):
        for folder, _, files in os.walk(root / packages):
            sources = [name for name in files if name.endswith(".py")]
            if sources:
                cache = Path(folder) / "__pycache__"
                compiled = {name.split(".", 1)[0] for name in os.listdir(cache)} if cache.is_dir() else set()
                if any(name.split(".", 1)[0] not in compiled for name in sources):
                    return True
    return False


def _compile(real: Path, compiled: Path) -> None:
    """Compile with the environment's own interpreter; one that does not run here leaves it as it is."""
    python = real / "bin" / "python"
    folders = [str(real / packages) for packages in package_folders(str(real))]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = str(compiled)
    try:
        # Files that no Python can compile (templates, Python 2 tests) make it exit 1; the rest is compiled.
        subprocess.run(
            [str(python), "-m", "compileall", "-q", *folders],
            capture_output=True,
            check=False,
            env=environ,
            timeout=_COMPILE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
