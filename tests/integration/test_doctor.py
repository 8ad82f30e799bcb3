"""What `bootseer doctor` finds, on nodes that are put together here."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bootseer_slurm import config as configuration
from bootseer_slurm.cli import doctor, peers
from bootseer_slurm.config import Config

STAND_IN = Path(__file__).resolve().parents[2] / "libexec" / "squashfuse"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "bootseer.toml"
    file.write_text(
        f"""
        [store]
        uri = "file://{tmp_path}/store"
        [cache]
        path = "{tmp_path}/none/yet"
        min_free = "1KiB"
        [agent]
        socket = "{tmp_path}/agent.sock"
        [image]
        site_key = "{tmp_path}/site.key"
        [records]
        path = "{tmp_path}/records"
        """
    )
    (tmp_path / "store").mkdir()
    return configuration.load(file, environ={})


@pytest.fixture
def bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    folders = tmp_path / "local", tmp_path / "usr"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(doctor, "_STEP_PATH", ":".join(map(str, folders)))
    monkeypatch.setattr(doctor, "_PLUGSTACK", tmp_path / "slurm")
    return folders


def _program(path: Path, text: str = "#!/bin/sh\n") -> None:
    path.write_text(text)
    path.chmod(0o755)


def _found(config: Config) -> dict[str, tuple[bool | None, str]]:
    return {finding.thing: (finding.works, finding.meaning) for finding in doctor.findings(config)}


@pytest.mark.usefixtures("bins")
def test_a_bare_node(config: Config, tmp_path: Path) -> None:
    found = _found(config)
    for thing in ("stand-in for squashfuse", "squashfuse", "squashfuse_ll", "enroot"):
        assert found[thing][0] is False
    assert found["store"][0] is True
    assert found["cache"][0] is True
    assert found["digests"][0] is True
    assert found["pyxis importer"][0] is None
    (tmp_path / "store").rmdir()
    (tmp_path / "store").touch()
    assert _found(config)["store"][0] is False


def test_how_environments_are_shown(config: Config, bins: tuple[Path, Path]) -> None:
    _, usr = bins
    assert _found(config)["environments"][0] is False
    for name, meaning in (
        ("unsquashfs", "unsquashfs"),
        ("squashfuse", "by squashfuse"),
        ("squashfuse_ll", "_ll"),
    ):
        _program(usr / name)
        works, shown = _found(config)["environments"]
        assert works and meaning in shown, name


def test_the_stand_in_has_to_come_first(config: Config, bins: tuple[Path, Path]) -> None:
    local, usr = bins
    shutil.copy(STAND_IN, local / "squashfuse")
    assert "real one is missing" in _found(config)["stand-in for squashfuse"][1]
    assert _found(config)["squashfuse"][0] is False
    _program(usr / "squashfuse")
    assert _found(config)["stand-in for squashfuse"][0] is True
    assert _found(config)["squashfuse"] == (True, str(usr / "squashfuse"))
    (local / "squashfuse").rename(usr / "other")
    (usr / "squashfuse").rename(local / "squashfuse")
    (usr / "other").rename(usr / "squashfuse")
    assert "comes first" in _found(config)["stand-in for squashfuse"][1]


@pytest.mark.parametrize(
    ("said", "works", "meaning"),
    [
        ("echo 'JobContainerType        = job_container/none'", True, "Slurm gives it none"),
        ("echo 'JobContainerType        = (null)'", True, "Slurm gives it none"),
        ("echo 'NamespaceType           = (null)'", True, "Slurm gives it none"),
        (
            "echo 'JobContainerType        = job_container/tmpfs'",
            True,
            "job_container/tmpfs: each step is shown",
        ),
        ("echo 'NamespaceType           = namespace/tmpfs'", True, "namespace/tmpfs: each step is shown"),
        ("echo 'NamespaceType           = namespace/linux'", True, "namespace/linux: each step is shown"),
        ("echo 'JobContainerType        = job_container/cncu'", None, "job_container/cncu was not tried"),
        ("echo no such host >&2; exit 1", None, "scontrol: no such host"),
        ("exec sleep 60", None, "scontrol did not answer in 0.2 s"),
    ],
    ids=range(9),
)
def test_namespace_of_a_job(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    works: bool | None,
    meaning: str,
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    _program(folder / "scontrol", f"#!/bin/sh\n[ \"$*\" = 'show config' ] || exit 2\n{said}\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "_SLURM_TIMEOUT_S", 0.2 if "sleep" in said else 20.0)
    found = _found(config)["namespace of a job"]
    assert found[0] is works
    assert found[1].startswith(meaning)


def test_a_node_without_scontrol(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert _found(config)["namespace of a job"] == (None, "scontrol is not installed here")


def test_enroot_and_pyxis(config: Config, bins: tuple[Path, Path], tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    script = f'config::export ENROOT_SYSCONF_PATH     "{etc}"\nconfig::export ENROOT_NATIVE_OVERLAYFS {{}}\n'
    _program(bins[0] / "enroot", script.format("true"))
    assert _found(config)["enroot's kernel overlay"][0] is True
    (etc / "enroot.conf").write_text("#ENROOT_NATIVE_OVERLAYFS yes\nENROOT_NATIVE_OVERLAYFS no\n")
    assert _found(config)["enroot's kernel overlay"][0] is False
    (etc / "enroot.conf").write_text("#ENROOT_NATIVE_OVERLAYFS no\nENROOT_NATIVE_OVERLAYFS   yes\n")
    _program(bins[0] / "enroot", script.format("false"))
    assert _found(config)["enroot's kernel overlay"][0] is True

    plugstack = tmp_path / "slurm" / "plugstack.conf.d"
    plugstack.mkdir(parents=True)
    line = "required /usr/lib/slurm/spank_pyxis.so"
    for text, works in (
        ("", False),
        (line, False),
        (f"{line} importer=/usr/libexec/bootseer-importer", False),
        (f"#{line} importer=/usr/libexec/bootseer-importer use_squashfuse=1", False),
        (f"{line} importer=/usr/libexec/bootseer-importer use_squashfuse=1", True),
    ):
        (plugstack / "pyxis.conf").write_text(text)
        assert _found(config)["pyxis importer"][0] is works


@pytest.mark.fuse
@pytest.mark.usefixtures("bins")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try mounts")
def test_the_site_key_decides_over_kernel_mounts(config: Config) -> None:
    from bootseer_slurm.image.signing import make_key

    assert "site.key" in _found(config)["site key"][1]
    assert _found(config)["kernel mounts"][0] is False
    make_key(config.image.site_key)
    found = _found(config)
    assert found["site key"][0] is True
    steps = ("loop devices", "squashfs driver", "idmapped mounts", "locked mounts", "attached by a user")
    assert found["kernel mounts"][0] is all(found[step][0] for step in steps)
    config.image.site_key.chmod(0o644)
    assert "0600" in _found(config)["site key"][1]


@pytest.mark.usefixtures("bins")
def test_the_table(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bootseer_slurm.cli.settings.config", lambda: config)
    doctor.doctor()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("squashfuse_ll") and " no " in line for line in lines)


@pytest.mark.usefixtures("bins")
def test_the_machine_that_collects_is_told_from_others_and_late_ones_from_well_ones(
    config: Config, tmp_path: Path
) -> None:
    assert _found(config)["records"][0] is None
    (tmp_path / "records").mkdir()
    lock = tmp_path / "records" / "lock"
    lock.touch()
    assert _found(config)["records"][0] is True
    os.utime(lock, (1_000_000_000, 1_000_000_000))
    works, meaning = _found(config)["records"]
    assert works is False and "bootseer-collect.timer" in meaning


@pytest.fixture
def ports() -> range:
    """Three ports side by side that are free."""
    for first in range(40_000, 60_000, 3):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + 3):
                stack.enter_context(socket.socket()).bind(("", port))
            return range(first, first + 3)
    raise AssertionError("no ports are free")


@pytest.mark.skipif(os.geteuid() != 0, reason="a site key is root's")
def test_what_a_node_needs_to_be_a_peer(
    config: Config, ports: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bootseer_slurm.image.signing import make_key

    address = "127.0.0.1"
    # An address of this machine that is not loopback, where it has one.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, contextlib.suppress(OSError):
        asked.connect(("192.0.2.1", 9))
        address = asked.getsockname()[0]

    def state(**changes: object) -> tuple[bool | None, str]:
        named = replace(config.peers, **{"ports": tuple(ports), "address": address, **changes})  # type: ignore[arg-type]
        return peers.state(replace(config, peers=named))

    assert "bootseer image make-key" in state()[1] and state()[0] is False
    assert state(mode="off") == (False, "off by configuration: [peers] mode")
    make_key(config.image.site_key)
    shown = f"{ports[0]}-{ports[-1]}"
    if address != "127.0.0.1":
        assert state() == (True, f"on: {address} is {address}; 3 of ports {shown} are free")
        with socket.create_server((address, ports[1])):
            assert state() == (True, f"on: {address} is {address}; 2 of ports {shown} are free")
            works, meaning = state(ports=(ports[1],))
            assert works is None and f"; 0 of ports {ports[1]} are free; nodes" in meaning
    works, meaning = state(address="127.0.0.1")
    assert works is None and "on another node" in meaning
    assert state(address="192.0.2.77")[1].endswith("is no address of this node: others cannot connect to it")
    works, meaning = state(address="{node}.invalid")
    assert works is False and f"{peers.own_name()}.invalid has no address" in meaning
    # The process has its user's rights.
    (tmp_path / "start").write_text(f"{ports[2]}\n")
    monkeypatch.setattr(peers, "_PORT_START", tmp_path / "start")
    assert f"1 of ports {shown} are free" in state(address="127.0.0.1")[1]


@pytest.mark.usefixtures("bins")
def test_peers_are_one_line_of_the_table(config: Config) -> None:
    found = _found(replace(config, peers=replace(config.peers, mode="off")))
    assert found["peers"] == (False, "off by configuration: [peers] mode")


def _reach(tmp_path: Path, ports: range, nodelist: str) -> tuple[int, list[str]]:
    """Exit status and lines of `bootseer doctor --peers`."""
    file = tmp_path / "peers.toml"
    file.write_text(f'[peers]\naddress = "127.0.{{node}}"\nports = "{ports[0]}-{ports[-1]}"\n')
    command = [sys.executable, "-m", "bootseer_slurm", "--config", file, "doctor", "--peers", nodelist]
    environ = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, [line.strip() for line in (done.stdout or done.stderr).splitlines()]


def test_nodes_of_a_list_are_reached_or_not(tmp_path: Path, ports: range) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(socket.create_server(("127.0.3.1", ports[1])))
        status, lines = _reach(tmp_path, ports, "3.[1-2],3.1")
        assert status == 0
        assert lines[-1] == "nodes: 1 accepted, 1 refused"
        assert lines[-3].startswith("3.1") and lines[-3].endswith(f"listens on {ports[1]}")
        assert lines[-2].startswith("3.2") and lines[-2].endswith("fine while no job with peers runs")

        stack.enter_context(socket.create_server(("127.0.3.1", ports[2]), backlog=0))
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.3.1", ports[2]))
        status, lines = _reach(tmp_path, ports, "3.[1-2],x.invalid")
        assert status == 1
        assert lines[-1] == "nodes: 1 refused, 1 silent, 1 no address"
        assert f"no answer of {ports[2]} in 0.5 s" in lines[-3]
        assert "127.0.x.invalid is not known here" in lines[-2]


@pytest.mark.parametrize("nodelist", ["", "n[1-"])
def test_what_is_no_nodelist_is_an_input_error(tmp_path: Path, ports: range, nodelist: str) -> None:
    status, lines = _reach(tmp_path, ports, nodelist)
    assert status == 2 and "nodelist" in lines[0]
