"""What all tests share."""

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# how long an example takes says more about the machine than about the code
settings.register_profile("lookalike", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lookalike")

# pytorch-metric-learning, an oracle, imports this module, which replaces methods of faiss' indexes by others
sys.modules.setdefault("faiss.contrib.torch_utils", ModuleType("faiss.contrib.torch_utils"))


def pytest_collection_finish() -> None:
    """Leave out what was imported and collected of garbage collections: .8 s each, some within what a test measures."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local Ray for the whole run, configured as the platform configures it."""
    import ray

    from lookalike.cluster import ClusterConfig, ensure_ray

    ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=150, progress_bars=False))
    yield
    ray.shutdown()
