"""Targets that come as messages: of the kernel, of hook, plugin and jobs, of a user's process and others."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from typing import cast

from bootseer_slurm.agentapi import protocol as agent
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, NotFound
from bootseer_slurm.fuse import protocol as fuse
from bootseer_slurm.fuse.answers import Answers
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.ledger import Lookups
from bootseer_slurm.fuse.nodes import NodeTable
from bootseer_slurm.image import reference, registry
from bootseer_slurm.job.request import parse_job, parse_profile, parse_request
from bootseer_slurm.report.access import protocol as access
from bootseer_slurm.slurm import hostlist
from bootseer_slurm.userproc import frames
from bootseer_slurm.userproc import protocol as userproc
from scripts.lib.fuzz.target import Target

_IMAGE = reference.registry_reference("docker://nvcr.io#nvidia/pytorch:24.01-py3")
_BLOB_BYTES = 10**9
_FRAME_BYTES = 2**20
# As `decode_answer`, `decode_request` and `decode_order` say.
_NO_MESSAGE = (ValueError, LookupError, TypeError, RecursionError)
_REPLIES = (
    userproc.Resolved,
    userproc.CheckpointFolder,
    userproc.Same,
    userproc.Opened,
    userproc.Count,
    userproc.Clock,
    userproc.Planned,
    userproc.Recalled,
    userproc.Reply,
)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _kernels() -> list[bytes]:
    bodies = {
        fuse.Opcode.INIT: fuse.INIT_IN.pack(7, 40, 131072, 2**32 - 1) + bytes(48),
        fuse.Opcode.LOOKUP: b"1000\0",
        fuse.Opcode.GETATTR: bytes(16),
        fuse.Opcode.READ: fuse.READ_IN.pack(0, 4096, 131072, 0, 0, 0, 0),
        fuse.Opcode.READDIRPLUS: fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0),
        fuse.Opcode.FORGET: fuse.FORGET_IN.pack(1),
        fuse.Opcode.BATCH_FORGET: fuse.BATCH_FORGET_IN.pack(2, 0) + 2 * fuse.FORGET_ONE.pack(1, 1),
    }
    return [
        fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), code, 2, fuse.ROOT_ID, 1000, 1000, 77, 0, 0)
        + body
        for code, body in bodies.items()
    ]


class _Silent:
    """A device that takes each reply."""

    def reply(self, unique: int, payload: object) -> bool:
        return True


def _answer_kernel(message: bytes) -> object:
    request = fuse.parse(memoryview(message))
    if request.opcode == fuse.Opcode.INIT:
        return fuse.init_reply(request.body)
    if request.opcode == fuse.Opcode.READ:
        return fuse.READ_IN.unpack_from(request.body)
    nodes = NodeTable(Lookups(memoryview(bytearray(16 * 64))))
    nodes.root.children[b"1000"] = nodes.make_directory(2, uid=1000, mode=0o700)
    answers = Answers(nodes, cast(Device, _Silent()), zero_message_open=True)
    handler = answers.handlers.get(request.opcode)
    return handler(request) if handler else None


def _requests() -> list[bytes]:
    job = [
        ("JOB_ID", "7"),
        ("UID", "1000"),
        ("NODELIST", "n[1-3]"),
        ("NODES", "3"),
        ("GPUS", "0,1,4-7"),
        ("JOB_NAME", "träin"),
    ]
    asked = [("BOOTSEER", "1"), ("IMAGE", "docker://a/b:1"), ("ENV", "/e"), ("CHECKPOINT", "hdfs://n/c")]
    profile = [("BOOTSEER", "1"), ("PROFILE", 'images = "/a.sqsh"\n'), ("CONTAINER_IMAGE", "nvcr.io#x/y")]
    return [agent.encode([*job, *asked]), agent.encode([*job, *profile])]


def _decode_request(content: bytes) -> agent.Message:
    """The message; what it says of a job and its request is read too."""
    message = agent.decode(content)
    for parse in (parse_job, parse_request):
        try:
            parse(message)
        except InputError:
            pass
    return message


def _profiles() -> list[bytes]:
    return [
        b'images = "/a.sqsh"\nenvironments = ["/e", "/f"]\ncheckpoints = ["hdfs://n/c"]\nobserve = true\n',
        b"writable = true\n# nothing else\n",
    ]


def _to_worker() -> list[bytes]:
    requests: list[userproc.Request] = [
        userproc.Ping(),
        userproc.Resolve("image", "/a.sqsh", nodes=3),
        userproc.Read(1, 2, 3, 4, 5, 6, True),
        userproc.MakePlan("c", "b", 9, 65536, True),
    ]
    return [userproc.encode_request(number, each) for number, each in enumerate(requests)]


def _orders() -> list[bytes]:
    return [userproc.encode_order(userproc.Order(1000, 1000, (1000, 7), "/home/a", "file:///s", 8, 2**22))]


def _from_worker() -> list[bytes]:
    blob = userproc.StoredBlob("users/1/blobs/x", 3, "00")
    file = userproc.CheckpointFile("a", "b", "c")
    replies: list[userproc.Reply] = [
        userproc.Resolved(True, (blob,), 5, 7, "i", "f", ((0, 96),), "sha256:0", "r", "w"),
        userproc.CheckpointFolder((file,), 1, "m"),
        userproc.Count(7),
        userproc.Clock(0.5, 0.1),
        userproc.Recalled((("image", "/a", 5), ("environment", "/e", None))),
    ]
    answers = [userproc.encode_reply(number, each) for number, each in enumerate(replies)]
    return [*answers, userproc.encode_error(7, NotFound("no such file"))]


def _read_answer(content: bytes) -> object:
    """An answer as the agent takes it."""
    try:
        number, answer = userproc.decode_answer(content)
    except _NO_MESSAGE as error:
        raise IntegrityError("no answer: it ends the process") from error
    if isinstance(answer, BootseerError):
        return number, answer.message
    reply = userproc.decode_reply(answer, *_REPLIES)
    if isinstance(reply, userproc.Resolved):
        return number, reply, reply.first_ranges(_BLOB_BYTES), reply.descriptors
    return number, reply.usable() if isinstance(reply, userproc.Recalled) else reply


def _streams() -> list[bytes]:
    def some() -> Iterator[frames.Frame]:
        yield frames.Frame({"uid": 1000}, b"")
        yield frames.Frame({"node": "n1"}, b'{"v":1}\n')

    stream = io.BytesIO()
    frames.write_all(stream, some)
    whole = stream.getvalue()
    return [whole, whole.replace(b'{"end": 1, ', b'{"more": [], ') + b'{"end": 1, "bytes": 0}\n']


def _read_stream(content: bytes) -> list[frames.Frame]:
    return list(frames.read_frames(io.BytesIO(content), limit_bytes=_FRAME_BYTES))


def _write_stream(found: list[frames.Frame]) -> bytes:
    stream = io.BytesIO()
    frames.write_all(stream, lambda: iter(found))
    return stream.getvalue()


def _hostlists() -> list[bytes]:
    return [b"n[1-3,07-09],x", b"a[1-2]b[3-4],login.site", b"", b"n[001-100]"]


def _references() -> list[bytes]:
    texts = (
        "ubuntu:22.04",
        "nvcr.io#nvidia/pytorch:24.01-py3",
        "docker://me@reg.local:5000/team/x",
        "dir:/a/../b",
        "/shared/a.sqsh",
        f"docker://x:1@sha256:{'0' * 64}",
        "host#team/x",
    )
    return [each.encode() for each in texts]


def _registry_replies() -> list[bytes]:
    digest = f"sha256:{'0' * 64}"
    layers = {"schemaVersion": 2, "layers": [{"size": 7, "digest": digest}, {"size": "8", "digest": digest}]}
    platforms = [
        {"digest": digest, "platform": {"os": "linux", "architecture": each}} for each in ("amd64", "arm64")
    ]
    return [json.dumps(each).encode() for each in (layers, {"manifests": platforms})]


def _read_registry(content: bytes) -> object:
    text = _text(content)
    return registry.layer_bytes_in(text, _IMAGE), registry.digest_in(text, _IMAGE)


def _questions() -> list[bytes]:
    questions = (access.RecordsRequest(0), access.UsersRequest(), access.EventsRequest(1000, 7, 0))
    return [access.to_line(each) for each in questions]


TARGETS: tuple[Target, ...] = (
    Target("fuse request", _kernels, _answer_kernel, (OSError, struct.error)),
    Target("agent's request", _requests, _decode_request, (ValueError,), agent.encode),
    Target("profile", _profiles, lambda content: parse_profile(_text(content)), (InputError,)),
    Target("request to a user's process", _to_worker, userproc.decode_request, _NO_MESSAGE),
    Target("order to a user's process", _orders, userproc.decode_order, _NO_MESSAGE, userproc.encode_order),
    Target("answer of a user's process", _from_worker, _read_answer),
    Target("frames", _streams, _read_stream, (BootseerError,), _write_stream),
    Target(
        "hostlist",
        _hostlists,
        lambda content: set(hostlist.expand(_text(content))),
        (InputError,),
        lambda found: hostlist.fold(found).encode(),
    ),
    Target(
        "image reference",
        _references,
        lambda content: reference.parse(_text(content)).name,
        (InputError,),
        lambda name: str(name).encode("utf-8", "surrogateescape"),
    ),
    Target("registry's reply", _registry_replies, _read_registry, (BootseerError,)),
    Target("question for records", _questions, access.parse_line, (InputError,), access.to_line),
)
