"""The one exception for a user's mistake: commands print it as one line and exit with code 2."""

from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """Input that cannot be honoured. The message is one line: field, value, rule, and what would be legal."""


def refuse(field: str, value: object, rule: str) -> UserError:
    """Builds the error for `field=value`; `rule` says what is required and what would be legal."""
    shown = repr(value)
    return UserError(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {rule}".replace("\n", " "))


def require_integer(field: str, value: object, low: int, high: int) -> None:
    """Refuses anything but an integer (a bool is none) from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(field, value, f"must be an integer from {low} to {high}")


def as_user_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls what knows nothing of users (sharding, kernels); its ValueError becomes a UserError."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise UserError(str(error)) from None
