"""Pages of a context that are dealt out to several caches, one after the other: who holds which positions.

dealt = (ways, turn): ways is static, turn int32 [R]: of sequence r this cache holds the pages numbered turn[r], turn[r] + ways, ... ; its
page table has just these, in that order. None: one cache holds them all. A position that is held has a place among those that are: its
position in the context that this cache would have if there were no other.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

ALONE = (1, 0)


def held(count, page: int, dealt):
    """How many of the first `count` positions are held: the places before position `count`."""
    if dealt is None:
        return count
    ways, turn = dealt
    return lax.div(count, page * ways) * page + jnp.clip(lax.rem(count, page * ways) - turn * page, 0, page)


def position_of(place, page: int, dealt):
    """The position of a place."""
    if dealt is None:
        return place
    ways, turn = dealt
    return (lax.div(place, page) * ways + turn) * page + lax.rem(place, page)


def is_held(position, page: int, dealt):
    """Whether a position is held."""
    ways, turn = ALONE if dealt is None else dealt
    return lax.rem(lax.div(position, page), ways) == turn


def entry_of(position, page: int, dealt, entries: int):
    """Which of the `entries` of a sequence's page table is the page of a position that is held; some legal one for others."""
    ways, _ = ALONE if dealt is None else dealt
    return jnp.clip(lax.div(position, page * ways), 0, entries - 1)


def of_rows(dealt, row):
    """The same for rows of sequences `row`."""
    return None if dealt is None else (dealt[0], dealt[1][row])
