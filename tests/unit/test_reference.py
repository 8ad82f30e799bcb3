"""Image references: every way that people write them, and what hostile text is worth."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bootseer_slurm.errors import InputError
from bootseer_slurm.image.reference import Folder, Reference, SquashfsFile, parse, registry_reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ubuntu", "docker://docker.io/library/ubuntu:latest"),
        ("ubuntu:22.04", "docker://docker.io/library/ubuntu:22.04"),
        ("docker://ubuntu:22.04", "docker://docker.io/library/ubuntu:22.04"),
        ("nvidia/cuda:12.4.1-base", "docker://docker.io/nvidia/cuda:12.4.1-base"),
        ("nvcr.io#nvidia/pytorch:24.01-py3", "docker://nvcr.io/nvidia/pytorch:24.01-py3"),
        ("docker://nvcr.io/nvidia/pytorch:24.01-py3", "docker://nvcr.io/nvidia/pytorch:24.01-py3"),
        ("docker://$oauthtoken@nvcr.io#nvidia/pytorch:1", "docker://nvcr.io/nvidia/pytorch:1"),
        ("docker://me@site.org@reg.local/a/b", "docker://reg.local/a/b:latest"),
        ("docker://localhost:5000/repo:tag", "docker://localhost:5000/repo:tag"),
        ("127.0.0.1:5000#repo", "docker://127.0.0.1:5000/repo:latest"),
        ("docker://REG.Local:5000/x", "docker://reg.local:5000/x:latest"),
        ("docker://registry-1.docker.io#ubuntu", "docker://docker.io/library/ubuntu:latest"),
        ("index.docker.io/library/ubuntu:1", "docker://docker.io/library/ubuntu:1"),
        ("host#team/x", "docker://host#team/x:latest"),
        (f"ubuntu@{DIGEST}", f"docker://docker.io/library/ubuntu@{DIGEST}"),
        (f"docker://me@nvcr.io#n/p:24@{DIGEST}", f"docker://nvcr.io/n/p@{DIGEST}"),
        ("dir:/shared//rootfs/", "dir:/shared/rootfs"),
        ("docker://dir:/shared/rootfs", "dir:/shared/rootfs"),
        ("/shared/img/../x y.sqsh", "/shared/x y.sqsh"),
        ("//shared/x.sqsh", "/shared/x.sqsh"),
    ],
)
def test_every_way_to_write_it_has_one_name(text: str, name: str) -> None:
    found = parse(text)
    assert found.name == name
    assert parse(name).name == name, "a name is a reference to itself"


def test_what_it_is() -> None:
    assert parse("a@reg.io#b/c:d") == Reference("reg.io", "b/c", "d", "", "a")
    assert parse("dir:/x") == Folder("/x")
    assert parse("/x") == SquashfsFile("/x")
    assert registry_reference("a@reg.io#b/c:d").enroot_uri == "docker://a@reg.io#b/c:d"


def test_pinned_to_a_digest() -> None:
    reference = registry_reference("me@reg.io#b/c:d")
    assert reference.pinned(DIGEST).enroot_uri == f"docker://me@reg.io#b/c@{DIGEST}"
    with pytest.raises(InputError, match="not a sha256 digest"):
        reference.pinned("sha256:../../etc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "repository"),
        ("docker://", "repository"),
        ("docker://\nrm -rf", "repository"),
        ("ubuntu:22.04\n", "tag"),
        ("ubuntu:22.04; reboot", "tag"),
        ("ubuntu:" + "a" * 129, "tag"),
        ("UBUNTU", "repository"),
        ("reg.io#../../etc/passwd", "repository"),
        ("reg.io#a//b", "repository"),
        ("reg.io/a\0b", "repository"),
        ("--authfile=x#a", "registry"),
        ("-x.y/a", "registry"),
        ("reg.io:port/a", "registry"),
        ("#a", "registry"),
        ("a b@reg.io#c", "user"),
        ("@reg.io#c", "user"),
        ("x@sha256:1234", "digest"),
        ("x@sha256:" + "A" * 64, "digest"),
        ("oras://host/x", "only docker://"),
        ("docker://docker://x", "only docker://"),
        ("dir:relative", "absolute"),
        ("./x.sqsh", "absolute"),
        ("/x\ny.sqsh", "control"),
        ("a" * 5000, "longer than"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(text)
    assert "\n" not in caught.value.message and "\0" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_path_is_no_image_of_a_registry() -> None:
    with pytest.raises(InputError, match="not an image of a registry"):
        registry_reference("/shared/x.sqsh")


def test_it_loads_nothing_heavy() -> None:
    code = "import sys, bootseer_slurm.image.reference; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pyarrow", "typer", "rich", "subprocess", "bootseer_slurm.store"} & set(loaded)
