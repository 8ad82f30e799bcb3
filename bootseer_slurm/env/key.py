"""The key of an environment: all that a snapshot of it depends on, and so whether one is still true.

Looked up in the prolog over a shared file system, so it must not touch 30,000 files. Every installer leaves
its marks in a few places: it replaces pyvenv.cfg, adds or replaces a *.dist-info folder or a file of
conda-meta, or changes a top-level module or .pth file. Those are covered, by name, size and whole second of
their last change. What an installer does not touch is not covered: a source file edited in place below a
package. Byte code is left out, for a run must not make a snapshot of its own environment stale.

    interpreter    pyvenv.cfg's home and version, conda's python, or the version that a folder's name tells
    packages       the marks' digest, then each package and its version
    requirements   requirements and lock files in the environment's folder and the one above
    sources        where editable installs lie and their commit, the commit of what came from a repository
    installer      the user's and the environment's configuration of pip and uv
    system         libc and machine; of a job in a container its image, which has both
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bootseer_slurm.errors import InputError

Key = dict[str, str]

_METADATA = (".dist-info", ".egg-info")
_CONDA = "conda-meta"
_REQUIREMENTS = re.compile(
    r"(requirements|constraints)[^/]*\.(txt|in)|[^/]*\.lock|conda-lock\.ya?ml|environment\.ya?ml|pyproject\.toml"
)
_CONFIGURATION = ("pip.conf", "uv.toml")  # of the environment and of the folder above
_USER_CONFIGURATION = (".config/pip/pip.conf", ".pip/pip.conf", ".config/uv/uv.toml")
_FILE_LIMIT_BYTES = 4 * 2**20
_REF = re.compile(r"[0-9a-f]{40,64}")
_IMAGE = r"sha256:[0-9a-f]+|[0-9]+@-?[0-9]+|[a-z]+:/\S+|/\S+"  # as a digest, a fingerprint or a name
_NAME = re.compile(rf"(.*?)(?: in ({_IMAGE}))?(?: for ([0-9a-f]{{32}}))?", re.DOTALL)


def key_of(root: str, *, home: str, image: str = "", known: Key | None = None) -> Key:
    """The key of the environment in `root`.

    home: the user's. image: the digest of the image that the job runs in, "" without one. known: an earlier
    key, which saves reading what the same packages say of their sources.
    Raises InputError when `root` is no environment, OSError when it cannot be read.
    """
    if not Path(root).is_dir():
        raise InputError(f"environment {root}: not a directory")
    packages = _packages(root)
    above = os.path.dirname(root.rstrip("/"))
    if known is not None and known.get("packages") == packages:
        sources = known.get("sources", "").splitlines()
    else:
        sources = list(_sources(root))
    configuration = [os.path.join(folder, name) for folder in (root, above) for name in _CONFIGURATION]
    configuration += [os.path.join(home, name) for name in _USER_CONFIGURATION]
    return {
        "interpreter": _interpreter(root),
        "packages": packages,
        "requirements": _digests([*_requirements(root), *_requirements(above)]),
        "sources": "\n".join(_with_commit(line) for line in sources),
        "installer": _digests(configuration).replace(f"{home}/", "~/"),
        "system": f"image {image}" if image else _system(),
    }


def fingerprint_of(key: Key) -> str:
    """The sha256, in hexadecimal, over a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def stored_name(path: str, image: str, job_class: str = "") -> str:
    """The name of a snapshot in the store.

    image: the digest of the image it is for, "" without one. job_class: of the jobs whose start installed
    what it holds, "" when it is the environment as it lies.
    """
    return path + (f" in {image}" if image else "") + (f" for {job_class}" if job_class else "")


def parts_of(name: str) -> tuple[str, str, str]:
    """The path, image and job class that `stored_name` was given."""
    path, image, job_class = _NAME.fullmatch(name).groups("")  # type: ignore[union-attr]  # fits all
    return path, image, job_class


def differences(before: Key, after: Key) -> dict[str, list[str]]:
    """The changes between two keys, by part: lines that went (-) and lines that came (+)."""
    found = {}
    for part in dict.fromkeys([*before, *after]):
        old, new = before.get(part, "").splitlines(), after.get(part, "").splitlines()
        if old != new:
            found[part] = [f"- {line}" for line in old if line not in new]
            found[part] += [f"+ {line}" for line in new if line not in old]
    return found


def package_folders(root: str) -> list[str]:
    """The folders of an environment that packages are installed in, relative to it.

    A venv or conda environment has lib/python*/site-packages, a `pip install --target` folder has itself.
    Raises InputError when it is none of these.
    """
    found = sorted(Path(root).glob("lib*/python*/site-packages"))
    if found:
        folders = {path.resolve(): str(path.relative_to(root)) for path in reversed(found)}
        return sorted(folders.values())  # a venv's lib64 is a link to its lib
    if any(name.endswith(_METADATA) for name in os.listdir(root)):
        return ["."]
    raise InputError(
        f"environment {root}: not a Python environment",
        hint="expected lib/python*/site-packages or packages with their *.dist-info in it",
    )


