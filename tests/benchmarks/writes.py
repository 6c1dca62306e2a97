"""The log of writes: how many a second, and whether ``kill -9`` of its process loses one that was acknowledged.

    python -m tests.benchmarks.writes [--kills 20] [--seconds 2] [--seed 1]

One JSON row for each number of callers, and one for the kills: a process with 16 callers is killed at a random moment,
the next goes on in the same folder, and at the end every acknowledged write must be there, with its content.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from lookalike.serve.generations.database import Database
from lookalike.serve.generations.write_log import WriteLog
from lookalike.serve.generations.write_record import WriteKind
from lookalike.serve.proto import retrieval_pb2 as pb

ROW_BYTES = 2048
"""A vector of 512 dimensions."""


def upsert(image_id: str) -> bytes:
    """A write of one row."""
    row = pb.Row(id=image_id, vector=bytes(ROW_BYTES))
    return bytes(pb.UpsertRequest(rows=[row], model_fingerprint="m").SerializeToString())


async def write_for(folder: str, seconds: float, callers: int, *, tell: bool = False) -> list[float]:
    """Seconds of each write that ``callers`` made, one after the other each; ``tell`` prints number and id of each."""
    times: list[float] = []
    log, name = WriteLog(Database(folder), 0, lambda: None), random.getrandbits(64)
    end = time.perf_counter() + seconds

    async def call(caller: int) -> None:
        while (start := time.perf_counter()) < end:
            image_id = f"{name:x}-{caller}-{len(times)}"
            number = await log.store(WriteKind.UPSERT, upsert(image_id))
            times.append(time.perf_counter() - start)
            if tell:
                print(number, image_id, flush=True)

    await asyncio.gather(*map(call, range(callers)))
    log.close()
    return times


def measure(callers: int, seconds: float) -> dict[str, Any]:
    """Writes a second and their latency."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        times = 1000 * np.array(asyncio.run(write_for(folder, seconds, callers)))
    p50, p99 = np.percentile(times, [50, 99]).round(2).tolist()
    return {"bench": "writes", "callers": callers, "per_s": round(len(times) / seconds), "p50_ms": p50, "p99_ms": p99}


def kill_often(folder: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill writers, and compare what is stored with what they were told."""
    acknowledged: dict[int, str] = {}
    wrong = 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.writes", "--child", folder], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        acknowledged |= dict([_parse(child.stdout.readline())])
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        told = [_parse(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        child.wait()
        wrong += sum(number in acknowledged for number, _ in told)  # a number given twice
        acknowledged |= dict(told)
    database = Database(folder)
    stored = {record.number: record.content for record in database.read()}
    database.close()
    lost = [number for number, image_id in acknowledged.items() if stored.get(number) != upsert(image_id)]
    figures = {"acknowledged": len(acknowledged), "stored": len(stored), "lost": len(lost), "numbers_twice": wrong}
    return {"bench": "writes", "kills": kills, **figures}


def _parse(line: str) -> tuple[int, str]:
    number, image_id = line.split()
    return int(number), image_id


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asyncio.run(write_for(options.child, 3600, 16, tell=True))
    for callers in (1, 8, 64):
        print(json.dumps(measure(callers, options.seconds)), flush=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        row = kill_often(folder, options.kills, random.Random(options.seed))
    print(json.dumps(row))
    return 1 if row["lost"] or row["numbers_twice"] else 0


if __name__ == "__main__":
    sys.exit(main())
