"""An experiment: arms (index x plan x encoder) that share the traffic, and who gets which.

``split``: BLAKE2 of the experiment's name and the session, over the weights, so a session has the same arm on every
replica and after restarts; without a session chance decides. ``interleave``: every request goes to both arms, and
``lookalike.serve.experiment.interleave`` drafts one answer from the two.

A request that brings a plan or a min_recall stays outside. One that an arm cannot answer (vectors of another model, an
image where the arm has no encoder) goes to those that can and is marked as forced, as is one whose arm broke its
guardrail: a comparison must leave both out.
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
    """One arm. What it leaves out is that of the index being served."""

    name: str
    weight: float
    own: Generation | None = None
    """An index of its own."""
    plan: str | None = None
    plans: ServicePlans | None = None
    """Its own plan for the served index."""

    def on(self, served: Generation) -> Generation:
        """The generation that this arm searches while ``served`` is."""
        if self.own is not None:
            return self.own
        return served if self.plans is None else replace(served, plan=self.plan, plans=self.plans)


class Route(NamedTuple):
    """Where a request goes, or one of the two places."""

    arm: str
    """Empty outside an experiment."""
    generation: Generation


class Assignment(NamedTuple):
    """The routes of a request (two when it is interleaved), and why they are not those of its session, if so."""

    routes: list[Route]
    forced: str = ""


def read_arms(config: ServeConfig, served: Generation) -> tuple[Arm, ...]:
    """The arms of ``config.experiment``, their artifacts found and checked as ``read_generation`` does.

    Raises ``UsageError`` also for an arm whose index cannot take the requests of the served one.
    """
    if config.experiment is None:
        return ()
    rails, monitor = config.experiment.guardrails, config.monitor
    if rails.min_recall is not None and (monitor.share == 0 or rails.min_requests > monitor.window):
        raise UsageError(
            f"guardrails.min_recall={rails.min_recall:g} is never judged with monitor.share="
            f"{monitor.share:g}, monitor.window={monitor.window} and guardrails.min_requests="
            f"{rails.min_requests}; measure a share above 0, and min_requests within the "
            "window"
        )
    arms = tuple(_read_arm(arm, served) for arm in config.experiment.arms)
    for arm in arms:
        if arm.own is not None and config.writes.state is not None:
            raise UsageError(
                f"arm {arm.name!r} has an index of its own, which would miss the writes; compare plans of "
                "the served index, or serve without writes.state"
            )
    return arms


def _read_arm(settings: ArmSettings, served: Generation) -> Arm:
    name, weight, plan = settings.name, settings.weight, settings.plan
    if settings.index is None:
        if plan is None:
            return Arm(name, weight)
        plans = read_plans(None if plan == "none" else plan, served.meta)
        return Arm(name, weight, plan=None if plan == "none" else plan, plans=plans)
    own = read_generation(settings.index, None if plan == "none" else plan, settings.encoder)
    if own.meta.num_hash_shards < served.meta.num_hash_shards:
        raise UsageError(
            f"arm {name!r}: its index has {own.meta.num_hash_shards} shards, the served one "
            f"{served.meta.num_hash_shards}, so some workers would hold none of it; index with as "
            "many"
        )
    if missing := sorted(set(served.meta.columns) - set(own.meta.columns)):
        raise UsageError(
            f"arm {name!r}: its index lacks the columns {', '.join(missing)} that requests may filter by; "
            "index with them"
        )
    return Arm(name, weight, own=own)


def own_generations(arms: Sequence[Arm], served: Generation) -> list[Generation]:
    """The generations that workers hold for ``arms``, besides the served one; each once."""
    found = {arm.own.name: arm.own for arm in arms if arm.own is not None and arm.own.name != served.name}
    return list(found.values())


class Experiment:
    """Decides where requests go; ``guard`` knows the arms that are closed."""

    def __init__(self, settings: ExperimentSettings, arms: Sequence[Arm]) -> None:
        self.settings, self.arms = settings, list(arms)
        self.guard = Guard(settings)
        self._unfit: dict[tuple[str, str], bool] = {}

    def assign(self, served: Generation, queries: Sequence[pb.Query], options: pb.SearchOptions) -> Assignment:
        """Where a request goes; outside the experiment that is the served generation."""
        if options.HasField("plan") or options.HasField("min_recall"):
            return Assignment([Route("", served)])
        fitting = [arm for arm in self.arms if self._fits(arm, served, queries, options)]
        if not fitting:  # the service's own checks say what is wrong
            return Assignment([Route("", served)])
        everyone = len(fitting) == len(self.arms)
        forced = "" if everyone else "fits"
        if self.settings.mode == "interleave":
            return self._both(fitting, served, forced)
        arm = self._pick(fitting, options.session)
        if self.guard.is_closed(arm.name):
            arm, forced = self._instead(fitting), "guardrail"
        return Assignment([Route(arm.name, arm.on(served))], forced)

    def _both(self, fitting: list[Arm], served: Generation, forced: str) -> Assignment:
        going = [arm for arm in fitting if not self.guard.is_closed(arm.name)] or [self._instead(fitting)]
        if len(going) < len(fitting):
            forced = "guardrail"
        return Assignment([Route(arm.name, arm.on(served)) for arm in going], forced)

    def _instead(self, fitting: list[Arm]) -> Arm:
        """Control, or the first that is open where control cannot answer."""
        return next((arm for arm in fitting if not self.guard.is_closed(arm.name)), fitting[0])

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
        # a vector whose model is not named is of the served one
        if "vector" in kinds and (options.model_fingerprint or served.meta.model_fingerprint) != model:
            return False
        return self._runs(arm, generation)

    def _runs(self, arm: Arm, generation: Generation) -> bool:
        """Whether the arm's plan fits the index that is served now; one that does not is logged once an index."""
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
    """A number in [0, 1), always the same for an experiment and a session, and even over sessions."""
    return int.from_bytes(blake2b(f"{experiment}\0{session}".encode(), digest_size=6).digest()) / 2**48
