"""JSON lines, as users have them."""

import json
from collections.abc import Iterable


def jsonl(rows: Iterable) -> str:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
