"""Random damage to bytes, texts and nested plain values."""

from __future__ import annotations

import json
import math
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e-320, 1e308, 0.1, math.nan, math.inf),
    *("", " ", "x", "nan", "1e999", "../../x", "/dev/full", "\u0000", "\udc80", "é" * 300, "a\nb", "%s{}$(x)", "-1"),
    *([], {}, [[]], [0, 1], {"": 0}, {"a": {"b": []}}),
)


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """One accident, or a few: bits, bytes, cuts, doublings, exchanges."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if not found:
            return bytes(draw.randrange(256) for _ in range(draw.randrange(40)))
        start = draw.randrange(len(found))
        end = min(len(found), start + draw.choice((1, 1, 2, 4, 8, 64, 1000)))
        kind = draw.randrange(7)
        if kind == 0:
            found[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
        elif kind == 2:
            del found[start:]
        elif kind == 3:
            del found[start:end]
        elif kind == 4:
            found[start:start] = found[start:end]
        elif kind == 5:
            found[start:end] = b"\xff" * (end - start)
        else:
            other = draw.randrange(len(found))
            found[start], found[other] = found[other], found[start]
    return bytes(found)


def of_text(text: str, draw: random.Random) -> str:
    """A number, a word or a line exchanged for another one, or the bytes damaged."""
    if draw.random() < 0.3:
        return of_bytes(text.encode("utf-8", "surrogateescape"), draw).decode(
            "utf-8", draw.choice(("ignore", "surrogateescape"))
        )
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, draw.choice(lines))
    elif kind == 2:
        other = draw.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        odd = str(draw.choice(ODD))
        parts = lines[at].split(draw.choice((",", "=", " ", ".")))
        parts[draw.randrange(len(parts))] = odd
        lines[at] = draw.choice((",", "=", " ", ".")).join(parts)
    return "\n".join(lines)


def of_value(value: Any, draw: random.Random) -> Any:
    """Nested plain values with one of them exchanged, removed, or added."""
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, item in pairs:
            places.append((inner, key))
            visit(item)

    copied = [json.loads(json.dumps(value))]
    visit(copied[0])
    holder, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(draw.choice(ODD))] = holder[key]
    elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = draw.choice((-holder[key], holder[key] + 1, holder[key] * 1e9, str(holder[key])))
    else:
        holder[key] = draw.choice(ODD)
    return copied[0]
