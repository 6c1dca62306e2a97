"""Index builds without Ray."""

from collections.abc import Iterator

import pytest

from lookalike.serve.index import build


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """Tasks of the index stage run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "map_tasks", lambda function, arguments, _: [function(*values) for values in arguments])
        yield
