"""The pyxis importer (`importer=` in plugstack.conf): where a container's squashfs lies.

    bootseer-importer get URI     prints one path, that of a squashfs
    bootseer-importer release     removes what `get` made for this step; may be called again and again

pyxis runs it as the job's user with SLURM_JOB_ID, SLURM_STEP_ID, SLURM_JOB_UID and PYXIS_RUNTIME_PATH (its
importers/README.md). `get` asks the node agent (op "image": JOB_ID, STEP_ID, URI, and DIGEST when the
registry told it) while it asks the registry what the tag stands for now. The agent answers

    PATH=<path>        the user can open it, and it stays until the job ends;
                       with DIGEST=<what it is of>, unless the store does not say
    NOTFOUND=1         the store has no such image, or not the one of this DIGEST

and then the image is put into the store (library.ensure: one process in the cluster does it) and the agent
is asked again. Whatever goes wrong, the step gets what it would have without Bootseer: `enroot import` into
<PYXIS_RUNTIME_PATH>/<uid>/<job>.<step>.squashfs, as pyxis names it, and one line on stderr says why.

Every step waits for this: arguments are read by hand, and what is heavy is imported when it is needed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from bootseer_slurm.agentapi import client
from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.image.reference import Folder, Reference, SquashfsFile, parse
from bootseer_slurm.signals import exit_on

# A registry that is slower than this is not waited for: what the store has then counts.
REGISTRY_PATIENCE_S = 2.0
# The agent answers as soon as the image's first blocks are there, or its own time for that is over.
_AGENT_TIMEOUT_S = 120.0
_USAGE = "usage: bootseer-importer get URI | bootseer-importer release"
_NUMBER = re.compile(r"[0-9]{1,20}")


def main(arguments: list[str] | None = None) -> None:
    """The command `bootseer-importer`; ends the process with an exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    exit_on(signal.SIGTERM)
    try:
        if len(arguments) == 2 and arguments[0] == "get":
            print(get(arguments[1]), flush=True)
        elif arguments == ["release"]:
            release()
        else:
            raise InputError(_USAGE)
    except BootseerError as error:
        _say(error.message)
        sys.exit(error.exit_status)


def get(uri: str, environ: Mapping[str, str] = os.environ) -> str:
    """The path of a squashfs of the image that pyxis asks for.

    Raises BootseerError when not even `enroot import` gives one.
    """
    try:
        path = _from_agent(uri, environ)
        if path.startswith("/") and "\n" not in path:
            return path
        reason = "the agent's path cannot be used"
    except BootseerError as error:
        reason = error.message
    except Exception as error:  # a fault of ours may not cost the job its start
        reason = f"{type(error).__name__}: {error}"
    _say(f"{reason}; falling back to enroot import")
    return _import_as_pyxis_does(uri, environ)


def release(environ: Mapping[str, str] = os.environ) -> None:
    """Remove the squashfs that `get` made for this step, if it made one. Raises BootseerError."""
    try:
        file = _own_file(environ)
    except InputError:
        return  # without these variables `get` made nothing
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise BootseerError(f"{file}: cannot be removed: {error.strerror}") from error


def _from_agent(uri: str, environ: Mapping[str, str]) -> str:
    """A path of the agent; the image is put into the store when it is not there."""
    source = parse(uri)
    if isinstance(source, SquashfsFile):
        raise InputError(f"image {uri[:80]!r}: a path is not imported")
    question = [
        ("JOB_ID", _number(environ, "SLURM_JOB_ID")),
        ("STEP_ID", _step(environ)),
        ("URI", source.name),
    ]
    asked = _Question(source)
    try:
        reply = _ask(question)
        digest = asked.answer()
    finally:
        asked.close()
    if digest and first(reply, "PATH") and first(reply, "DIGEST") != digest:
        reply = _ask([*question, ("DIGEST", digest)])
    if path := first(reply, "PATH"):
        if asked.asks and digest is None:
            _say(f"{source.name}: its registry did not answer; what the store has is used")
        return path
    if not first(reply, "NOTFOUND"):
        raise BootseerError("the agent gave no path")
    digest = _put_into_store(source, digest, first(question, "JOB_ID"))
    reply = _ask([*question, ("DIGEST", digest)])
    path = first(reply, "PATH")
    if not path:
        raise BootseerError(f"image {source.name}: is in the store, and the agent does not find it")
    return path


