"""An experiment: arms (index x plan x encoder) share the traffic, and each request is assigned to one or two of them.

``split``: a BLAKE2 hash of experiment and session picks an arm by weight, so a session has the same arm on every
replica and after restarts; without a session the choice is random. ``interleave``: every request goes to both arms, and
``lookalike.serve.experiment.interleave`` drafts one answer from the two.

A request with a plan or min_recall stays outside. A request that its arm cannot answer (vectors of another model, or an
image and no encoder), or whose arm is closed by a guardrail, goes to another arm. It is marked as forced, and
comparisons leave it out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

from lookalike.errors import UsageError
from lookalike.serve.experiment.guardrails import Guard
from lookalike.serve.generations.generation import Generation, read_generation, read_plans
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.watching import ArmSettings, ExperimentSettings
from lookalike.serve.wire.requests import ServicePlans, check_plan
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Arm:
    """One arm; fields that are None come from the served generation."""

    name: str
    weight: float
    own: Generation | None = None
    """The arm's own index."""
    plan: str | None = None
    plans: ServicePlans | None = None
    """The arm's own plan for the served index."""

    def on(self, served: Generation) -> Generation:
        """Return the generation that this arm searches while ``served`` is served."""
        if self.own is not None:
            return self.own
        return served if self.plans is None else replace(served, plan=self.plan, plans=self.plans)


class Route(NamedTuple):
    """An arm that a request goes to."""

    arm: str
    """Empty outside an experiment."""
    generation: Generation


class Assignment(NamedTuple):
    """The routes of a request; two if it is interleaved."""

    routes: list[Route]
    forced: str = ""
    """Why they are not the routes that chance would have picked; empty if they are."""


def read_arms(config: ServeConfig, served: Generation) -> tuple[Arm, ...]:
    """Return the arms of ``config.experiment``; artifacts are read and checked as in ``read_generation``.

    Raises ``UsageError`` also for an arm whose index cannot answer requests to the served one.
    """
    if config.experiment is None:
        return ()
    rails, monitor = config.experiment.guardrails, config.monitor
    if rails.min_recall is not None and monitor.share == 0:
        raise UsageError(
            f"guardrails.min_recall={rails.min_recall:g} is never judged with monitor.share=0, which measures no "
            "recall; set a share above 0"
        )
    arms = tuple(_read_arm(arm, served) for arm in config.experiment.arms)
    for arm in arms:
        if arm.own is not None and config.writes.state is not None:
            raise UsageError(
                f"arm {arm.name!r} has its own index, which would miss the writes; compare plans of "
                "the served index, or serve without writes.state"
            )
    return arms


def _read_arm(settings: ArmSettings, served: Generation) -> Arm:
    name, weight, plan = settings.name, settings.weight, None if settings.plan == "none" else settings.plan
    if settings.index is None:
        plans = None if settings.plan is None else read_plans(plan, served.meta)
        return Arm(name, weight, plan=plan, plans=plans)
    own = read_generation(settings.index, plan, settings.encoder)
    if own.meta.num_hash_shards < served.meta.num_hash_shards:
        raise UsageError(
            f"arm {name!r}: its index has {own.meta.num_hash_shards} shards, the served one "
            f"{served.meta.num_hash_shards}, so some workers would hold no part of it; index with as many"
        )
    if missing := sorted(set(served.meta.columns) - set(own.meta.columns)):
        raise UsageError(
            f"arm {name!r}: its index lacks the columns {', '.join(missing)} that requests may filter by; "
            "index with them"
        )
    return Arm(name, weight, own=own)


def own_generations(arms: Sequence[Arm], served: Generation) -> list[Generation]:
    """Return the distinct generations that workers hold for ``arms`` besides the served one."""
    by_name = {arm.own.name: arm.own for arm in arms if arm.own is not None and arm.own.name != served.name}
    return list(by_name.values())


class Experiment:
    """Assigns requests to arms; ``guard`` knows which arms are closed."""

    def __init__(self, settings: ExperimentSettings, arms: Sequence[Arm]) -> None:
        self.settings, self.arms = settings, list(arms)
        self.guard = Guard(settings)
        self._unfit: dict[tuple[str, str], bool] = {}

    def assign(self, served: Generation, queries: Sequence[pb.Query], options: pb.SearchOptions) -> Assignment:
        """Return the routes of a request; outside the experiment that is the served generation alone."""
        if options.HasField("plan") or options.HasField("min_recall"):
            return Assignment([Route("", served)])
        fitting = [arm for arm in self.arms if self._fits(arm, served, queries, options)]
        if not fitting:  # the service's own checks say what is wrong
            return Assignment([Route("", served)])
        forced = "" if len(fitting) == len(self.arms) else "fits"
        allowed = [arm for arm in fitting if not self.guard.is_closed(arm.name)] or fitting[:1]
        if self.settings.mode == "interleave":
            chosen = allowed
            forced = "guardrail" if len(allowed) < len(fitting) else forced
        else:
            chosen = [self._pick(fitting, options.session)]
            if self.guard.is_closed(chosen[0].name):
                chosen, forced = allowed[:1], "guardrail"
        return Assignment([Route(arm.name, arm.on(served)) for arm in chosen], forced)

    def _pick(self, arms: list[Arm], session: str) -> Arm:
        point = random.random() if not session else hash_share(self.settings.name, session)
        point *= sum(arm.weight for arm in arms)
        for arm in arms:
            point -= arm.weight
            if point < 0:
                return arm
        return arms[-1]  # rounding

    def _fits(self, arm: Arm, served: Generation, queries: Sequence[pb.Query], options: pb.SearchOptions) -> bool:
        generation = arm.on(served)
        model = generation.meta.model_fingerprint
        if options.model_fingerprint and options.model_fingerprint != model:
            return False
        kinds = {query.WhichOneof("kind") for query in queries}
        if "image" in kinds and generation.encoder is None:
            return False
        # a vector without a model name belongs to the served model
        if "vector" in kinds and (options.model_fingerprint or served.meta.model_fingerprint) != model:
            return False
        return self._runs(arm, generation)

    def _runs(self, arm: Arm, generation: Generation) -> bool:
        """Whether the arm's plan fits the index that is served now; logs a misfit once per index."""
        key = (arm.name, generation.name)
        if key not in self._unfit:
            self._unfit[key] = False
            try:
                check_plan(generation.plans.default, generation.meta)
            except UsageError as error:
                self._unfit[key] = True
                log.warning("arm does not fit %s", fields(arm=arm.name, index=generation.name, error=str(error)))
        return not self._unfit[key]


def hash_share(experiment: str, session: str) -> float:
    """Return a number in [0, 1): fixed for an experiment and a session, uniform over sessions."""
    return int.from_bytes(blake2b(f"{experiment}\0{session}".encode(), digest_size=6).digest()) / 2**48
