"""Installs the Debian packages that a cluster needs, without letting their services start."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .layout import ClusterError

PACKAGES = [
    # Slurm and what it needs
    "slurm-wlm",
    "slurm-client",
    "slurmdbd",
    "libslurm-dev",
    "munge",
    "mariadb-server",
    # network, shared storage
    "iproute2",
    "openssh-sftp-server",
    "sshfs",
    "fuse3",
    "libfuse3-dev",
    # what the project builds and mounts
    "gcc",
    "make",
    "libc6-dev",
    "python3",
    "python3-venv",
    "squashfs-tools",
    "squashfuse",
    "bubblewrap",
    "busybox-static",
    "docker-registry",
    "mmdebstrap",
    "pkg-config",
    "procps",
    "shellcheck",
    "skopeo",
    "umoci",
    "util-linux",
    "zstd",
]
POLICY = Path("/usr/sbin/policy-rc.d")


def missing(wanted: list[str] = PACKAGES) -> list[str]:
    """Which of these are not installed; raises ClusterError where there are no such packages."""
    if shutil.which("dpkg-query") is None or shutil.which("apt-get") is None:
        raise ClusterError(f"this machine has no apt-get; needed are {' '.join(wanted)}")
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *wanted]
    output = subprocess.run(
        query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    ).stdout
    installed = {line.split()[0] for line in output.splitlines() if line.endswith(" installed")}
    return [package for package in wanted if package not in installed]


def install(packages: list[str]) -> None:
    """Install packages with apt-get; raises ClusterError when that fails."""
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with services_held():
        for command in (
            [*apt, "update"],
            [*apt, "install", "--yes", "--no-install-recommends", *packages],
        ):
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise ClusterError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


@contextlib.contextmanager
def services_held() -> Iterator[None]:
    """No package starts a service meanwhile: invoke-rc.d asks policy-rc.d, and 101 means "not allowed"."""
    aside = POLICY.with_name("policy-rc.d.bootseer-saved")
    if POLICY.exists() and not aside.exists():
        POLICY.rename(aside)
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
        if aside.exists():
            aside.rename(POLICY)
