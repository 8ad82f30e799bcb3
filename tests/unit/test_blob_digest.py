"""The digests of blocks: which there are, what they are, and a Python that lacks one of them."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

from bootseer_slurm.blob.digest import BLAKE3, NO_DIGEST, PREFERRED, SHA256, check_digest, digest_of
from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.errors import IntegrityError

# Of b"abc": FIPS 180-4, and the test vectors of the BLAKE3 team.
KNOWN = {
    SHA256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    BLAKE3: "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
}
# Runs its argument's lines in a Python that has no package blake3.
WITHOUT = "import sys\nsys.modules['blake3'] = None\n"


def mapped(content: bytes) -> mmap.mmap:
    made = mmap.mmap(-1, len(content))
    made[:] = content
    return made


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda content: memoryview(mapped(content))])
def test_any_buffer_has_the_digest_that_others_compute(name: str, kind: type[memoryview]) -> None:
    digest = digest_of(name, kind(b"abc"))
    assert digest.hex() == KNOWN[name]
    layout = Layout(3, digest=name)
    for kept in (digest, bytearray(digest), mapped(digest)):
        assert list(layout.wrong_blocks(kept, range(1), kind(b"abc"))) == []
        assert list(layout.wrong_blocks(kept, range(1), kind(b"abd"))) == [0]


def test_a_block_without_a_digest_is_wrong() -> None:
    assert list(Layout(3).wrong_blocks(NO_DIGEST, range(1), b"abc")) == [0]


def test_wrong_blocks_are_told_by_their_numbers_in_the_blob() -> None:
    layout = Layout(10, block_bytes=4)
    content = memoryview(b"aaaabbbbcc")
    digests = layout.digests_of(content)
    assert list(layout.wrong_blocks(digests, range(3), content)) == []
    assert list(layout.wrong_blocks(digests, range(1, 3), memoryview(b"bbbbcx"))) == [2]
    assert list(layout.wrong_blocks(digests, range(3), content[:8])) == [2], "what is not there is wrong"


def test_new_blobs_have_the_faster_one() -> None:
    assert PREFERRED == BLAKE3


@pytest.mark.parametrize("name", ["md5", "xxh3", "", "SHA256", None, 3, ["sha256"], "x" * 4000])
def test_an_unknown_digest_is_refused_in_one_line(name: object) -> None:
    with pytest.raises(IntegrityError, match="which this version does not know") as caught:
        check_digest(name)
    assert len(caught.value.message) < 110 and "\n" not in caught.value.message


def without_blake3(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_python_without_blake3_writes_and_reads_sha256() -> None:
    old = Manifest("image", Layout(5, digest=SHA256), digest_of(SHA256, b"bytes")).encode()
    assert (
        without_blake3(
            "from bootseer_slurm.blob.digest import PREFERRED\n"
            "from bootseer_slurm.blob.manifest import decode\n"
            f"print(PREFERRED, decode({old!r}).agrees(0, b'bytes'), decode({old!r}).agrees(0, b'bytez'))"
        )
        == "sha256 True False"
    )


def test_a_python_without_blake3_says_what_it_lacks() -> None:
    new = Manifest("image", Layout(5, digest=BLAKE3), digest_of(BLAKE3, b"bytes")).encode()
    said = without_blake3(
        "from bootseer_slurm.blob.manifest import decode\n"
        "from bootseer_slurm.errors import IntegrityError\n"
        f"try: decode({new!r})\n"
        "except IntegrityError as error: print(error.message, '|', error.hint)"
    )
    assert said == (
        "manifest cannot be used: its digests are blake3, and this Python lacks the package blake3"
        " | pip install 'blake3>=1.0'"
    )
