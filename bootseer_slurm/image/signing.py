"""Signing: which images were packed by the site, so that the kernel's squashfs driver may read them.

A squashfs that a user made can be made to break the kernel. One that the agent packed cannot be touched by
its user between packing and signing; the signature is over the manifest's id, thus over every byte. It is
an HMAC-SHA256 with the site's key, the same file on all nodes, and lies with the image's name in the store,
where its user may change it: a changed one does not verify, and the image goes through squashfuse.

A key is replaced while images hang on it: the file <key>.old beside it holds the one before, whose signatures
count as long as that file is there. It signs nothing any more.

Owns: the key's file and the signature. Does not own: what is signed, see `packer`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from bootseer_slurm.errors import BootseerError

KEY_PATH = Path("/etc/bootseer/site.key")
_KEY_BYTES = 32
_KEY_LIMIT_BYTES = 4096
_PURPOSE = "bootseer image packed by the site, version 1"
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """The site's key, or why there is none: then `secret` is empty and nothing is trusted.

    earlier: the key before it, whose signatures still count; empty where there is none.
    """

    secret: bytes = field(repr=False)
    reason: str = ""
    earlier: bytes = field(default=b"", repr=False)

    def __bool__(self) -> bool:
        return bool(self.secret)


def read_key(path: Path = KEY_PATH) -> Key:
    """The site's key, a file of root that nobody else may read. Never raises: the reason is in the result."""
    key = _read(path)
    return replace(key, earlier=_read(path.with_name(f"{path.name}.old")).secret) if key else key


def _read(path: Path) -> Key:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            content = os.read(fd, _KEY_LIMIT_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
    except OSError as error:
        return Key(b"", f"{path}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Key(b"", f"{path}: not a regular file")
    if status.st_uid != 0 or status.st_mode & 0o177:
        return Key(b"", f"{path}: must be root's, with mode 0600")
    if not _KEY_BYTES <= len(content) <= _KEY_LIMIT_BYTES:
        return Key(b"", f"{path}: must hold {_KEY_BYTES} to {_KEY_LIMIT_BYTES} bytes")
    return Key(content)


def make_key(path: Path = KEY_PATH) -> None:
    """Write a new key. Raises BootseerError, also when there is a file already: images hang on it."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(fd, 0o600)
            os.write(fd, secrets.token_bytes(_KEY_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise BootseerError(
            f"key {path} cannot be made: {error.strerror}", hint="copy it to all nodes, root's alone (0600)"
        ) from error


def sign(key: Key, uid: int, manifest_id: str) -> str:
    """The signature of a user's image, in hexadecimal. Raises ValueError without a key, or for another id."""
    if not key:
        raise ValueError(f"no key to sign with: {key.reason}")
    if not _ID.fullmatch(manifest_id):
        raise ValueError("not the id of a manifest")
    return _signature(key.secret, uid, manifest_id)


def _signature(secret: bytes, uid: int, manifest_id: str) -> str:
    text = f"{_PURPOSE}\0{int(uid)}\0{manifest_id}"
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def is_signed(key: Key, uid: int, manifest_id: str, signature: str) -> bool:
    """Whether the site packed this image for this user. False also without a key, and for any odd input."""
    if not key or not _ID.fullmatch(manifest_id):
        return False
    # As bytes: compare_digest refuses text that is not ASCII, and this text is the user's.
    given = signature.encode("utf-8", "surrogatepass")
    trusted = [secret for secret in (key.secret, key.earlier) if secret]
    return any(hmac.compare_digest(_signature(each, uid, manifest_id).encode(), given) for each in trusted)