def _put_into_store(source: Reference | Folder, digest: str | None, job_id: str) -> str:
    """Have the image in the store; gives its fingerprint there."""
    from bootseer_slurm import config
    from bootseer_slurm.image.library import ensure
    from bootseer_slurm.image.signed_packing import AgentPacking
    from bootseer_slurm.listener import Listener
    from bootseer_slurm.store import open_store

    def stage(text: str, size_bytes: int | None) -> None:
        _say(f"{source.name}: {text}")

    settings = config.load()
    signs = settings.image.kernel_mount != "off"
    packing = AgentPacking(settings.agent.socket, job_id, warn=_say) if signs else None
    store, listener = open_store(settings.store.uri), Listener(stage=stage, warn=_say)
    return ensure(store, source, digest=digest, packing=packing, listener=listener).fingerprint


class _Question:
    """The digest of a tag, asked of the registry in a thread, for as long as the user can wait."""

    def __init__(self, source: Reference | Folder) -> None:
        self.asks = isinstance(source, Reference) and not source.digest
        self._digest: str | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if isinstance(source, Reference) and self.asks:
            self._thread = threading.Thread(target=self._ask, args=(source,), daemon=True)
            self._thread.start()

    def _ask(self, reference: Reference) -> None:
        from bootseer_slurm.image import registry

        try:
            self._digest = registry.resolve(reference, timeout_s=REGISTRY_PATIENCE_S, cancelled=self._over)
        except BootseerError:
            pass  # then the agent's answer counts; where an import is needed, it says what is wrong

    def answer(self) -> str | None:
        """The digest, or None when the registry does not tell it in time."""
        if self._thread is not None:
            self._thread.join(REGISTRY_PATIENCE_S)
        return self._digest

    def close(self) -> None:
        """Wait for no answer any more; the tool that asks does not outlive this process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def _ask(question: Message) -> Message:
    return client.request("image", question, timeout_s=_AGENT_TIMEOUT_S)


def _import_as_pyxis_does(uri: str, environ: Mapping[str, str]) -> str:
    """`enroot import` to the file that pyxis itself would have made."""
    file = _own_file(environ)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # of this step's earlier run; enroot refuses to overwrite it
    except OSError as error:
        raise BootseerError(f"{file}: cannot be made: {error.strerror}") from error
    process = None
    try:
        process = subprocess.Popen(
            ["enroot", "import", "--output", str(file), uri],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
        status = process.wait()
        if status:
            raise BootseerError(f"image {uri[:200]!r}: enroot import failed with exit status {status}")
    except FileNotFoundError:
        raise BootseerError(
            f"image {uri[:200]!r}: cannot be imported: enroot is not installed on this node"
        ) from None
    except BaseException:
        if process is not None:
            process.terminate()  # it removes its own temporary files then
            process.wait()
        file.unlink(missing_ok=True)
        raise
    return str(file)


def _own_file(environ: Mapping[str, str]) -> Path:
    """The file of this step in pyxis's folder. Raises InputError when the variables are not there."""
    folder = environ.get("PYXIS_RUNTIME_PATH", "")
    if not folder.startswith("/"):
        raise InputError("PYXIS_RUNTIME_PATH is not set: pyxis did not call this")
    job, step = _number(environ, "SLURM_JOB_ID"), _step(environ)
    return Path(folder) / _number(environ, "SLURM_JOB_UID") / f"{job}.{step}.squashfs"


def _number(environ: Mapping[str, str], key: str) -> str:
    value = environ.get(key, "")
    if not _NUMBER.fullmatch(value):
        raise InputError(f"{key} is not set to a number: pyxis did not call this")
    return value


def _step(environ: Mapping[str, str]) -> str:
    """The step's number; the batch script's own step has none."""
    return _number(environ, "SLURM_STEP_ID") if environ.get("SLURM_STEP_ID") else "batch"


def _say(message: str) -> None:
    print(f"bootseer: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
