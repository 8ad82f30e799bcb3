"""The units of conf/systemd: settings without which any user could stop a service."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.peers.child import links
from bootseer_slurm.report import answer

UNITS = Path(__file__).resolve().parents[2] / "conf" / "systemd"


def settings(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z]+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE))


def test_a_flood_of_connections_cannot_stop_the_answer_socket() -> None:
    """systemd fails a socket for good after 200 connections in 2 s, unless this limit is off."""
    unit = settings("bootseer-answer.socket")
    assert unit["Accept"] == "yes" and unit["TriggerLimitIntervalSec"] == "0"
    assert int(unit["MaxConnections"]) == 64, "what bounds the load instead"
    assert int(unit["MaxConnectionsPerSource"]) == answer._MOST_OF_USER < 64
    assert settings("bootseer-answer@.service")["RuntimeDirectory"], (
        "where older systemd's connections are counted"
    )


def test_the_agents_unit_leaves_peers_the_network_and_their_files() -> None:
    """A job's peer process listens on TCP, and inherits what the unit allows."""
    unit = settings("bootseer-agent.service")
    forbid = {
        "IPAddressDeny",
        "IPAddressAllow",
        "SocketBindDeny",
        "SystemCallFilter",
        "RestrictNetworkInterfaces",
    }
    assert not forbid & unit.keys()
    assert unit.get("PrivateNetwork", "no") == "no"
    families = unit.get("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6").split()
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(families)
    assert int(unit["LimitNOFILE"]) >= links._MOST_LINKS + links._SPARE_FILES
    assert unit["TasksMax"] == "infinity", "each job has a process more"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_each_setting(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():  # the program is not installed here
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/bootseer", "/bin/true"))
    units = [tmp_path / name for name in ("bootseer-answer.socket", "bootseer-answer@.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
