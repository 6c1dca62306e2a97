"""Stage ``labels``: noisy text to per-image labels (Pinterest section 3.2.1; see data/README.md).

``run`` calls every step once, in order; a module of ``steps/`` wires each one to Ray. Near-duplicates are found first,
although the paper lists them last, so that copies of one picture cannot vouch for a term on both sides of a hold-out.
"""

from collections.abc import Mapping
from typing import Any

from lookalike.artifacts import Artifact
from lookalike.cluster import ensure_ray
from lookalike.data.report.page import write_report
from lookalike.data.steps import dictionary, duplicates, interests, signing, text
from lookalike.data.steps.job import LabelJob, LabelsConfig
from lookalike.errors import UsageError
from lookalike.outlook import Outlook, listed, require_values
from lookalike.schemas import CORPUS
from lookalike.stages import Input, Stage, StageRun


def run(run: StageRun[LabelsConfig]) -> None:
    """All steps. The comment above a step says which files it reads and which it writes."""
    ensure_ray()
    job = LabelJob(run)
    # corpus, embeddings -> signatures, held-out groups
    signed = job.once("sign", signing.sign)
    # signatures -> duplicates, lent (which row inherits the words of a dropped copy)
    dropped = job.once("duplicates", duplicates.find, signed["splits"])
    if not job.config.words:
        # corpus, duplicates -> image_labels, classes.json
        kept = job.once("labels", interests.assign_none)
        assert dropped["rows"].get("train", 0) == kept["images"] + dropped["dropped"]
        run.out.stats = {**kept, "duplicates": dropped}
        return
    # corpus -> vocabulary
    mined = job.once("vocabulary", text.mine)
    # corpus, vocabulary -> annotations
    annotated = job.once("annotations", text.annotate_all)
    # annotations, lent -> borrowed (annotations of the dropped copies)
    job.once("borrowed", duplicates.lend, dropped["reasons"])
    # signatures, duplicates, annotations, vocabulary -> dictionary
    scored = job.once("dictionary", dictionary.score, signed["splits"], annotated["spellings"])
    # dictionary, vocabulary -> clusters, votes of terms for interests
    clustered = job.once("clusters", interests.cluster)
    # corpus, duplicates, annotations, borrowed, clusters, votes -> image_labels, classes.json, assigned
    assigned = job.once("labels", interests.assign, clustered["interests"])
    # assigned -> polysemy
    senses = job.once("polysemy", interests.tell_senses)
    stats = {
        **assigned,
        "duplicates": dropped,
        "terms": mined["terms"],
        "annotations": annotated["annotations"],
        "dictionary": scored,
        "terms_used": clustered["terms"],
        **{name: clustered[name] for name in ("clusters", "carried_over", "next_cluster")},
        "polysemy": senses,
    }
    check_flow(stats)
    # everything above -> report.html and its pictures
    job.once("report", lambda job: write_report(job.out, job.corpus, stats, job.config.report))
    run.out.stats = stats


def check_flow(stats: dict[str, Any]) -> None:
    """Assert that every image and every term is accounted for: in = kept + dropped by reason."""
    dropped, terms = stats["duplicates"], stats["dictionary"]
    assert sum(dropped["reasons"].values()) == dropped["dropped"]
    assert dropped["rows"].get("train", 0) == stats["images"] + dropped["dropped"]
    assert stats["terms"] == sum(terms.get(status, 0) for status in ("kept", "abstract", "too_few"))


def _sources(config: LabelsConfig) -> list[str]:
    boundary = config.dictionary.boundary_from
    words = boundary.words if boundary else None
    uris = [config.dedup.labelled_pairs, config.clusters.interests.taxonomy, words]
    return [*(uri for uri in uris if uri is not None), *config.annotations.sources()]


def foresee(config: LabelsConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: labels need training rows, and a boundary by retrieval its validation split; without words
    there will be none."""
    (corpus,) = given["corpus"].values()
    if not corpus.get("split", {"train": 1}).get("train"):
        raise UsageError(
            "labels are made from rows whose split is 'train', and no row of the corpus will have it; there will be "
            f"{listed(corpus['split'])}; rename the split in the source, map another column (columns: {{split: ...}}), "
            "or set columns: {split: null} for training on every row"
        )
    boundary = config.dictionary.boundary_from
    if boundary is not None and boundary.criterion == "retrieval":
        require_values(corpus, "dictionary.boundary_from", {"split": [boundary.split]}, CORPUS.names)
    return {} if config.words else {"labels": {}}


INPUTS = {"corpus": Input("corpus"), "embeddings": Input("embeddings"), "previous": Input("labels", optional=True)}
STAGE: Stage[LabelsConfig] = Stage(
    "labels", "labels", LabelsConfig, run, resumable=True, version=5, sources=_sources, inputs=INPUTS, foresee=foresee
)
