"""Stage ``labels``: noisy text to per-image labels in seven steps (Pinterest section 3.2.1; see data/README.md).

Each step is a pure function of a module beside this one, run on parts of the corpus by the module of the same concern
in ``steps/``. Near-duplicates are found first, although the paper lists them last, so that copies of one picture cannot
vouch for a term on both sides of a hold-out.
"""

import json
from typing import Any

from lookalike import storage
from lookalike.cluster import ensure_ray
from lookalike.data.report.report import write_report
from lookalike.data.steps import dictionary as visual
from lookalike.data.steps import duplicates, text
from lookalike.data.steps import interests as assign
from lookalike.data.steps.job import LabelJob, LabelsConfig
from lookalike.stages import Input, Stage, StageRun


def run(run: StageRun[LabelsConfig]) -> None:
    """All steps, in order; see the module's text."""
    ensure_ray()
    job = LabelJob(run)
    job.once("sign", duplicates.sign)
    dropped = job.once("duplicates", duplicates.find)
    terms = job.once("vocabulary", text.mine)
    annotated = job.once("annotations", text.annotate_all)
    dictionary = job.once("dictionary", visual.score)
    clusters = job.once("clusters", assign.cluster)
    assigned = job.once("labels", lambda job: assign.assign(job, clusters["interests"]))
    senses = job.once("polysemy", assign.tell_senses)
    stats = {
        **assigned,
        "duplicates": dropped,
        "terms": terms["terms"],
        "annotations": annotated["annotations"],
        "dictionary": dictionary,
        "terms_used": clusters["terms"],
        "clusters": clusters["clusters"],
        "carried_over": clusters["carried_over"],
        "next_cluster": clusters["next_cluster"],
        "polysemy": senses,
    }
    check_flow(stats)
    classes = json.loads(storage.read_bytes(run.out.path("classes.json")))
    job.once("report", lambda job: write_report(run.out, job.corpus, stats, run.config.report, classes))
    run.out.stats = stats


def check_flow(stats: dict[str, Any]) -> None:
    """Every image and every term is accounted for: in = kept + dropped by reason."""
    duplicates, dictionary = stats["duplicates"], stats["dictionary"]
    assert sum(duplicates["reasons"].values()) == duplicates["dropped"]
    assert duplicates["rows"].get("train", 0) == stats["images"] + duplicates["dropped"]
    assert stats["terms"] == sum(dictionary.get(status, 0) for status in ("kept", "abstract", "too_few"))


def _sources(config: LabelsConfig) -> list[str]:
    chosen = config.dictionary.boundary_from
    named = [config.dedup.labelled_pairs, config.clusters.interests.taxonomy, None if chosen is None else chosen.words]
    return [*(uri for uri in named if uri is not None), *config.annotations.sources()]


STAGE: Stage[LabelsConfig] = Stage(
    "labels",
    "labels",
    LabelsConfig,
    run,
    resumable=True,
    version=3,
    sources=_sources,
    inputs={"corpus": Input("corpus"), "embeddings": Input("embeddings"), "previous": Input("labels", optional=True)},
)
