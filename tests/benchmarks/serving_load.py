"""The load of the serving benchmark: a closed loop of gRPC clients for a set time, and the CPU time of the servers.

Requests are serialised beforehand and answers are not parsed, so that the clients take little of the machine that they
share with the servers.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import grpc
import numpy as np
import psutil

CALL_TIMEOUT_S = 60.0
WARM_UP_SHARE = 0.25
MIN_REQUESTS = 5
SERVICE = "/lookalike.v1.RetrievalService/"


class Call(NamedTuple):
    """The requests that clients send in turn, and their address."""

    address: str
    method: str
    requests: Sequence[bytes]
    application: str = "lookalike"


class Figures(NamedTuple):
    """One window of load."""

    p50_ms: float
    p99_ms: float
    mean_ms: float
    qps: float
    cpu_ms: float
    """CPU time of all server processes for each request."""
    requests: int


def apply_load(call: Call, clients: int, seconds: float, server: int) -> Figures:
    """``clients`` that each send a request when the last is answered, for ``seconds`` after a warm-up that is dropped.

    ``server`` is the process whose CPU counts, with its children. At least ``MIN_REQUESTS`` a client are sent, and a
    call that takes longer than ``CALL_TIMEOUT_S`` raises.
    """
    return asyncio.run(_apply(call, clients, seconds, server))


async def _apply(call: Call, clients: int, seconds: float, server: int) -> Figures:
    processes = _tree(server)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(call.address, options=options) as channel:
        send = channel.unary_unary(SERVICE + call.method)
        metadata = (("application", call.application),)

        async def client(number: int, seconds: float, least: int) -> list[float]:
            taken: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(taken) < least:
                request = call.requests[(number + len(taken) * clients) % len(call.requests)]
                start = time.perf_counter()
                await send(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
                taken.append(time.perf_counter() - start)
            return taken

        await asyncio.gather(*(client(number, seconds * WARM_UP_SHARE, 1) for number in range(clients)))
        cpu, start = _cpu_s(processes), time.perf_counter()
        taken = await asyncio.gather(*(client(number, seconds, MIN_REQUESTS) for number in range(clients)))
        wall, cpu = time.perf_counter() - start, _cpu_s(processes) - cpu
    latencies = np.concatenate(taken) * 1000
    return Figures(
        float(np.median(latencies)),
        float(np.quantile(latencies, 0.99)),
        float(latencies.mean()),
        len(latencies) / wall,
        cpu * 1000 / len(latencies),
        len(latencies),
    )


def ask_once(call: Call) -> list[bytes]:
    """The answer to each request, one after the other."""
    with grpc.insecure_channel(call.address) as channel:
        send = channel.unary_unary(SERVICE + call.method)
        metadata = (("application", call.application),)
        return [send(request, timeout=CALL_TIMEOUT_S, metadata=metadata) for request in call.requests]


def idle_cpu_ms(server: int, seconds: float) -> float:
    """CPU milliseconds a second that a server takes while nobody asks."""
    processes = _tree(server)
    cpu = _cpu_s(processes)
    time.sleep(seconds)
    return (_cpu_s(processes) - cpu) * 1000 / seconds


def _tree(server: int) -> list[int]:
    root = psutil.Process(server)
    return [root.pid, *(child.pid for child in root.children(recursive=True))]


def _cpu_s(processes: Sequence[int]) -> float:
    ticks = 0
    for process in processes:
        try:
            with open(f"/proc/{process}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
