"""Team-draft interleaving (Radlinski, Kurup and Joachims, CIKM 2008): one list of hits from the lists of two arms.

In each round a coin decides which arm picks first; an arm picks its best hit that is not in the list yet. A hit of both
arms belongs to the arm that picked it. So both arms bring equally many hits to the same ranks, whatever their lists
look like, and users show a preference by the hits that they act on.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b

from lookalike.serve.proto import retrieval_pb2 as pb


def coins(*names: str) -> random.Random:
    """Return a source of coin flips that depends only on ``names``."""
    return random.Random(blake2b("\0".join(names).encode(), digest_size=16).digest())


def draft(
    first: Sequence[pb.Hit], second: Sequence[pb.Hit], arms: tuple[str, str], k: int, flips: random.Random
) -> pb.HitList:
    """Return at most ``k`` hits, each with the arm that brought it.

    The draft ends when one arm has no more hits. The rest of the other arm follows without an arm, because feedback on
    it would only show that this arm had more hits.
    """
    sizes = [0, 0]
    drafted = pb.HitList()
    taken: set[str] = set()
    left = [iter(first), iter(second)]
    while len(drafted.hits) < k:
        team = int(flips.random() < 0.5) if sizes[0] == sizes[1] else int(sizes[1] < sizes[0])
        hit = next((hit for hit in left[team] if hit.id not in taken), None)
        if hit is None:
            rest = [hit for hit in left[1 - team] if hit.id not in taken]
            for hit in rest[: k - len(drafted.hits)]:
                _add(drafted, hit, "")
            break
        taken.add(hit.id)
        sizes[team] += 1
        _add(drafted, hit, arms[team])
    return drafted


def _add(drafted: pb.HitList, hit: pb.Hit, arm: str) -> None:
    copy = drafted.hits.add()
    copy.CopyFrom(hit)
    copy.arm = arm
