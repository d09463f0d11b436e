"""The one exception for a user's mistake: commands print it as one line and exit with code 2."""


class UserError(ValueError):
    """Input that cannot be honoured. The message is one line: field, value, rule, and what would be legal."""


def refuse(field: str, value: object, rule: str) -> UserError:
    """Builds the error for `field=value`; `rule` says what is required and what would be legal."""
    shown = repr(value)
    return UserError(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {rule}".replace("\n", " "))
