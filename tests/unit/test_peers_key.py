"""Proofs of peers: who has the job's key, and nobody else."""

from __future__ import annotations

import pytest

from bootseer_slurm.peers.key import KEY_BYTES, Connects, Listens, NoProof, job_key

KEY = job_key(b"s" * 32, job=7, restart=0, uid=1000)
A, B, C = bytes(32), b"b" * 32, b"c" * 32


PLACE = ("10.0.0.1", 7070)


def listens(connects: Connects, key: bytes = KEY, *, node: int = 1, nonce: bytes = B) -> Listens:
    return Listens(key, node=node, nodes=4, nonce=nonce, hello=connects.hello, place=PLACE)


def test_both_ends_with_the_key_believe_each_other() -> None:
    connects = Connects(KEY, node=2, to=1, nonce=A)
    other = listens(connects)
    other.check(connects.prove(other.reply, PLACE))
    assert other.other == 2


def test_a_key_is_of_one_start_of_one_job_of_one_user() -> None:
    given = {"job": 7, "restart": 0, "uid": 1000}
    keys = {KEY, job_key(b"t" * 32, **given)}
    keys |= {job_key(b"s" * 32, **(given | {name: 8})) for name in given}
    assert len(keys) == 5 and {len(key) for key in keys} == {KEY_BYTES}


@pytest.mark.parametrize("key", [job_key(b"s" * 32, job=8, restart=0, uid=1000), b"\0" * 32])
def test_another_key_is_refused_at_both_ends(key: bytes) -> None:
    connects = Connects(key, node=2, to=1, nonce=A)
    other = listens(connects)
    with pytest.raises(NoProof):
        connects.prove(other.reply, PLACE)
    with pytest.raises(NoProof):
        other.check(Connects(key, node=2, to=1, nonce=A).prove(listens(connects, key).reply, PLACE))


def test_what_was_said_before_proves_nothing() -> None:
    connects = Connects(KEY, node=2, to=1, nonce=A)
    said = connects.prove(listens(connects).reply, PLACE)
    with pytest.raises(NoProof):
        listens(connects, nonce=C).check(said)
    with pytest.raises(NoProof):
        Connects(KEY, node=2, to=1, nonce=C).prove(listens(connects).reply, PLACE)


def test_a_proof_is_of_its_side_and_of_its_nodes() -> None:
    connects = Connects(KEY, node=2, to=1, nonce=A)
    with pytest.raises(NoProof):  # another node answers for it
        connects.prove(listens(connects, node=3).reply, PLACE)
    other = listens(connects)
    with pytest.raises(NoProof):  # its own proof comes back
        other.check(other.reply[32:])


@pytest.mark.parametrize("node", [1, 4, 2**32 - 1])
def test_who_is_no_other_node_of_the_job_is_refused(node: int) -> None:
    with pytest.raises(NoProof):
        listens(Connects(KEY, node=node, to=1, nonce=A))


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(26), bytes(45)])
def test_what_is_no_hello_is_refused(hello: bytes) -> None:
    with pytest.raises(NoProof):
        Listens(KEY, node=1, nodes=4, nonce=B, hello=hello, place=PLACE)


def test_a_proof_is_of_the_place_that_was_connected_to() -> None:
    """Somebody on the same node took the first port, and passes on what both ends say."""
    connects = Connects(KEY, node=2, to=1, nonce=A)
    other = listens(connects)
    with pytest.raises(NoProof):
        connects.prove(other.reply, ("10.0.0.1", 7069))
    with pytest.raises(NoProof):
        connects.prove(other.reply, ("10.0.0.2", 7070))
