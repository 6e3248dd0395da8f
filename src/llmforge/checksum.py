"""The checksum of every file of an artifact: XXH3, 128 bits (https://xxhash.com).

It is there to find damage, not to withstand an adversary, and costs far less than writing the
file: convert and build checksum as they write. Manifests are named by SHA-256 instead.
"""

from __future__ import annotations

import re
from typing import Any

NAME = "xxh3_128"
_HEX = re.compile(r"[0-9a-f]{32}")


def new_checksum() -> Any:
    """A hash object: `update(bytes)` releases the GIL, `hexdigest()` is 32 hex digits."""
    import xxhash

    return xxhash.xxh3_128()


def is_checksum(value: object) -> bool:
    """Whether the value looks like a checksum's hex digits."""
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
