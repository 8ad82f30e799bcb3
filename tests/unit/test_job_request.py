"""What jobs ask for: hostile values, profiles, the wire format."""

from __future__ import annotations

import pwd

import pytest

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import InputError
from bootseer_slurm.job.request import parse_job, parse_profile, parse_request
from tests.nodelists import nodelist_of


def test_options_and_profile_are_joined() -> None:
    profile = 'images = "/a.sqsh"\ncheckpoints = ["/c1", "hdfs://nn/c2"]\n'
    request = parse_request([("BOOTSEER", "1"), ("PROFILE", profile), ("ENV", "/venv"), ("IMAGE", "/a.sqsh")])
    assert request is not None and not request.observe
    assert set(request.wanted) == {
        ArtifactRef("image", "/a.sqsh"),
        ArtifactRef("checkpoint", "/c1"),
        ArtifactRef("checkpoint", "hdfs://nn/c2"),
        ArtifactRef("environment", "/venv"),
    }


def test_no_request_and_observe() -> None:
    assert parse_request([("IMAGE", "/a")]) is None
    request = parse_request([("BOOTSEER", "observe")])
    assert request is not None and request.observe


def test_pyxis_image_serves_when_none_is_named() -> None:
    request = parse_request([("BOOTSEER", "1"), ("CONTAINER_IMAGE", "/x.sqsh")])
    assert request is not None and request.wanted == (ArtifactRef("image", "/x.sqsh"),)


@pytest.mark.parametrize("value", ["relative", "/a\nb", "/" + "x" * 5000, "a b://x", "../x"])
def test_a_hostile_value_is_refused(value: str) -> None:
    with pytest.raises(InputError):
        parse_request([("BOOTSEER", "1"), ("IMAGE", value)])


@pytest.mark.parametrize("value", ["", "-1", "1e3", "0x1", "١", "9" * 30])
def test_a_hostile_number_is_refused(value: str) -> None:
    with pytest.raises(InputError):
        parse_job([("JOB_ID", value), ("UID", "1")])


def test_a_missing_group_is_the_users_own_and_never_his_number(monkeypatch: pytest.MonkeyPatch) -> None:
    known = pwd.struct_passwd(("alice", "x", 20001, 30007, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", {20001: known}.__getitem__)
    assert parse_job([("JOB_ID", "1"), ("UID", "20001")]).gid == 30007
    assert parse_job([("JOB_ID", "1"), ("UID", "20001"), ("GID", "7")]).gid == 7
    for uid in ("20002", "9" * 19):
        with pytest.raises(InputError, match="GID: missing"):
            parse_job([("JOB_ID", "1"), ("UID", uid)])


def test_a_bad_profile_names_every_problem() -> None:
    with pytest.raises(InputError) as caught:
        parse_profile('image = "/a"\nimages = [1]\nobserve = "yes"\nenvironments = ["rel"]\n')
    for part in ("image: unknown key", "images: must be", "observe: must be", "'rel'"):
        assert part in caught.value.message
    for text in ("images = ", f"images = {'[' * 50_000}", f"images = {'9' * 5000}"):
        with pytest.raises(InputError, match="not valid TOML"):
            parse_profile(text)


def test_messages_come_back_as_they_were() -> None:
    entries = [("OP", "x"), ("A", "1=2\n"), ("A", "\udcff")]
    assert protocol.decode(protocol.encode(entries)) == entries


@pytest.mark.parametrize("content", [b"A=1", b"=1\0", b"a=1\0", b"A\0", b"\0"])
def test_a_damaged_message_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        protocol.decode(content)
    with pytest.raises(ValueError):
        protocol.encode([("A", "\0")])


def test_a_list_of_10_000_nodes_is_taken_whole() -> None:
    nodelist = nodelist_of(10_000)
    job = parse_job([("JOB_ID", "1"), ("UID", "2"), ("GID", "2"), ("NODELIST", nodelist), ("NODES", "10000")])
    assert (job.nodelist, job.node_count) == (nodelist, 10_000)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("0", (0,)), ("0,2,5-7", (0, 2, 5, 6, 7)), ("", ()), ("all", ()), ("0;reboot", ()), ("3-", ()), ("5-2", ()),
        ("0-999", tuple(range(64))), ("٣", ()), ("0," * 64 + "0", ()),
    ],
)  # fmt: skip
def test_the_gpus_of_a_job_are_numbers_or_not_known(text: str, gpus: tuple[int, ...]) -> None:
    assert parse_job([("JOB_ID", "1"), ("UID", "2"), ("GPUS", text)]).gpus == gpus


def test_a_uri_of_a_file_is_its_path() -> None:
    request = parse_request(
        [("BOOTSEER", "1"), ("CHECKPOINT", "file:///c/a%20b%3D1.pt"), ("IMAGE", "/a%20b.sqsh")]
    )
    assert request is not None
    assert set(request.wanted) == {
        ArtifactRef("checkpoint", "/c/a b=1.pt"),
        ArtifactRef("image", "/a%20b.sqsh"),
    }
    for name in ("file:///c/a%0Ab", "file:///c/a%00b"):
        with pytest.raises(InputError, match="control character"):
            parse_request([("BOOTSEER", "1"), ("CHECKPOINT", name)])
