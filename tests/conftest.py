"""What all tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# how long an example takes says more about the machine than about the code
settings.register_profile("lookalike", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lookalike")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local Ray for the whole run, configured as the platform configures it."""
    import ray

    from lookalike.cluster import ClusterConfig, ensure_ray

    ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=150, progress_bars=False))
    yield
    ray.shutdown()
