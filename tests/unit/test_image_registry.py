"""Replies of registries, which may say anything."""

from __future__ import annotations

import pytest

from bootseer_slurm.image.reference import registry_reference
from bootseer_slurm.image.registry import layer_bytes_in

IMAGE = registry_reference("ubuntu:22.04")


@pytest.mark.parametrize("size", ["1e999", "-1e999", "NaN", "[]", '"many"', "null"])
def test_a_size_that_is_none_is_not_known(size: str) -> None:
    assert layer_bytes_in(f'{{"layers": [{{"size": {size}}}]}}', IMAGE) is None


def test_sizes_add_up() -> None:
    assert layer_bytes_in('{"layers": [{"size": 7}, {"size": 8}]}', IMAGE) == 15