def _packages(root: str) -> str:
    digest, names = hashlib.sha256(), set()
    for folder in dict.fromkeys([".", "bin", _CONDA, *package_folders(root)]):
        for name, mark in _marks(os.path.join(root, folder)):
            digest.update(os.fsencode(f"{folder}/{name} {mark}\n"))
            if name.endswith(_METADATA):
                names.add(name.rpartition(".")[0])
            elif folder == _CONDA and name.endswith(".json"):
                names.add(name.removesuffix(".json"))
    return "\n".join([digest.hexdigest(), *sorted(names)])


def _marks(folder: str) -> Iterator[tuple[str, str]]:
    """The marks that an installer changes in a folder: each name, and its properties that count."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name == "__pycache__" or _REQUIREMENTS.fullmatch(entry.name):
            continue
        status = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR and not entry.name.endswith(_METADATA):
            yield entry.name, "directory"
        elif kind == stat.S_IFLNK:
            yield entry.name, f"link {os.readlink(entry.path)}"
        else:
            size_bytes = status.st_size if kind == stat.S_IFREG else 0
            yield entry.name, f"{kind:o} {size_bytes} {int(status.st_mtime)}"


def _interpreter(root: str) -> str:
    settings = _read(os.path.join(root, "pyvenv.cfg")).splitlines()
    lines = [line.strip() for line in settings if re.match(r"(home|version|version_info)\s*=", line)]
    if not lines:
        conda = os.path.join(root, _CONDA)
        names = os.listdir(conda) if os.path.isdir(conda) else []
        lines = sorted(name for name in names if re.match(r"python-\d", name))
    if not lines:
        lines = sorted({folder.split("/")[1] for folder in package_folders(root) if "/" in folder})
    return "\n".join(lines)


def _requirements(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if _REQUIREMENTS.fullmatch(name))
    except OSError:  # the folder above may not be the user's to list
        return []
    return [os.path.join(folder, name) for name in names]


def _sources(root: str) -> Iterator[str]:
    """Of each package that came from a folder or a repository: its name, where from, and that one's commit.

    As installers write it down in direct_url.json (PEP 610).
    """
    for folder in package_folders(root):
        full = os.path.join(root, folder)
        for name in sorted(os.listdir(full)):
            content = _read(os.path.join(full, name, "direct_url.json")) if name.endswith(_METADATA) else ""
            try:
                record = json.loads(content) if content else {}
                url, commit = str(record.get("url", "")), str(record.get("vcs_info", {}).get("commit_id", ""))
                editable = bool(record.get("dir_info", {}).get("editable"))
                path = unquote(urlsplit(url).path)
            except (ValueError, AttributeError, RecursionError):
                continue
            package = name.rpartition(".")[0]
            if commit:
                yield f"{package} from {url} at {commit}"
            elif editable and url.startswith("file://"):
                yield f"{package} in {path}"


def _with_commit(line: str) -> str:
    """A line of `_sources` with what is checked out now, where that is a folder."""
    package, separator, folder = line.partition(" in /")
    if not separator:
        return line
    folder = "/" + folder.partition(" at ")[0]
    return f"{package} in {folder} at {_commit(folder) or 'no commit'}"


def _commit(folder: str) -> str:
    """The commit that is checked out in a folder or above it, as git keeps it (gitrepository-layout(5))."""
    for each in (Path(folder), *Path(folder).parents):
        git = each / ".git"
        if pointer := _read(str(git)):  # a worktree or submodule
            git = each / pointer.removeprefix("gitdir:").strip()
        elif not git.is_dir():
            continue
        head = _read(str(git / "HEAD")).strip()
        if not head.startswith("ref: "):
            return head if _REF.fullmatch(head) else ""
        ref = head.removeprefix("ref: ")
        common = git / (_read(str(git / "commondir")).strip() or ".")
        found = _read(str(git / ref)).strip() or _read(str(common / ref)).strip()
        if not found:
            packed = (line.split(" ", 1) for line in _read(str(common / "packed-refs")).splitlines())
            found = next((parts[0] for parts in packed if parts[-1] == ref), "")
        return found if _REF.fullmatch(found) else ""
    return ""


def _system() -> str:
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return f"{libc or 'unknown libc'}, {os.uname().sysname} {os.uname().machine}"


def _digests(paths: Iterable[str]) -> str:
    """One line for each of these files that is there."""
    lines = []
    for path in paths:
        content = _read(path)
        if content:
            digest = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
            lines.append(f"{path} {digest[:32]}")
    return "\n".join(lines)


def _read(path: str) -> str:
    """A small file; "" when there is none, or it is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # what a file of the user's names need not be a path
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, _FILE_LIMIT_BYTES).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
