"""Team-draft interleaving (Radlinski, Kurup and Joachims, CIKM 2008): one list of hits from the lists of two arms.

In each round a coin decides which arm picks first; an arm picks its best hit that is not in the list yet. A hit that
both have belongs to the arm that picked it. Arms so bring equally many hits to the same ranks, whatever their lists
look like, and a preference between them shows in which hits are acted on.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b

from lookalike.serve.proto import retrieval_pb2 as pb


def coins(*names: str) -> random.Random:
    """Coin flips that are always the same for the same names."""
    return random.Random(blake2b("\0".join(names).encode(), digest_size=16).digest())


def draft(
    first: Sequence[pb.Hit], second: Sequence[pb.Hit], arms: tuple[str, str], k: int, flips: random.Random
) -> pb.HitList:
    """At most ``k`` hits, each with the arm that brought it.

    Once one arm has no more hits the draft is over; what the other still has follows without an arm, since feedback on
    it would tell nothing but that there was more of it.
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
