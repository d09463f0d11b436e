"""The page tables: which physical page of which group holds which tokens. Reference counts, chained content hashes,
reuse in least-recently-used order. Imports no jax.

A page is free (count 0) or owned. A full page whose content is known keeps its hash when it is freed, and stays in the
free list as a cached page until it is its turn to be reused. Every group hashes the same tokens, so one chain of
digests serves all groups of a sequence.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from llminfer.request import Request, Sequence


class Group:
    """The pages of the layers of one window (0: all positions). sinks: first pages of a sequence that it never leaves behind.
    holders: devices that the pages lie on, one range of `total` // holders on each; the pages of a sequence go around them."""

    def __init__(self, window: int, total: int, sinks: int = 0, holders: int = 1):
        self.window = window
        self.sinks = sinks
        self.total = total
        self.holders = holders
        self.part = max(1, total // holders)
        ranges = (range(first, first + self.part) for first in range(0, total, self.part))
        self.free_on: list[OrderedDict[int, None]] = [OrderedDict.fromkeys(pages) for pages in ranges]  # oldest first
        self.count = [0] * total
        self.page_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> list[int]:
        """The pages that can be had, cached ones included."""
        return [page for pages in self.free_on for page in pages]

    def can_take(self, first: int, count: int) -> bool:
        """Whether `count` pages can be had, on the devices first, first + 1, ..."""
        each = ((first + i, -(-(count - i) // self.holders)) for i in range(min(count, self.holders)))
        return all(some <= len(self.free_on[holder % self.holders]) for holder, some in each)

    def take(self, holder: int = 0) -> int:
        """A page of a device (round and round) to write on: the one unused for longest; what it cached is forgotten."""
        page, _ = self.free_on[holder % self.holders].popitem(last=False)
        if (digest := self.hash_of.pop(page, None)) is not None:
            del self.page_of[digest]
        self.count[page] = 1
        return page

    def share(self, page: int) -> None:
        if self.count[page] == 0:
            del self.free_on[page // self.part][page]
        self.count[page] += 1

    def drop(self, page: int) -> None:
        self.count[page] -= 1
        if self.count[page] == 0:
            free = self.free_on[page // self.part]
            free[page] = None
            if page not in self.hash_of:  # nothing to find there: reuse it first
                free.move_to_end(page, last=False)

    def remember(self, page: int, digest: bytes) -> None:
        if digest not in self.page_of and page not in self.hash_of:
            self.page_of[digest] = page
            self.hash_of[page] = digest

    def chain(self, digests: list[bytes], known: int) -> int:
        """How many of the first `known` pages are cached, on devices that follow each other."""
        first = self.page_of.get(digests[0], 0) // self.part if known else 0
        follows = lambda i: (page := self.page_of.get(digests[i])) is not None and (page // self.part - first - i) % self.holders == 0
        return next((i for i in range(known) if not follows(i)), known)

    def start_on(self, digests: list[bytes]) -> int:
        """The device for the first page of a sequence: where it is cached, else the one that has most."""
        if digests:
            return self.page_of[digests[0]] // self.part
        return max(range(self.holders), key=lambda holder: len(self.free_on[holder]))

    def first_seen(self, position: int, page_size: int) -> int:
        """The first page, beside the sinks, that a token at `position` still sees."""
        return max(self.sinks, (position - self.window + 1) // page_size) if self.window else 0


class Pages:
    """All groups of one engine. Positions and lengths in tokens."""

    def __init__(
        self,
        windows: tuple[int, ...],
        totals: tuple[int, ...],
        page_size: int,
        *,
        prefix_cache: bool,
        sinks: tuple[int, ...] = (),
        holders: int = 1,
    ):
        """One entry a group each; sinks: tokens. holders: devices among which pages of layers that see all positions are dealt out;
        they divide the total. Other groups are small, and whole on each."""
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.under_way: dict[bytes, Sequence] = {}  # digest of a page that is being computed -> by whom
        kept = [self.pages_for(tokens) for tokens in sinks] or [0] * len(windows)
        dealt = [1 if window else holders for window in windows]
        self.groups = [Group(*each) for each in zip(windows, totals, kept, dealt, strict=True)]

    @staticmethod
    def sliding_need(window: int, ahead: int, page_size: int, sinks: int = 0) -> int:
        """Pages that a sequence of a sliding group holds at most, whatever its length. ahead: tokens of steps that are not read."""
        return -(-(window + ahead) // page_size) + 1 + -(-sinks // page_size)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens can ever have its pages; sliding groups have enough for any."""
        return all(group.window or self.pages_for(tokens) <= group.total for group in self.groups)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def match(self, seq: Sequence) -> int:
        """Gives a new sequence the cached pages of its longest known prefix; returns the tokens found. The last token
        of the prompt is always computed again, since its logits are wanted. A hit needs every page of the full groups
        and, of a sliding group, those that the next token still sees."""
        seq.pages = [[] for _ in self.groups]
        tokens = self.found(seq)
        known = tokens // self.page_size
        digests = self._digests(seq, known)
        for group, pages in zip(self.groups, seq.pages, strict=True):
            if group.holders > 1:
                seq.first_on = group.start_on(digests[: min(known, 1)])
            start = min(known, group.first_seen(tokens, self.page_size))
            kept = min(group.sinks, start)
            pages += [group.page_of[digest] for digest in digests[:kept]] + [-1] * (start - kept)
            pages += [group.page_of[digest] for digest in digests[start:known]]
            for page in pages:
                if page >= 0:
                    group.share(page)
        seq.findable = known
        return tokens

    def found(self, seq: Sequence) -> int:
        """How many tokens of a new sequence `match` would find."""
        if not self.prefix_cache:
            return 0
        known = (seq.length - 1) // self.page_size
        digests = self._digests(seq, known)
        for group in (g for g in self.groups if not g.window):
            known = group.chain(digests, known)
        while known and not all(self._window_known(group, digests, known) for group in self.groups if group.window):
            known -= 1
        return known * self.page_size

    def awaits(self, seq: Sequence, found: int) -> bool:
        """Whether the page after the first `found` tokens, cached already, is just being computed by another sequence."""
        known, page = (seq.length - 1) // self.page_size, found // self.page_size
        return self.prefix_cache and page < known and self._digests(seq, known)[page] in self.under_way

    def begin(self, seq: Sequence) -> None:
        """An admitted sequence will compute the rest of its full pages: others that need them may wait."""
        if self.prefix_cache:
            full = seq.length // self.page_size
            for digest in self._digests(seq, full)[seq.findable : full]:
                self.under_way.setdefault(digest, seq)

    def _window_known(self, group: Group, digests: list[bytes], known: int) -> bool:
        start = group.first_seen(known * self.page_size, self.page_size)
        return all(digest in group.page_of for digest in (*digests[: min(group.sinks, known)], *digests[start:known]))

    def reserve(self, seq: Sequence, tokens: int, ahead: int = 0) -> bool:
        """Gives the sequence pages for its first `tokens` positions, and in the full groups for its first `ahead` (the
        rest of a prompt); all or, when too few are free, nothing. Sliding groups take pages as the window moves."""
        needs = [self.pages_for(tokens if group.window else max(tokens, ahead)) for group in self.groups]
        plan = list(zip(self.groups, seq.pages, needs, strict=True))
        if any(not group.can_take(seq.first_on + len(pages), need - len(pages)) for group, pages, need in plan):
            return False
        for group, pages, need in plan:
            pages += [group.take(seq.first_on + i) for i in range(len(pages), need)]
        return True

    def adopt(self, seq: Sequence, tokens: int, ahead: int) -> bool:
        """As `reserve`, for a sequence whose first `tokens` tokens are computed elsewhere: what no later token sees gets no page."""
        sinks = self.page_size * max(group.sinks for group in self.groups)
        if sinks and not self.reserve(seq, min(tokens, sinks)):
            return False
        for group, pages in zip(self.groups, seq.pages, strict=True):
            first = min(group.first_seen(tokens, self.page_size), self.pages_for(tokens))
            for i in range(group.sinks, min(first, len(pages))):
                if pages[i] >= 0:
                    group.drop(pages[i])
                    pages[i] = -1
            pages += [-1] * (first - len(pages))
        return self.reserve(seq, tokens, ahead)

    def computed(self, seq: Sequence, tokens: int) -> None:
        """The first `tokens` positions are in the cache, and known: full pages become findable, and pages that no later token sees
        are let go."""
        full = tokens // self.page_size
        if self.prefix_cache and full > seq.findable:
            digests = self._digests(seq, full)
            for group, pages in zip(self.groups, seq.pages, strict=True):
                for i in range(seq.findable, full):
                    if pages[i] >= 0:
                        group.remember(pages[i], digests[i])
            self._no_longer(seq, full)
            seq.findable = full
        for group, pages in zip(self.groups, seq.pages, strict=True):
            for i in range(group.first_seen(tokens, self.page_size) - 1, group.sinks - 1, -1):
                if pages[i] < 0:
                    break
                group.drop(pages[i])
                pages[i] = -1

    def release(self, seq: Sequence) -> None:
        """Takes all pages back; the later ones of the sequence are reused first."""
        for group, pages in zip(self.groups, seq.pages, strict=True):
            for page in reversed(pages):
                if page >= 0:
                    group.drop(page)
        self._no_longer(seq, len(seq.hashes))
        seq.pages = []
        seq.findable = 0

    def _no_longer(self, seq: Sequence, full: int) -> None:
        """Takes back what `begin` said of the sequence's pages up to page `full`."""
        for digest in seq.hashes[seq.findable : full]:
            if self.under_way.get(digest) is seq:
                del self.under_way[digest]

    def forget(self, seq: Sequence) -> None:
        """What this sequence computed is not to be found again (its numbers went bad)."""
        for group, pages in zip(self.groups, seq.pages, strict=True):
            for page in pages:
                if page >= 0 and group.count[page] == 1 and (digest := group.hash_of.pop(page, None)) is not None:
                    del group.page_of[digest]

    def _digests(self, seq: Sequence, pages: int) -> list[bytes]:
        """The chained digests of (at least) the first `pages` pages, kept with the sequence."""
        if len(seq.hashes) < pages:
            tokens = array("i", seq.tokens)
            for i in range(len(seq.hashes), pages):
                before = seq.hashes[-1] if seq.hashes else self._start(seq.request)
                content = tokens[i * self.page_size : (i + 1) * self.page_size].tobytes()
                seq.hashes.append(hashlib.blake2b(before + content, digest_size=16).digest())
        return seq.hashes

    @staticmethod
    def _start(request: Request) -> bytes:
        """What the chain of a request's digests starts with."""
        return hashlib.blake2b(request.params.cache_salt.encode(), person=request.regime.encode()).digest()

    @property
    def free(self) -> int:
        """Pages of the first group that can be had, cached ones included."""
        return sum(map(len, self.groups[0].free_on))

    @property
    def total(self) -> int:
        return self.groups[0].total
