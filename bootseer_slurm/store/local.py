"""Stores in folders that every node mounts (file://), and the reading of any file in ranges.

Plain system calls: parallel preads of a file are as fast as the file system lets them be, and pyarrow (0.3 s
to import) is then never loaded on the way of a starting job.

In users/ anybody can make a folder with another's uid as its name. So the folder of a uid is used only when
it is that user's and nobody else can write to it; root puts another's aside (`give_folder`). What root puts
into the store is for all: its folders are open, and a user's names are looked for among root's too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.mounts import mount_of
from bootseer_slurm.store.base import Store, StoreEntry

# File systems whose times are the server's. Lustre, CephFS and others have those of the client that writes.
_SERVER_TIMES = ("nfs", "nfs4", "fuse.sshfs")
_DIRECT_ALIGN_BYTES = 4096  # what no file system's O_DIRECT asks more than


class FileReader:
    """A file that is read in ranges."""

    def __init__(self, path: Path | str, *, bulk: bool = False) -> None:
        """Open for reading. bulk: see Store.open.

        Raises NotFound or StoreError, the latter also when it is no regular file.
        """
        try:
            # O_NONBLOCK: a FIFO under an innocent name must not hold the reader for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{path}: no such file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise StoreError(f"{path}: not a regular file")
        self.status = status
        self.size_bytes = status.st_size
        self._path = path
        self._direct_fd = _open_direct(path, status) if bulk else -1

    def read_into(self, offset: int, view: memoryview) -> int:
        if self._direct_fd >= 0 and not (offset | len(view)) % _DIRECT_ALIGN_BYTES:
            try:
                if os.preadv(self._direct_fd, [view], offset) == len(view):
                    return len(view)
            except OSError:
                pass  # another alignment is wanted, or the file cannot be read: the read below tells
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be read: {error.strerror}") from error
        return done

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)


def _open_direct(path: Path | str, status: os.stat_result) -> int:
    """The file of this status past the page cache, or -1 where its file system does not have that."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    except OSError:
        return -1
    again = os.fstat(fd)
    if (again.st_dev, again.st_ino) != (status.st_dev, status.st_ino):
        os.close(fd)
        return -1
    return fd


