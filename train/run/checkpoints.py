"""Checkpoints of a run: ``<folder>/step-00000050/rank-00000-of-00002.pt``, one file per worker.

The first worker's file holds the model, the optimizer and everything else that workers share; every file holds what
differs between them. A file appears whole or not at all, and a checkpoint counts once all files of its world exist: a
crash cannot leave a false checkpoint, and no worker waits for another. A thread writes a copy of the state while
training continues; the next checkpoint waits until the copy is written.
"""

import pickle
import random
import re
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import torch
from torch import nn

from lookalike import storage
from lookalike.errors import LookalikeError
from lookalike.telemetry import fields, get_logger
from lookalike.train.run.sharding import load_whole_state

log = get_logger(__name__)
KEEP = 2
"""Checkpoints kept: the last, and the one before it until the last is complete."""
_FILE = re.compile(r"step-(\d+)/rank-(\d+)-of-(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in a run's folder."""

    folder: str
    step: int
    world: int

    @property
    def uri(self) -> str:
        return storage.join(self.folder, f"step-{self.step:08d}")

    def read(self, rank: int = 0) -> dict[str, Any]:
        """Content of one worker's file: tensors on the CPU, and plain values."""
        uri = self.file(rank)
        try:
            with fsspec.open(uri, "rb") as file:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise LookalikeError(
                f"checkpoint {uri} is damaged ({reason}); remove the folder {self.uri} and run the step again: it "
                "goes on from the checkpoint before"
            ) from None
        return state

    def file(self, rank: int) -> str:
        """URI of one worker's file."""
        return storage.join(self.uri, f"rank-{rank:05d}-of-{self.world:05d}.pt")

    def cut_file(self) -> str | None:
        """URI of a file that has no end, as when the disk lost part of it; None if all are whole."""
        for rank in range(self.world):
            with fsspec.open(self.file(rank), "rb") as file:
                if not zipfile.is_zipfile(file):
                    return self.file(rank)
        return None


def find_checkpoints(folder: str) -> list[Checkpoint]:
    """Complete checkpoints below ``folder``, oldest first."""
    ranks: dict[tuple[int, int], set[int]] = {}
    for name in storage.list_files(folder) if storage.exists(folder) else []:
        if match := _FILE.fullmatch(name):
            step, rank, world = (int(number) for number in match.groups())
            ranks.setdefault((step, world), set()).add(rank)
    complete = sorted((step, world) for (step, world), written in ranks.items() if len(written) == world)
    return [Checkpoint(folder, step, world) for step, world in complete]


def last_checkpoint(folder: str) -> Checkpoint | None:
    """The newest complete checkpoint, or None at a run's beginning."""
    return next(reversed(find_checkpoints(folder)), None)


def sound_checkpoint(folder: str) -> Checkpoint | None:
    """The newest complete checkpoint whose files are whole, or None; those that are not are named in the log."""
    for checkpoint in reversed(find_checkpoints(folder)):
        cut = checkpoint.cut_file()
        if cut is None:
            return checkpoint
        log.warning("checkpoint passed over %s", fields(file=cut, reason="it is cut short"))
    return None


class CheckpointWriter:
    """Writes one worker's files of a run's checkpoints in a thread."""

    def __init__(self, folder: str, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy ``state`` and write it in the thread; waits for the checkpoint before, and raises its failure."""
        self.wait()
        self._running = self._pool.submit(self._write, step, copy_state(state))

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises the error of its writing."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Finish the checkpoint in flight and end the thread."""
        self.wait()
        self._pool.shutdown()

    def _write(self, step: int, state: Any) -> None:
        name = f"rank-{self.rank:05d}-of-{self.world:05d}.pt"
        with storage.open_atomic(storage.join(self.folder, f"step-{step:08d}", name)) as file:
            torch.save(state, file)
        for old in find_checkpoints(self.folder)[:-KEEP] if self.rank == 0 else []:
            storage.remove_tree(old.uri)


def copy_state(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with all tensors on the CPU; ``deepcopy`` leaves them on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copy_state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_state(item) for item in value)
    return value


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
    """Fill model and optimizer from a checkpoint's ``model`` and ``optimizer``.

    Raises ``LookalikeError`` naming tensors and shapes if the checkpoint is of another model.
    """
    try:
        load_whole_state(module, optimizer, state["model"], state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise LookalikeError(
            f"checkpoint {source} does not fit the model: {' '.join(lines[:3])}; it was written by "
            "another version of the code: remove that folder and run the step again"
        ) from None


def random_state() -> dict[str, Any]:
    """State of this process's global random generators: torch (CPU and GPU), numpy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, [int(key) for key in keys], position, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to a state that ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
