"""Which rows of a parametrised test `make test` runs."""

import pytest


def slow_but(fast, rows):
    """The rows (tuples of values, or strings) as parameters; those that are not in `fast` are marked as slow."""
    rows = [(row, [row] if isinstance(row, str) else row) for row in rows]
    return [pytest.param(*values, marks=() if row in fast else pytest.mark.slow) for row, values in rows]
