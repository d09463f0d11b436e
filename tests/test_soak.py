"""The soak in little: see soak.py."""

from __future__ import annotations

import pytest
from soak import compare, soak

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.mark.parametrize("model", ["config:tiny", "config:tiny_gemma3"])
def test_no_policy_changes_a_token_and_nothing_leaks(model: str) -> None:
    assert compare(model, 12, context=256) == 0


def test_a_short_soak_ends_where_it_began() -> None:
    assert soak("config:tiny_window", 120) == 0
