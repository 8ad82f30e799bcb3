"""The addresses of a job's nodes, with this machine's real look-ups of names."""

from __future__ import annotations

import socket

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.errors import InputError
from bootseer_slurm.peers.owner.addresses import addresses_of


def test_names_are_looked_up() -> None:
    assert addresses_of(["127.0.0.1", "127.0.0.2"], "{node}", 1) == ("127.0.0.1", "127.0.0.2")
    assert addresses_of(["127.0.0.1", "localhost"], "{node}", 0) == ("127.0.0.1", "127.0.0.1")
    assert addresses_of(["1", "2"], "127.0.0.{node}", 0) == ("127.0.0.1", "127.0.0.2")


def test_a_name_without_an_address_is_said() -> None:
    with pytest.raises(InputError, match=r"no-such-node\.invalid has no address"):
        addresses_of(["127.0.0.1", "no-such-node.invalid"], "{node}", 0)


def test_all_are_of_one_family() -> None:
    assert addresses_of(["::1", "::1"], "{node}", 1) == ("::1", "::1")
    with pytest.raises(InputError, match="family"):
        addresses_of(["127.0.0.1", "::1", "127.0.0.2"], "{node}", 0)


def test_a_node_whose_own_name_means_loopback_listens_where_others_find_it(mocker: MockerFixture) -> None:
    """Debian writes the machine's own name beside 127.0.1.1."""
    names = {"own": "127.0.1.1", "other": "192.0.2.7"}
    real = socket.socket

    def look_up(host: str, *_args: object, **_kwargs: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host], 0))]

    mocker.patch("socket.getaddrinfo", look_up)
    asked = mocker.patch("bootseer_slurm.peers.owner.addresses.socket.socket", wraps=real)
    asked.side_effect = lambda *args: mocker.MagicMock(
        __enter__=lambda self: self, getsockname=lambda: ("192.0.2.5", 0)
    )
    assert addresses_of(["own", "other"], "{node}", 0) == ("192.0.2.5", "192.0.2.7")
