"""What devices say to each other in a compiled program: its collectives, read out of XLA's text."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all", "collective-broadcast")
_OP = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """kind: one of KINDS; shapes: of what it gives, one for each array (an asynchronous one names its operands too); scope: the names of
    functions and scopes around the operation that it comes from, outermost first."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    scope: tuple[str, ...]


def collectives(text: str, scope: str = "") -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`; of those inside the scope of that name only. The body of a loop counts
    once, however often it runs: so do all layers under a scan, while layers that are unrolled are counted each."""
    found = []
    for line in text.splitlines():
        if (match := _OP.search(line)) is None:
            continue
        name = _NAME.search(line)
        names = tuple(name.group(1).split("/")) if name else ()
        if scope and scope not in names:
            continue
        shapes = tuple(tuple(int(n) for n in sizes.split(",") if n) for sizes in _ARRAY.findall(match["shape"]))
        found.append(Collective(match["kind"], shapes, names))
    return found
