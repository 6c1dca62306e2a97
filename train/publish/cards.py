"""Model cards in Markdown: what an encoder is, how to use it, what it was made from, what was measured.

The front matter has the form of model hubs, so that a repository shows licence, tags and figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from lookalike.artifacts import Artifact, lineage
from lookalike.errors import ArtifactError, UsageError
from lookalike.vision.encoder import EncoderConfig

NOT_METRICS = ("dim", "queries", "database", "seed")
Rows = Sequence[Mapping[str, Any]]


def model_card(
    name: str,
    encoder: EncoderConfig,
    *,
    about: str,
    licence: str | None = None,
    figures: Rows = (),
    origins: Sequence[str] = (),
    uri: str = "PATH",
    onnx: Mapping[str, Any] | None = None,
) -> str:
    """The card of the encoder ``name``.

    ``about``: how it was trained, in Markdown without a title. ``licence``: SPDX identifier; None if nobody stated one.
    ``figures``, ``origins``: results of ``report_figures`` and ``describe_lineage``. ``uri``: what the usage snippet
    loads. ``onnx``: figures of the parity check, if a ``model.onnx`` lies beside the card.
    """
    parts = [
        _front_matter(name, encoder, licence, figures),
        f"# {name}",
        about.strip(),
        _usage(encoder, uri),
        _sizes(encoder),
        *_figures(figures),
        *([_onnx(encoder, onnx)] if onnx else []),
    ]
    if origins:
        parts.append("## Lineage\n\n" + "\n".join(f"- {line}" for line in origins))
    parts.append("## Licence\n\n" + (f"`{licence}`." if licence else "Not stated; ask who published them."))
    return "\n\n".join(parts) + "\n"


def report_figures(report: Artifact, fingerprint: str) -> Rows:
    """Rows of an evaluation report that measure prefixes of the encoder with ``fingerprint``.

    Raises ``UsageError`` if the report measures only other encoders.
    """
    encoders: dict[str, str] = {}
    for input_name, _, uri in report.parents():
        if input_name == "embeddings":
            embeddings = Artifact.open(uri, "embeddings", check=False)
            encoders[embeddings.manifest.name] = embeddings.read_json("meta.json")["encoder"]["fingerprint"]
    names = {name for name, stamp in encoders.items() if stamp == fingerprint}
    rows = [
        row
        for row in report.read_json("report.json")["rows"]
        if row["embedding"] in names and row["method"] == "prefix"
    ]
    if not rows:
        measured = ", ".join(f"{name} (encoder {stamp})" for name, stamp in encoders.items())
        raise UsageError(
            f"{report.uri} measures {measured}, none of which is encoder {fingerprint}; give the report "
            "of an evaluation that read its vectors"
        )
    return rows


def describe_lineage(artifact: Artifact) -> list[str]:
    """One line per ancestor, nearest first: kind, name, fingerprint and date."""
    lines = []
    for _, input_name, ancestor in lineage(artifact):
        if isinstance(ancestor, ArtifactError):
            lines.append(f"{input_name}: no longer there")
        else:
            made = ancestor.manifest
            lines.append(f"{input_name}: {made.kind} `{made.name}` {made.fingerprint}, {made.created[:10]}")
    return list(dict.fromkeys(lines))


def metric_names(row: Mapping[str, Any]) -> list[str]:
    """Names of the metrics in a report's row."""
    return [
        name
        for name, value in row.items()
        if isinstance(value, float) and name not in NOT_METRICS and not name.endswith("standard_error")
    ]


def _front_matter(name: str, encoder: EncoderConfig, licence: str | None, figures: Rows) -> str:
    values: dict[str, Any] = {
        "library_name": "lookalike",
        "pipeline_tag": "image-feature-extraction",
        "license": licence or "unknown",
        "tags": ["visual-search", "image-embedding", "matryoshka", "timm", encoder.backbone],
    }
    if figures:
        values["model-index"] = [{"name": name, "results": list(_results(figures, encoder.dim))}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _results(figures: Rows, dim: int) -> Iterable[dict[str, Any]]:
    """Figures of the whole embedding in the form of hubs, one result per task."""
    for row in (row for row in figures if row["dim"] == dim):
        metrics = [
            {"type": metric, "name": f"{metric} at {dim}-d", "value": round(row[metric], 4)}
            for metric in metric_names(row)
        ]
        yield {
            "task": {"type": "image-retrieval", "name": "Image retrieval"},
            "dataset": {"type": row["task"], "name": row["task"]},
            "metrics": metrics,
        }


def _usage(encoder: EncoderConfig, uri: str) -> str:
    prefix = encoder.dims[len(encoder.dims) // 2]
    return f"""## Use

```python
import numpy as np
from lookalike import Encoder

encoder = Encoder.load("{uri}")
vectors = encoder.encode([open("picture.jpg", "rb").read()])  # float32 [1, {encoder.dim}], not normalised
prefix = vectors[:, :{prefix}]  # truncate first, then normalise, then compare by cosine
prefix /= np.linalg.norm(prefix, axis=1, keepdims=True)
```"""


def _sizes(encoder: EncoderConfig) -> str:
    transform = encoder.transform
    cut = "padded to a white square" if transform.fit == "pad" else f"cut to the middle {transform.crop_fraction:.3g}"
    lines = [
        f"| backbone | `{encoder.backbone}`, {encoder.num_features} features |",
        f"| projection | {'linear, without bias' if encoder.projection else 'none'} |",
        f"| pooling | {encoder.pooling} |",
        f"| nested dims | {', '.join(map(str, encoder.dims))} |",
        f"| images | RGB, {cut}, scaled to {transform.size} px ({transform.interpolation}) |",
        f"| normalised by | mean {list(transform.mean)}, std {list(transform.std)} |",
    ]
    return "\n".join(["| part | value |", "|---|---|", *lines])


def _figures(figures: Rows) -> list[str]:
    """One table per task: dims down, metrics across."""
    parts = ["## Figures"] if figures else []
    for task in dict.fromkeys(row["task"] for row in figures):
        rows = sorted((row for row in figures if row["task"] == task), key=lambda row: int(row["dim"]))
        names = metric_names(rows[0])
        head = f"`{task}`: {rows[0].get('queries', '?')} queries against {rows[0].get('database', '?')} images."
        table = [f"| dim | {' | '.join(names)} |", "|--:|" + "--:|" * len(names)]
        table += [f"| {row['dim']} | {' | '.join(f'{row[name]:.4f}' for name in names)} |" for row in rows]
        parts.append(f"{head}\n\n" + "\n".join(table))
    return parts


def _onnx(encoder: EncoderConfig, parity: Mapping[str, Any]) -> str:
    size = encoder.transform.size
    return f"""## ONNX

`model.onnx`: `images` float32 [n, 3, {size}, {size}], prepared as above, to `embedding` float32 [n, {encoder.dim}],
not normalised; a nested dim is a slice. On {parity["pictures"]} pictures it differs from the original by at most
{parity["max_abs_difference"]:.2g} (values up to {parity["max_abs_value"]:.2g}), and its cosine with it is at least
{parity["min_cosine"]:.6f} at every nested dim."""
