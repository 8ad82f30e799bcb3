"""Asking registries: which manifest a tag stands for now, and how their tools are called.

The work is done by enroot where it is installed, else by skopeo: both know registries' ways to log in. Runs
as the image's user, with that user's credentials: enroot's ~/.config/enroot/.credentials (which skopeo is
told of through an authfile in a closed folder that goes away, never on a command line) or else skopeo's own.
Plain HTTP is spoken with loopback addresses, and where ENROOT_ALLOW_HTTP is set.

The digest of an image for several platforms is that of this machine's platform.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootseer_slurm.errors import BootseerError, NotFound
from bootseer_slurm.image.reference import Reference

_HUB_HOSTS = ("registry-1.docker.io", "auth.docker.io", "docker.io")
_CREDENTIAL_COMMAND_TIMEOUT_S = 30.0
_POLL_S = 0.25
# What skopeo and enroot say; a tag or a port may be 404 too.
_ABSENT = re.compile(r"(manifest|name) unknown|(code|status)[^\n]{0,30}\b404\b", re.IGNORECASE)
_REFUSED = re.compile(
    r"unauthorized:|denied:|is denied|authentication required|(code|status|HTTP)[^\n]{0,30}\b40[13]\b",
    re.IGNORECASE,
)
_TELLING = re.compile("error|fatal|failed|panic|⨯", re.IGNORECASE)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "riscv64": "riscv64"}


class RegistryUnreachable(BootseerError):
    """No answer from a registry, or one that says nothing about the image."""

    exit_status = 8


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long somebody waits. cancelled: when it is set, nobody waits any more."""

    timeout_s: float = float("inf")
    cancelled: threading.Event | None = None

    @property
    def is_over(self) -> bool:
        return self.cancelled is not None and self.cancelled.is_set()


def resolve(
    reference: Reference, *, timeout_s: float = 60.0, cancelled: threading.Event | None = None
) -> str:
    """The digest ("sha256:…") of the manifest that a reference stands for now, on this platform.

    cancelled: when it is set, nobody waits for the answer any more.
    Raises NotFound when the registry has no such image, RegistryUnreachable when it does not answer within
    `timeout_s`, BootseerError when it refuses this user, or when neither enroot nor skopeo is installed.
    """
    patience = Patience(timeout_s, cancelled)
    if shutil.which("enroot"):
        try:
            return _ask_enroot(reference, patience)
        except BootseerError:
            # Some registries refuse enroot, whose first question does not say which manifests it takes.
            if not shutil.which("skopeo") or patience.is_over:
                raise
    return digest_in(_inspect(reference, patience), reference)


def download_bytes(reference: Reference, *, timeout_s: float = 60.0) -> int | None:
    """The bytes of a pinned image's layers in the registry, or None where it does not say."""
    return layer_bytes_in(_inspect(reference, Patience(timeout_s)), reference)


def digest_in(content: str, reference: Reference) -> str:
    """The digest that a registry's answer, a manifest or a list of them, says. Raises as `resolve`."""
    manifest = _parse(content, reference)
    digest: object = f"sha256:{hashlib.sha256(content.encode('utf-8', 'surrogateescape')).hexdigest()}"
    if isinstance(manifest.get("manifests"), list):
        digest = _of_this_platform(manifest["manifests"], reference)
    return reference.pinned(str(digest)).digest


