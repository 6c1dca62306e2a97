"""``lookalike experiment`` finds the effect that a simulation has, and none where there is none."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency, fisher_exact

from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.errors import UsageError
from lookalike.retrieval.plan import Plan
from lookalike.serve.experiment.log import ExperimentLog, LoggedRequest, read_experiment_log
from lookalike.serve.experiment.report import analyse, render
from lookalike.serve.experiment.stats import holm, two_proportions
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.watching import AccessLogSettings, ExperimentSettings
from lookalike.serve.watch.access_log import AccessLog, hash_text, publish_experiment
from tests.serve.conftest import publish_plan

if TYPE_CHECKING:
    from tests.serve.conftest import World


def settings(**more: Any) -> ExperimentSettings:
    return ExperimentSettings.model_validate({"name": "trial", "arms": [{"name": "a"}, {"name": "b"}], **more})


def split_log(seed: int, rates: dict[str, float], *, sessions: int = 600, **more: Any) -> ExperimentLog:
    """Sessions of answer to five answers; whoever likes to click does so more often: answers are not independent."""
    rng, log = random.Random(seed), ExperimentLog(settings(**more))
    names = [arm.name for arm in log.settings.arms]
    for number in range(sessions):
        arm, eager = rng.choice(names), rng.random()
        for answer in range(rng.randint(1, 5)):
            request_id = f"{number}-{answer}"
            log.requests.append(LoggedRequest(request_id, arm, f"s{number}", "OK", rng.uniform(1, 9)))
            if eager < rates[arm] and rng.random() < 0.7:
                log.feedback.add((request_id, "", "click"))
    return log


def interleaved_log(seed: int, lead: float, *, sessions: int = 300) -> ExperimentLog:
    """Sessions of answer to four answers with a click each; a session has its own taste, on average ``lead`` for b."""
    rng, log = random.Random(seed), ExperimentLog(settings(mode="interleave"))
    for number in range(sessions):
        taste = min(1.0, max(0.0, rng.gauss(0.5 + lead, 0.3)))
        for answer in range(rng.randint(1, 4)):
            request_id = f"{number}-{answer}"
            owners = {"ha": "a", "hb": "b"}
            log.requests.append(LoggedRequest(request_id, "interleave", f"s{number}", "OK", 5.0, owners=owners))
            log.feedback.add((request_id, "hb" if rng.random() < taste else "ha", "click"))
    return log


def test_a_split_with_an_effect_is_found() -> None:
    report = analyse(split_log(1, {"a": 0.2, "b": 0.35}, sessions=2000))
    (comparison,) = report["comparisons"]
    assert comparison["shown"]
    assert (
        comparison["interval"][0] < 0.13 < comparison["interval"][1]
    )  # .15, less those who liked to click and did not
    assert any(sentence.startswith("arm b leads: feedback in ") for sentence in report["means"])
    worse = analyse(split_log(1, {"a": 0.35, "b": 0.2}, sessions=2000))
    assert any(sentence.startswith("arm b trails: ") for sentence in worse["means"])


def test_without_an_effect_one_split_in_twenty_shows_one() -> None:
    logs = (split_log(seed, {"a": 0.3, "b": 0.3}, sessions=300) for seed in range(500))
    significant = [analyse(log)["comparisons"][0]["shown"] for log in logs]
    assert 0.025 < np.mean(significant) < 0.08


def test_answers_as_units_would_mislead() -> None:
    """Why sessions are the units: answers of control session go together, and counting them singly finds too much."""
    significant = []
    for seed in range(300):
        control, other = analyse(split_log(seed, {"a": 0.3, "b": 0.3}))["arms"]
        significant.append(
            two_proportions(
                control["answers_with_feedback"], control["requests"], other["answers_with_feedback"], other["requests"]
            )
            < 0.05
        )
    assert np.mean(significant) > 0.09


def test_three_arms_share_the_five_percent() -> None:
    arms = [{"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "d"}]
    significant = []
    for seed in range(300):
        log = split_log(seed, dict.fromkeys("abcd", 0.3), sessions=500, arms=arms)
        significant.append(any(comparison["shown"] for comparison in analyse(log)["comparisons"]))
    assert np.mean(significant) < 0.075


@pytest.mark.parametrize("table", [(30, 200, 50, 210), (300, 2000, 280, 1990), (5, 20, 11, 20)])
def test_large_counts_are_compared_by_scipys_chi_square(table: tuple[int, int, int, int]) -> None:
    """The pooled z test of two shares is the chi-square test of their table."""
    hits, trials, others, other_trials = table
    wanted = chi2_contingency([[hits, trials - hits], [others, other_trials - others]], correction=False).pvalue
    assert two_proportions(*table) == pytest.approx(wanted)


@pytest.mark.parametrize("table", [(1, 12, 6, 14), (0, 50, 4, 40), (39, 40, 32, 40)])
def test_small_counts_are_compared_by_fishers_exact_test(table: tuple[int, int, int, int]) -> None:
    hits, trials, others, other_trials = table
    wanted = fisher_exact([[hits, trials - hits], [others, other_trials - others]]).pvalue
    assert two_proportions(*table) == pytest.approx(wanted)


def test_what_is_called_detectable_is_shown_four_times_in_five() -> None:
    log = ExperimentLog(settings(), [LoggedRequest(str(n), "ab"[n % 2], "", "OK", 1.0) for n in range(4000)])
    log.feedback = {(str(n), "", "click") for n in range(4000) if n % 4 < 2}  # half of each arm
    (comparison,) = analyse(log)["comparisons"]
    rng, apart = np.random.default_rng(3), comparison["detectable"]
    trials = zip(rng.binomial(2000, 0.5 + apart / 2, 1500), rng.binomial(2000, 0.5 - apart / 2, 1500), strict=True)
    significant = [two_proportions(int(hits), 2000, int(others), 2000) < 0.05 for hits, others in trials]
    assert 0.77 < np.mean(significant) < 0.83


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_interleaving_finds_a_preference() -> None:
    report = analyse(interleaved_log(2, 0.2))
    duel = report["duel"]
    assert duel["wins"] > duel["losses"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == 300
    assert report["means"] == [
        f"arm b leads: b wins {duel['wins']}, loses {duel['losses']}, {duel['ties']} ties or "
        f"without feedback, p={duel['p_value']:.2g}"
    ]


def test_without_a_preference_one_interleaving_in_twenty_shows_one() -> None:
    significant = [analyse(interleaved_log(seed, 0.0))["duel"]["shown"] for seed in range(400)]
    assert 0.02 < np.mean(significant) < 0.08


def test_arms_that_lose_requests_are_not_compared_in_silence() -> None:
    log = split_log(3, {"a": 0.3, "b": 0.3}, sessions=2000)
    lost = {f"s{number}" for number in range(400)}
    log.requests = [request for request in log.requests if request.arm == "a" or request.session not in lost]
    assert analyse(log)["means"][0].startswith("do not trust the comparison: the arms' sizes (a ")
    assert not any("do not trust" in sentence for sentence in analyse(split_log(3, {"a": 0.3, "b": 0.3}))["means"])


def test_weights_are_what_sizes_are_checked_against() -> None:
    weighted = settings(arms=[{"name": "a", "weight": 3.0}, {"name": "b"}])
    log = ExperimentLog(
        weighted, [LoggedRequest(str(n), "b" if n % 4 == 0 else "a", "", "OK", 1.0) for n in range(4000)]
    )
    assert analyse(log)["weights_p_value"] == pytest.approx(1.0)
    log.settings = settings()
    assert analyse(log)["weights_p_value"] < 1e-9


def test_a_session_in_two_arms_is_told() -> None:
    log = split_log(4, {"a": 0.3, "b": 0.3})
    log.requests += [LoggedRequest("x", "a", "both", "OK", 1.0), LoggedRequest("y", "b", "both", "OK", 1.0)]
    assert "do not trust the comparison: 1 sessions saw several arms" in " ".join(analyse(log)["means"])


def test_guardrails_are_held_against_the_figures() -> None:
    log = split_log(5, {"a": 0.3, "b": 0.3}, guardrails={"max_error_share": 0.01, "max_p99_ms": 8.0})
    for request in log.requests[::10]:
        request.code = "UNAVAILABLE"
    said = " ".join(analyse(log)["means"])
    assert "arm b is beyond a guardrail: 9" in said or "arm b is beyond a guardrail: 1" in said
    assert "max_p99_ms is 8" in said
    assert "arm a is beyond" not in said  # control is the measure
    log.closed = [("b", "10 of 10 requests failed"), ("b", "10 of 10 requests failed")]
    report = analyse(log)
    assert report["closed"] == [{"arm": "b", "reason": "10 of 10 requests failed", "replicas": 2}]
    assert report["weights_p_value"] is None


def write_logs(folder: Path, experiment: ExperimentSettings) -> None:
    """Two replicas, and what a report must leave out."""
    for replica in range(2):
        own = folder / f"host-{replica}"
        log = AccessLog(AccessLogSettings(folder=str(own)))
        publish_experiment(str(own), experiment)
        for number in range(40):
            name = f"{replica}-{number}"
            line = {
                "request_id": name,
                "method": "Search",
                "code": "OK",
                "ms": 5.0,
                "experiment": "trial",
                "arm": "ab"[number % 2],
                "session": name,
            }
            log.add(line)
            if number % 2 or number < 4:
                log.add({"request_id": name, "method": "Feedback", "code": "OK", "ms": 0.1, "kind": "click"})
        log.add({**line, "request_id": "f", "forced": "fits"})
        log.add({**line, "request_id": "c", "code": "CANCELLED"})
        log.add({"request_id": "o", "method": "Search", "code": "OK", "ms": 5.0})
        log.add({"request_id": "0-4", "method": "Feedback", "code": "OK", "ms": 0.1, "kind": "save"})
        log.close()
        with log.path.open("a") as file:
            file.write(json.dumps({"experiment": experiment.name, "method": "Search"}) + '\n{"request_id": "cut o')


def test_the_command_reads_all_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_logs(tmp_path, settings())
    assert main(["experiment", str(tmp_path), "--kind", "click"]) == 0
    text = capsys.readouterr().out
    assert "arm b leads: feedback in 100.00% of 40 sessions, 10.00% of 40 with a" in text
    assert "left out: 2 requests, an arm could not have answered them" in text
    assert "left out: 4 lines that are cut off or damaged" in text
    assert main(["experiment", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    figures = {arm["name"]: (arm["requests"], arm["sessions"], arm["answers_with_feedback"]) for arm in report["arms"]}
    assert figures == {"a": (40, 40, 5), "b": (40, 40, 40)}  # with the save
    assert report["forced"] == {"fits": 2}


def test_wrong_folders_and_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no access-\*.jsonl"):
        read_experiment_log(str(tmp_path), None)
    write_logs(tmp_path, settings())
    with pytest.raises(UsageError, match="did you mean 'trial'"):
        read_experiment_log(str(tmp_path), "tral")
    publish_experiment(str(tmp_path), settings(guardrails={"max_p99_ms": 5.0}))
    with pytest.raises(UsageError, match="changed while it ran"):
        read_experiment_log(str(tmp_path), "trial")
    publish_experiment(str(tmp_path), ExperimentSettings.model_validate({**settings().model_dump(), "name": "next"}))
    with pytest.raises(UsageError, match="has the experiments next, trial; choose one"):
        read_experiment_log(str(tmp_path), None)


def test_from_searches_and_clicks_to_the_better_arm(world: "World", tmp_path: Path) -> None:
    """Interleaved live answers of a poor plan and of exact search; people click what is truly near."""
    poor = {"shortlist_dim": 8, "shortlist_k": 6, "rerank_dim": 8}
    plan = publish_plan(world.root, Artifact.open(world.index, "index"), poor, name="poorest").uri
    experiment = {"name": "trial", "mode": "interleave", "arms": [{"name": "poor"}, {"name": "exact", "plan": "none"}]}
    config = ServeConfig.model_validate(
        {"index": world.index, "plan": plan, "experiment": experiment, "access_log": {"folder": str(tmp_path)}}
    )
    vectors = np.random.default_rng(3).standard_normal((120, 64)).astype(np.float32)
    with LocalClient(config) as client:
        for number, vector in enumerate(vectors):
            near = world.searcher.ids(world.searcher.search(vector, 4, Plan.exact(64)).rows[0])
            result = client.search(vector=vector, k=6, session=f"s{number // 2}")
            for hit in result.hits:
                if hit.id in near:
                    client.feedback(result.info.request_id, "click", id=hit.id)
    log = read_experiment_log(str(tmp_path), "trial", "click")
    assert len(log.requests) == 120
    assert {hash_text(name) for name in world.images} >= {hit for _, hit, _ in log.feedback}
    report = analyse(log)
    assert report["duel"]["shown"]
    assert report["duel"]["wins"] > 3 * report["duel"]["losses"]
    assert "- arm exact leads: exact wins" in render(report)
