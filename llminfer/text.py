"""From drawn tokens to text, one token at a time: stop strings, and what may already be shown."""

from __future__ import annotations

from typing import Any


class TextStream:
    """The text of one sequence. `text` is all of it so far; `shown` is the part that can no longer change: it never
    ends in half a character, nor in what may be the beginning of a stop string."""

    def __init__(self, detokenizer: Any, stops: tuple[str, ...]):
        self.detokenizer = detokenizer
        self.stops = stops
        self.text = ""
        self.shown = 0

    def push(self, token: int, *, may_stop: bool = True) -> bool:
        """Adds a token. True when a stop string is complete: the text then ends before it. may_stop: whether one that this token
        completes counts."""
        if self.detokenizer is None:
            return False
        return self._grow(self.detokenizer.push([token]), may_stop)

    def finish(self, *, may_stop: bool = True) -> bool:
        """The sequence has ended: releases what was held back. True as for push."""
        found = self._grow(self.detokenizer.flush(), may_stop) if self.detokenizer is not None else False
        self.shown = len(self.text)
        return found

    def _grow(self, new: str, may_stop: bool) -> bool:
        if not new:
            return False
        before = len(self.text)
        self.text += new
        # Only what ends in the new text: one that was complete before did not count.
        places = [at for stop in self.stops if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if places and may_stop:
            self.text = self.text[: min(places)]
            self.shown = len(self.text)
            return True
        held = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        self.shown = max(self.shown, len(self.text) - held)
        return False