def layer_bytes_in(content: str, reference: Reference) -> int | None:
    """The bytes of the layers that a manifest names; None where it does not say.

    Raises RegistryUnreachable.
    """
    try:
        return sum(int(layer["size"]) for layer in _parse(content, reference)["layers"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def run(
    command: list[str],
    name: str,
    *,
    environ: dict[str, str] | None = None,
    folder: Path | None = None,
    watch: Callable[[], None] = lambda: None,
    patience: Patience = Patience(),
) -> str:
    """Run a tool to its end and give what it printed. It and its children die with an error in between.

    name: what it works on, for messages. folder: where it runs. watch: called a few times a second meanwhile.
    Raises what `resolve` does.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environ,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise BootseerError(f"image {name}: {command[0]} cannot be run: {error.strerror}") from error
        try:
            status = _wait(process, f"image {name}: {command[0]}", watch, patience)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        if status:
            raise _failure(command, name, errors.read().decode("utf-8", "replace"), status)
        return output.read().decode("utf-8", "surrogateescape")


def _wait(process: subprocess.Popen[bytes], what: str, watch: Callable[[], None], patience: Patience) -> int:
    """The exit status of a tool. what: for messages. Raises RegistryUnreachable when it takes too long."""
    waited_s = 0.0
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            waited_s += _POLL_S
        watch()
        if patience.is_over:
            raise RegistryUnreachable(f"{what} was not waited for")
        if waited_s >= patience.timeout_s:
            raise RegistryUnreachable(f"{what} had no answer within {patience.timeout_s:g} s")


@contextlib.contextmanager
def skopeo_options(reference: Reference, prefix: str = "") -> Iterator[list[str]]:
    """Options with which skopeo reaches the image's registry; good until the block ends.

    prefix: "src-" for `skopeo copy`.
    """
    options = [f"--{prefix}tls-verify=false"] if _speaks_http(reference) else []
    login = _enroot_login(reference)
    if login is None:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="bootseer-auth-") as folder:  # 0700
        file = Path(folder) / "auth.json"
        auth = base64.b64encode(":".join(login).encode()).decode()
        file.write_text(json.dumps({"auths": {reference.registry: {"auth": auth}}}))
        yield [*options, f"--{prefix}authfile={file}"]


def enroot_environ(reference: Reference) -> dict[str, str]:
    """The environment in which enroot reaches the image's registry."""
    return {**os.environ, **({"ENROOT_ALLOW_HTTP": "y"} if _speaks_http(reference) else {})}


def _ask_enroot(reference: Reference, patience: Patience) -> str:
    command = ["enroot", "digest", reference.enroot_uri]
    environ = enroot_environ(reference)
    output = run(command, reference.name, environ=environ, patience=patience)
    return reference.pinned((output.split() or [""])[-1]).digest


def _inspect(reference: Reference, patience: Patience) -> str:
    with skopeo_options(reference) as options:
        command = ["skopeo", "inspect", "--raw", *options, skopeo_name(reference)]
        return run(command, reference.name, patience=patience)


def skopeo_name(reference: Reference) -> str:
    """The name by which skopeo knows an image."""
    end = f"@{reference.digest}" if reference.digest else f":{reference.tag}"
    return f"docker://{reference.registry}/{reference.repository}{end}"


def _parse(content: str, reference: Reference) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        if isinstance(manifest, dict):
            return manifest
    except (ValueError, RecursionError):
        pass
    raise RegistryUnreachable(f"image {reference.name}: the registry's answer is no manifest")


def _of_this_platform(manifests: list[Any], reference: Reference) -> object:
    """The digest of this machine's image, as `enroot digest` and `skopeo copy` choose it."""
    machine = platform.machine()
    architecture = _ARCHITECTURES.get(machine, machine)
    for each in manifests:
        wanted = each.get("platform") if isinstance(each, dict) else None
        if isinstance(wanted, dict) and (wanted.get("os"), wanted.get("architecture")) == (
            "linux",
            architecture,
        ):
            return each.get("digest")
    raise NotFound(f"image {reference.name}: the registry has none for linux/{architecture}")


def _failure(command: list[str], name: str, errors: str, status: int) -> BootseerError:
    """The error of a tool that failed, by the first line that tells of one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    said = (telling or lines[-1:] or [f"exit status {status}"])[0][-400:]
    text = f"image {name}: {command[0]}: {said}"
    if command[0] not in ("skopeo", "enroot"):
        return BootseerError(text)
    if _ABSENT.search(errors):
        return NotFound(f"image {name}: the registry has no such image", hint=said)
    if _REFUSED.search(errors):
        return BootseerError(text, hint="log in: a line in ~/.config/enroot/.credentials, or `skopeo login`")
    return RegistryUnreachable(text)


def _speaks_http(reference: Reference) -> bool:
    host = reference.registry.partition(":")[0]
    if host == "localhost" or os.environ.get("ENROOT_ALLOW_HTTP"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _enroot_login(reference: Reference) -> tuple[str, str] | None:
    """User and password that enroot's file of credentials has for a registry."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    file = Path(os.environ.get("ENROOT_CONFIG_PATH") or f"{base}/enroot") / ".credentials"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    host = reference.registry.partition(":")[0]
    hosts = _HUB_HOSTS if host == "docker.io" else (host,)
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) < 6 or (words[0], words[2], words[4]) != ("machine", "login", "password"):
            continue
        if words[1] in hosts and reference.user in ("", words[3]):
            return words[3], _password(words[5])
    return None


def _password(text: str) -> str:
    """A password as enroot reads it: one that begins with "$" is a shell's to expand.

    It is the user's own file, read as that user, and enroot's manual has commands of registries in it.
    """
    if not text.startswith("$"):
        return text.split()[0]
    try:
        done = subprocess.run(
            ["sh", "-c", f"echo {text}"],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=_CREDENTIAL_COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BootseerError("enroot's .credentials: the command of a password failed") from error
    return done.stdout.strip()
