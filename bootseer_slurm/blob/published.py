"""Published blobs: one that a user made, told from one that another user only says he made.

On a store in folders (file://) a user's part is his own folder, in which only he can write. The agent looks
at both, the folder and the open manifest, and takes the path from the kernel: a link, or a file system of a
user's own that claims another owner, shows there. Elsewhere nobody but the site's signature tells
(image/signing.py): any client of HDFS without Kerberos says whom it likes to be.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bootseer_slurm import mounts
from bootseer_slurm.blob.names import publisher_of, user_folder


def is_published(manifest_fd: int, folder: str, store_uri: str) -> bool:
    """Whether this open file is the manifest of a blob that was published by the user whose part it lies in.

    folder: of the blob in the store, as a user's process says. May wait for the store, but for no file system
    of the user's.
    """
    uid, uri = publisher_of(folder), urlsplit(store_uri)
    try:
        path = os.readlink(f"/proc/self/fd/{manifest_fd}")
        if uid is None or uri.scheme != "file" or not path.endswith(f"/{folder}/manifest"):
            return False  # without a look at the store
        root = os.path.realpath(unquote(uri.path))
        whole = os.lstat(Path(root, user_folder(uid)))
        owner = mounts.owner_of(manifest_fd)
    except OSError:
        return False
    is_closed = stat.S_ISDIR(whole.st_mode) and not whole.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_theirs = whole.st_uid == uid and owner == (uid, whole.st_dev)
    return is_closed and is_theirs and path == f"{root}/{folder}/manifest"
