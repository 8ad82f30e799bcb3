"""Targets that lie in files: of the store, of an image or environment, of the configuration, and of /run."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bootseer_slurm import config, events
from bootseer_slurm.artifacts.reattached import Found
from bootseer_slurm.blob import jobclass, lease, manifest, names, trace
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.squashfs.files import read_files
from bootseer_slurm.blob.squashfs.superblock import check_squashfs, head_and_tables
from bootseer_slurm.checkpoint import locate
from bootseer_slurm.env import key
from bootseer_slurm.errors import ConfigError, InputError, IntegrityError
from bootseer_slurm.job.journal import Added, Began, Journal
from bootseer_slurm.job.request import Request
from bootseer_slurm.slurm.allocation import Job
from scripts.lib.fuzz.stand_ins import Bytes, Folder, content_of, store_of
from scripts.lib.fuzz.target import Target

_UID = 1000
_BLOCKS = 100
_BLOB = "ab" * 32
_PLACE = f"users/{_UID}/blobs/0123456789abcdef"


def _manifests() -> list[bytes]:
    digests = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(3))
    layout = manifest.Layout(size_bytes=2 * 65536 + 7, block_bytes=65536)
    newer = manifest.Layout(
        size_bytes=3 * 4096, block_bytes=4096, chunk_bytes=8192, objects=4, digest="blake3"
    )
    return [
        manifest.Manifest("image", layout, digests).encode(),
        manifest.Manifest("checkpoint", newer, digests, generation="0" * 16).encode(),
    ]


def _unmanaged() -> list[bytes]:
    return [manifest.encode_unmanaged(manifest.Layout(size_bytes=10**12))]


def _names() -> list[bytes]:
    one = names.Name("image", "/lustre/a.sqsh", "7@1", _BLOB, _PLACE, 1764000000000000000, "00" * 32)
    base = names.Base(_BLOB, _PLACE)
    two = names.Name(
        "environment", "/e", "f", _BLOB, _PLACE, 1, key={"system": "x\ny"}, base=base, shared=True
    )
    return [_written(one), _written(two)]


def _written(name: names.Name) -> bytes:
    store = store_of(b"")
    names.write_name(store, _UID, name)
    return content_of(store)


def _read_name(content: bytes) -> names.Name:
    """The record, found by its own name; the list of all names meets it too."""
    names.list_names(store_of(content), _UID)
    try:
        found = names.read_name(store_of(content), _UID, str(json.loads(content)["name"]))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise IntegrityError("it has no name that can be asked for") from error
    assert found is not None
    return found


def _traces() -> list[bytes]:
    touches = tuple((block, 3 * block) for block in (5, 0, 99, 7))
    return [
        trace.Trace(_BLOB, "n1", 7, 0, 1764000000000000000, _BLOCKS, 65536, False, "mark", touches).encode(),
        trace.Trace(_BLOB, "n1", 7, 1, 1764000000000000000, _BLOCKS, 65536, True, "cap", ()).encode(),
    ]


def _plans() -> list[bytes]:
    return [trace.Plan((5, 0, 99), (0, 3, 40), 2).encode(), trace.Plan().encode()]


def _sealed(content: bytes) -> bytes:
    """With the digest of what is before it at the end: a user can make that too."""
    body = content[:-32]
    return body + hashlib.sha256(body).digest()


def _class_records() -> list[bytes]:
    remembered = [
        jobclass.Remembered("image", "/a.sqsh", 20001),
        jobclass.Remembered("checkpoint", "hdfs://n/c"),
    ]
    old = {"version": 1, "made_ns": 1, "wishes": [["environment", "/e"]]}
    return [jobclass.encode_record(remembered), json.dumps(old).encode()]


def _leases() -> list[bytes]:
    whole = {"count": 17, "host": "n3", "pid": 4711, "token": "00" * 16}
    return [json.dumps(each).encode() for each in (whole, {**whole, "failed": "no room"})]


def _lease(content: bytes) -> tuple[str, ...]:
    return lease._holder(content), *(lease._field(content, each) for each in ("failed", "token"))


def _events() -> list[bytes]:
    log = events.EventLog(7, 0, "n1")
    log.emit("mark", "training_started", step="0", task=3)
    log.emit("fault", "too_many_events", level="warning", message="no\nanswer")
    return [line.encode() for line in log.to_jsonl().splitlines()]


@functools.cache
def _images() -> Sequence[bytes]:
    """Small squashfs images with all that the tables can hold."""
    images = []
    with tempfile.TemporaryDirectory(prefix="bootseer-fuzz-") as folder:
        root = Path(folder) / "root"
        (root / "inner/deep").mkdir(parents=True)
        for name, size_bytes in (("empty", 0), ("small", 100), ("inner/large", 9000), ("inner/deep/x", 1)):
            (root / name).write_bytes(b"x" * size_bytes)
        (root / "link").symlink_to("small")
        for number, options in enumerate((["-noI", "-noF", "-noD"], ["-comp", "zstd"], ["-comp", "lz4"], [])):
            image = Path(folder) / str(number)
            command = ["mksquashfs", str(root), str(image), "-quiet", "-no-progress", "-nopad", "-b", "4096"]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
            images.append(image.read_bytes())
    return images


def _read_image(content: bytes) -> object:
    check_squashfs(Bytes(content), "image")
    return head_and_tables(Bytes(content), "image"), read_files(Bytes(content), "image")


_RUN = Folder()


def _journal() -> list[bytes]:
    request = Request(False, (ArtifactRef("image", "/a.sqsh"),))
    journal = Journal(_RUN.path)
    journal.begin(Began(Job(7, 0, _UID, _UID, "n[1-2]", gpus=(0, 1)), "n1", request))
    journal.add(7, Added(Request(True, (), True)))
    journal.add(7, Found(_BLOB, "image", "", _PLACE))
    content = (_RUN.path / "jobs/7").read_bytes()
    return [content, content[:-9]]


def _read_journal(content: bytes) -> object:
    journal = Journal(_RUN.path)
    for folder, name in (("jobs", "7"), ("ending", "7.0")):
        (_RUN.path / folder / name).write_bytes(content)
    return list(journal.jobs()), journal.endings()


_ENVIRONMENT = Folder("lib/python3.11/site-packages/a-1.dist-info", ".git")


def _environments() -> list[bytes]:
    record = {"url": "file:///src/a", "dir_info": {"editable": True}, "vcs_info": {"commit_id": "0" * 40}}
    editable = {"url": "file:///src/a", "dir_info": {"editable": True}}
    return [
        b"home = /usr/bin\nversion = 3.11.2\n",
        b"gitdir: /src/.git/worktrees/a\n",
        b"ref: refs/heads/main\n",
        *(json.dumps(each).encode() for each in (record, editable)),
    ]


def _read_environment(content: bytes) -> object:
    """The input is each of the small files that a key is made of."""
    root = _ENVIRONMENT.path
    inner = root / "lib/python3.11/site-packages"
    for path in (
        root / "pyvenv.cfg",
        root / ".git/HEAD",
        inner / ".git",
        inner / "a-1.dist-info/direct_url.json",
    ):
        path.write_bytes(content)
    here = content.decode("utf-8", "surrogateescape")
    key.parts_of(here)
    key._commit(str(inner))
    return key.fingerprint_of(key.key_of(str(root), home="/nowhere"))


_CONFIGURATION = Folder()


def _configurations() -> list[bytes]:
    text = config.template()
    set_all = "\n".join(line.removeprefix("#") if " = " in line else line for line in text.splitlines())
    return [text.encode(), set_all.encode(), b'[cache]\nmax = "20GiB"\n[prefetch]\nattach_wait = "5s"\n']


def _read_configuration(content: bytes) -> object:
    path = _CONFIGURATION.path / "bootseer.toml"
    path.write_bytes(content)
    return config.load(path, environ={})


def _decode_plan(content: bytes) -> trace.Plan:
    return trace.decode_plan(content, blocks=_BLOCKS)


def _parse_event(line: bytes) -> events.Event:
    return events.parse_line(line.decode("utf-8", "replace"))


def _step_of(name: bytes) -> object:
    text = name.decode("utf-8", "surrogateescape")[:4096]
    return locate._without_step(text), locate._step_of(text), locate._natural(text)


def _steps() -> list[bytes]:
    return [b"/c/global_step100/rank_3.pt", b"step_9000.safetensors", b"s3://b/c/iter_0000010", b"latest"]


_DAMAGED = (IntegrityError,)
_REFUSED = (InputError,)
TARGETS: tuple[Target, ...] = (
    Target("manifest", _manifests, manifest.decode, _DAMAGED, manifest.Manifest.encode),
    Target("unmanaged file", _unmanaged, manifest.decode_unmanaged, _DAMAGED, manifest.encode_unmanaged),
    Target("name", _names, _read_name, _DAMAGED, _written),
    Target("trace", _traces, trace.decode, _DAMAGED, trace.Trace.encode, _sealed),
    Target("plan", _plans, _decode_plan, _DAMAGED, trace.Plan.encode, _sealed),
    Target("job class", _class_records, jobclass.decode_record, _DAMAGED),
    Target("lease", _leases, _lease, ()),
    Target("event", _events, _parse_event, _REFUSED, lambda event: str(event.to_json()).encode()),
    Target("squashfs", _images, _read_image, _REFUSED),
    Target("journal", _journal, _read_journal, ()),
    Target("environment", _environments, _read_environment, _REFUSED),
    Target("checkpoint name", _steps, _step_of, ()),
    Target("configuration", _configurations, _read_configuration, (ConfigError,)),
)
