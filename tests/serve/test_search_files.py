"""The files of serve/ that one search passes, as serve/README.md lists them."""

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from ray import serve

import lookalike.serve.proto.retrieval_pb2 as pb
from lookalike.serve.app import build
from lookalike.serve.settings.config import ServeConfig
from tests.serve.test_placements import Context

if TYPE_CHECKING:
    from tests.serve.conftest import World

SERVE = Path(pb.__file__).parents[1]
SECTION = (SERVE / "README.md").read_text().partition("## The files of one search")[2].partition("\n## ")[0]
FUSED = re.findall(r"^\d+\. `([\w/]+\.py)`", SECTION, re.MULTILINE)
SHARDED = re.findall(r"`([\w/]+\.py)`", SECTION.partition("`sharded` adds")[2].partition("\n\n")[0])


@contextmanager
def files_entered() -> Iterator[list[str]]:
    """Files of serve/ whose functions run in this thread, or in threads started in the block, in order."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(f"{SERVE}/") and name not in entered:
            entered.append(name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("placement", "wanted"), [("fused", FUSED), ("sharded", [*FUSED, *SHARDED])])
def test_a_search_passes_the_files_that_the_page_lists(world: "World", placement: str, wanted: list[str]) -> None:
    config = ServeConfig(index=world.index, plan=world.plan, encoder="none", placement=placement)
    request = pb.SearchRequest(query=pb.Query(vector=world.vectors["img-004"].tobytes()))
    with files_entered() as entered:
        ingress = serve.run(build(config), name=placement, _local_testing_mode=True)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # as ``lookalike serve`` does
        entered.clear()
        ingress.Search.remote(request, grpc_context=Context()).result()
        passed = [str(Path(name).relative_to(SERVE)) for name in entered]
    if placement == "fused":
        assert passed == wanted
    else:
        assert sorted(passed) == sorted(wanted)


def test_the_page_lists_few() -> None:
    assert 0 < len(FUSED) <= 13
    assert len(set(FUSED) | set(SHARDED)) == len(FUSED) + len(SHARDED)