class FileStore(Store):  # size: the interface's methods
    """A store in a folder that every node mounts."""

    def __init__(self, root: Path, *, plain: bool = False) -> None:
        self._root = root
        self._plain = plain

    def open(self, path: str, *, bulk: bool = False) -> FileReader:
        return FileReader(self._path(path), bulk=bulk)

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[Any]:
        target = self._root / path
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            self._make_folder(target.parent)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(target)
        except OSError as error:
            raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Folders below the store's root are the user's own: made 0700; what root pushes is for all."""
        if folder == self._root:
            return
        if not folder.is_dir():
            if not self._root.is_dir():
                hint = None if self._plain else "an admin makes it with `bootseer store init`"
                raise StoreError(f"{self._root}: no such folder", hint=hint)
            self._make_folder(folder.parent)
            for_all = os.geteuid() == 0 and folder.is_relative_to(self._root / "users" / "0")
            folder.mkdir(mode=0o777 if self._plain else 0o755 if for_all else 0o700, exist_ok=True)
        self._check_owner(folder)  # only now, for another user may have been faster

    def _path(self, path: str) -> Path:
        target = self._root / path
        self._check_owner(target)
        return target

    def _check_owner(self, target: Path) -> None:
        """See that what is used as a user's is no other's; what is missing is nobody's yet."""
        parts = target.relative_to(self._root).parts
        if self._plain or len(parts) < 2 or parts[0] != "users" or not parts[1].isdecimal():
            return
        if os.geteuid() == 0 and parts[1] != "0":  # root looks at whatever a user has there
            return
        folder = self._root / "users" / parts[1]
        try:
            status = os.lstat(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"{folder}: cannot be looked at: {error.strerror}") from error
        if status.st_uid != int(parts[1]) or not stat.S_ISDIR(status.st_mode):
            raise StoreError(
                f"{folder}: belongs to another user, or is no folder", hint="ask the admin to remove it"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                f"{folder}: others can write to it", hint=f"look at what is in it, then chmod 700 {folder}"
            )

    def create(self, path: str, content: bytes) -> bool:
        target = self._root / path
        try:
            self._make_folder(target.parent)
            with os.fdopen(
                os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                file.write(content)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"{target}: cannot be written: {error.strerror}") from error
        return True

    def scan(self, path: str) -> list[StoreEntry]:
        target = self._path(path)
        entries = []
        try:
            with os.scandir(target) as found:
                for each in found:
                    with contextlib.suppress(FileNotFoundError):
                        status = each.stat(follow_symlinks=False)
                        is_folder = stat.S_ISDIR(status.st_mode)
                        size_bytes = 0 if is_folder else status.st_size
                        entries.append(StoreEntry(each.name, is_folder, size_bytes, status.st_mtime))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{target}: cannot be listed: {error.strerror}") from error
        return entries

    def descriptor(self, path: str) -> int:
        target = self._path(path)
        try:
            return os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError(f"{target}: cannot be opened: {error.strerror}") from error

    def share(self, path: str) -> None:
        target = self._path(path)
        try:
            for above in target.parents:
                if above.is_relative_to(self._root / "users") and above != self._root / "users":
                    above.chmod(above.stat().st_mode | 0o111)  # to go through, not to list
            for each in [target, *target.rglob("*")]:
                each.chmod(0o755 if each.is_dir() else 0o644)
        except OSError as error:
            raise StoreError(f"{target}: cannot be shared: {error.strerror}") from error

    def changed_ns(self, path: str) -> int:
        target = self._path(path)
        try:
            kind = mount_of(target).fstype
            if kind not in _SERVER_TIMES:
                raise StoreError(f"{target}: {kind} has the times of whoever writes")
            return target.stat().st_mtime_ns
        except OSError as error:
            raise StoreError(f"{target}: cannot be looked at: {error.strerror}") from error

    def remove(self, path: str) -> None:
        target = self._path(path)
        try:
            for folder, _, files in os.walk(target, topdown=False):
                for name in files:
                    (Path(folder) / name).unlink()
                Path(folder).rmdir()
            if not target.is_dir():
                target.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{target}: cannot be removed: {error.strerror}") from error

    renames = True

    def rename(self, path: str, new: str) -> None:
        source, target = self._path(path), self._path(new)
        try:
            self._make_folder(target.parent)
            source.rename(target)
        except OSError as error:
            raise StoreError(f"{source}: cannot be renamed to {target}: {error.strerror}") from error


def users_of(root: Path) -> Iterator[tuple[int, int]]:
    """Each uid that has a folder in users/, and the folder's owner. Raises StoreError."""
    try:
        with os.scandir(root / "users") as entries:
            for entry in entries:
                if entry.name.isascii() and entry.name.isdecimal() and str(int(entry.name)) == entry.name:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        yield int(entry.name), status.st_uid if stat.S_ISDIR(status.st_mode) else -1
    except OSError as error:
        raise StoreError(f"{root / 'users'}: cannot be listed: {error.strerror}") from error


def give_folder(root: Path, uid: int, gid: int) -> None:
    """Put aside what has a user's place in users/, and make his folder. For root. Raises StoreError.

    Only he is given it, by a rename: others cannot change what root made in a sticky folder.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    token = secrets.token_hex(6)
    draft = f".{uid}.{token}"
    try:
        users = os.open(root / "users", flags)
        try:
            os.mkdir(draft, 0o700, dir_fd=users)
            os.chown(draft, uid, gid, dir_fd=users, follow_symlinks=False)
            if os.stat(str(uid), dir_fd=users, follow_symlinks=False).st_uid != uid:  # still
                os.rename(str(uid), f".put-aside-{uid}-{token}", src_dir_fd=users, dst_dir_fd=users)
                os.rename(draft, str(uid), src_dir_fd=users, dst_dir_fd=users)
        finally:
            with contextlib.suppress(OSError):  # it is where it belongs
                os.rmdir(draft, dir_fd=users)
            os.close(users)
    except OSError as error:
        raise StoreError(f"{root}/users/{uid}: cannot be given to its user: {error.strerror}") from error
