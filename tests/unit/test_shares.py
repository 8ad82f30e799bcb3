"""What the users of a node share: half for each at most, and no more than there is for all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.errors import InputError
from bootseer_slurm.shares import Share, shares_of


def test_no_user_takes_more_than_half_nor_all_more_than_there_is() -> None:
    share = Share("memory", 100)
    share.take(1, 50)
    with pytest.raises(InputError, match="not shown: user 1's share of this node's memory is used up"):
        share.take(1, 1)
    share.take(2, 40)
    with pytest.raises(InputError, match="memory is used up by all users together"):
        share.take(3, 11)
    share.take(3, 10)
    share.give_back(1, 50)
    share.give_back(2, 40)
    share.take(1, 50)


def test_a_small_node_shares_less(tmp_path: Path, mocker: MockerFixture) -> None:
    """Digests lie in /run, whose other users are not to find it full."""
    disk = mocker.Mock(f_blocks=100_000, f_frsize=4096)
    mocker.patch.object(os, "statvfs", return_value=disk)
    mocker.patch.object(os, "sysconf", side_effect={"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4096}.__getitem__)
    shares = shares_of(tmp_path)
    shares.digests.take(1, 51_200_000)
    with pytest.raises(InputError):
        shares.digests.take(1, 1)
    shares.plans.take(1, 128_000)
    with pytest.raises(InputError):
        shares.plans.take(1, 1)
    disk.f_blocks = 0  # a tmpfs without a bound
    shares_of(tmp_path).digests.take(1, 2**29)
