"""One seed per recipe; every random choice derives its own seed from it by name."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the choice called ``names``, independent of block order and worker count."""
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def hash_unit(seed: int, key: str) -> float:
    """A number in [0, 1) that depends only on ``seed`` and ``key``."""
    return derive_seed(seed, key) / float(1 << 63)
