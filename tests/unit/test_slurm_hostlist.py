"""Hostlists: syntax, round trips, bad input, and agreement with the real scontrol."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.slurm.hostlist import MAX_NODES, expand, fold

GOOD = [
    ("", []),
    ("n1", ["n1"]),
    ("login", ["login"]),
    ("n[1-3,07-09],x", ["n1", "n2", "n3", "n07", "n08", "n09", "x"]),
    ("n[8-010]", ["n8", "n9", "n10"]),
    ("n[99-101]", ["n99", "n100", "n101"]),
    ("n[09,1]", ["n09", "n1"]),
    ("n[000-002]", ["n000", "n001", "n002"]),
    ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
    ("n[1-2][3-4]", ["n13", "n14", "n23", "n24"]),
    ("rack-1.gpu[1,3]", ["rack-1.gpu1", "rack-1.gpu3"]),
    ("n1,n1", ["n1", "n1"]),
    (",n1,,n2", ["n1", "n2"]),
    ("[1-2]", ["1", "2"]),
]

BAD = [
    "n[1-",
    "n[3-1]",
    "n[]",
    "n[a-b]",
    "n[1-3]x",
    "n[1 -3]",
    "n[1,2",
    "a]b",
    "n[1-3,]",
    "n[1--3]",
    "n[[1-2]]",
    "n[1-65537]",
    "n[1-300][1-300]",
    "n[1-60000],m[1-60000]",
    "n[0-999999999999]",
    "n[1-99999999999999999999]",
    "n 1",
    "n1\nn2",
    "n1;reboot",
    "(null)",
    "nö1",
    "n[1-2]" * 300,
    "x" * 300,
    "n1," * 400_000,
    "n1," * 340_000,
    "[" * 500_000,
    ",[" * 400_000,
]


@pytest.mark.parametrize(("hostlist", "names"), GOOD)
def test_expand_gives_the_names_in_order(hostlist: str, names: list[str]) -> None:
    assert expand(hostlist) == names


@pytest.mark.parametrize("hostlist", BAD, ids=lambda text: text[:20])
def test_expand_refuses_bad_input_with_a_short_message(hostlist: str) -> None:
    with pytest.raises(BootseerError) as caught:
        expand(hostlist)
    assert len(caught.value.message) < 250
    assert "\n" not in caught.value.message


def test_expand_takes_the_largest_list_that_is_allowed() -> None:
    assert len(expand(f"n[1-{MAX_NODES}]")) == MAX_NODES


@pytest.mark.parametrize(
    ("names", "hostlist"),
    [
        ([], ""),
        (["n1"], "n1"),
        (["n3", "n1", "n2", "n2"], "n[1-3]"),
        (["n07", "n08", "n09", "n10", "n11"], "n[07-11]"),
        (["n9", "n10", "n11", "x", "x1", "n7"], "n[7,9-11],x,x1"),
        (["a1b1", "a1b2", "a2b1", "a2b2"], "a1b[1-2],a2b[1-2]"),
        (["n", "n1"], "n,n1"),
    ],
)
def test_fold(names: list[str], hostlist: str) -> None:
    assert fold(names) == hostlist


@pytest.mark.parametrize("name", ["", "n[1]", "a b", "a,b", "x" * 300])
def test_fold_refuses_what_is_no_name(name: str) -> None:
    with pytest.raises(BootseerError):
        fold([name])


def random_names(source: random.Random) -> list[str]:
    names = set()
    for _ in range(source.randint(1, 40)):
        prefix = source.choice(["n", "gpu-", "a1b", "rack.2x", "x"])
        width = source.choice([1, 1, 2, 3, 4])
        names.add(prefix + (f"{source.randint(0, 120):0{width}d}" if source.random() < 0.9 else ""))
    return sorted(names)


def test_fold_then_expand_returns_every_name_once() -> None:
    source = random.Random(20260101)
    for _ in range(500):
        names = random_names(source)
        folded = fold(names)
        assert sorted(expand(folded)) == names
        assert fold(expand(folded)) == folded


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed")
def test_agrees_with_scontrol(tmp_path: Path) -> None:
    """scontrol expands without any daemon, but wants a slurm.conf."""
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\n")

    def scontrol(hostlist: str) -> list[str]:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", hostlist],
            env={**os.environ, "SLURM_CONF": str(conf)},
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.split()

    for hostlist, names in GOOD:
        if hostlist:
            assert scontrol(hostlist) == names, hostlist
    source = random.Random(7)
    for _ in range(40):
        names = random_names(source)
        assert sorted(scontrol(fold(names))) == names
