"""Hostile inputs, made of valid ones by hypothesis: bytes and values of JSON that change, and two in one.

Pure functions, no files. What is found is shrunk by hypothesis.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

_MOST_EDITS = 4
_LARGEST = sorted({2**bits + more for bits in (7, 8, 15, 16, 31, 32, 63, 64) for more in (-1, 0, 1)} | {0, 1})
_NUMBERS = [struct.pack(form, n) for form in "BHIQ" for n in _LARGEST if n < 256 ** struct.calcsize(form)]
_TOKENS = (
    rb'= , / .. [ ] { } " \ # @sha256: :// file://[ %00 \ud800 1e999 -1 NaN null true [0-9,07-08]'.split()
)
_TOKENS += [b"\0", b"\n", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J"]
_TOKENS += [b"[" * 9000, b'{"a":' * 9000, b"9" * 400, b"9" * 5000, b"n[1-65536]" * 2]
_VALUES: list[Any] = [None, True, False, [], {}, [[]], [None], [[1, 2]], {"": None}, [0] * 300]
_VALUES += [0, 1, -1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf")]
_VALUES += ["", "0", "/", "..", "\0", "\n", "\ud800", "\udcff", "\u202e", "\x1b[2J", "a" * 300, "a" * 5000]
_VALUES += ["file://[", "file:///a%00b", "docker://", f"sha256:{'0' * 64}"]


@st.composite
def hostile(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """An input made of one of these, by one to four changes."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, _MOST_EDITS))):
        way = draw(st.sampled_from(("json", "json", "edit", "edit", "splice", "anything")))
        if way == "json":
            content = _with_other_json(draw, content)
        elif way == "edit":
            content = _edited(draw, content)
        elif way == "splice":
            other = draw(st.sampled_from(seeds))
            content = content[: _position(draw, content)] + other[_position(draw, other) :]
        else:
            at = _position(draw, content)
            content = content[:at] + draw(st.binary(max_size=64)) + content[at:]
    return content


def _position(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, len(content)))


def _edited(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes cut out, put in, put in twice, or written over."""
    begin, end = sorted((_position(draw, content), _position(draw, content)))
    way = draw(st.sampled_from(("cut", "twice", "end", "put", "put", "over", "over")))
    if way == "cut":
        return content[:begin] + content[end:]
    if way == "twice":
        return content[:end] + content[begin:]
    if way == "end":
        return content[:end]
    token = draw(st.sampled_from(_TOKENS + _NUMBERS))
    return content[:begin] + token + content[begin + (len(token) if way == "over" else 0) :]


def _with_other_json(draw: st.DrawFn, content: bytes) -> bytes:
    """The first JSON in it with one value changed or taken out; as it was where there is none."""
    begin = max(content.find(b"{"), 0)
    try:
        document, length = json.JSONDecoder().raw_decode(content[begin:].decode("latin-1"))
    except (ValueError, RecursionError):
        return content
    places = _places(document)
    if not places:
        return content
    holder, key = draw(st.sampled_from(places))
    way = draw(st.sampled_from(("value", "value", "value", "gone", "new", "other")))
    if way == "gone":
        del holder[key]
    elif way == "other":
        other, other_key = draw(st.sampled_from(places))
        holder[key] = json.loads(json.dumps(other[other_key]))
    elif way == "new" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8))] = draw(st.sampled_from(_VALUES))
    else:
        holder[key] = draw(st.sampled_from(_VALUES) | st.integers() | st.text(max_size=40))
    return content[:begin] + json.dumps(document).encode() + content[begin + length :]


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Each place of a value in a document: what holds it, and its key there."""
    places: list[tuple[Any, Any]] = []
    left = [document] if isinstance(document, dict | list) else []
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                left.append(holder[key])
    return places
