"""How training workers meet. On one machine they meet on loopback: torch's own store listens on every interface and
lets anyone read and change what the workers tell each other (https://github.com/pytorch/pytorch/issues/173909).
"""

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

LOOPBACK = "127.0.0.1"
INTERFACE = "lo" if sys.platform == "linux" else "lo0"
TIMEOUT_S = 600
"""Longest time that a worker waits for the others, in seconds."""
_kept: list[Any] = []
"""The store that this process serves, as long as it lives."""


def torch_config(*, use_gpu: bool) -> TorchConfig:
    """How Ray Train sets up the process group: on loopback if this Ray listens there, else as Ray does."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    kind = LoopbackTorch if address == LOOPBACK else TorchConfig
    return kind(backend="nccl" if use_gpu else "gloo", timeout_s=TIMEOUT_S)


@dataclass
class LoopbackTorch(TorchConfig):
    """A process group of workers on this machine alone."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls when workers start and end."""
        return LoopbackBackend


class LoopbackBackend(Backend):
    """Connects the workers by a store of the first one."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]
        """Have all workers join one group."""
        port = worker_group.execute_single(0, open_store)
        world = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, join_group, backend_config.backend, port, rank, world, backend_config.timeout_s
            )
            for rank in range(world)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]
        """Have them leave it; whoever does not in time is killed with its process."""
        ray.wait(worker_group.execute_async(leave_group), num_returns=len(worker_group), timeout=30)


def open_store() -> int:
    """Serve a store on loopback from this process, and return its port."""
    listener = socket.create_server((LOOPBACK, 0))
    port = int(listener.getsockname()[1])
    settings: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    _kept[:] = [dist.TCPStore(LOOPBACK, port, **settings)]  # type: ignore[attr-defined]
    return port


def join_group(backend: str, port: int, rank: int, world: int, timeout_s: int) -> None:
    """Join the process group that meets at ``port``."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, INTERFACE)
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(LOOPBACK, port, world, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def leave_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
