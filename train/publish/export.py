"""``lookalike export``: a self-contained encoder in a folder or in a repository on a hub.

The folder holds weights, configuration, a model card and a manifest without parents, so it is an encoder artifact
like any other: ``Encoder.load``, a recipe's inputs and ``lookalike show`` take its URI. The fingerprint stays, so
vectors of either copy belong together. Exporting ``hf://owner/name`` to a folder is the way back.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike import hub, storage
from lookalike.artifacts import MANIFEST, Artifact, describe_file, lineage, write_manifest
from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.telemetry import fields, get_logger, printable
from lookalike.train.feed.row_groups import list_row_groups, read_row_group
from lookalike.train.publish.cards import describe_lineage, model_card, report_figures
from lookalike.train.publish.onnx import check_parity, require_packages, write_onnx
from lookalike.vision.encoder import CARD_FILE, CONFIG_FILE, MODEL_FILE, read_config, read_encoder, read_pixels

log = get_logger(__name__)
ONNX_FILE = "model.onnx"
EXPORTED = "exported"  # the statistic that marks an export's manifest
PARITY_PICTURES = 16
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def export(args: Sequence[str]) -> int:
    """Export as the command line says and print the target."""
    options = _parser().parse_args(args)
    artifact = Artifact.open(hub.fetch(options.encoder), "encoder")
    if not hub.is_hub(options.to):
        folder = storage.absolute(options.to)
        write_export(artifact, folder, options)
        print(printable(folder))
        return 0
    hub.split(options.to)  # a wrong name is refused before any work
    with tempfile.TemporaryDirectory() as folder:
        write_export(artifact, folder, options)
        message = f"{artifact.manifest.name} {artifact.manifest.fingerprint}"
        print(hub.push(folder, options.to, message=message, public=options.public))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Write an encoder as a folder or a hub repository that others load: weights, configuration, card, ONNX."
    parser = Parser(prog="lookalike export", description=about)
    parser.add_argument("encoder", help="an artifact's folder, an exported one, or hf://owner/name[@revision]")
    parser.add_argument("--to", required=True, help="folder (any fsspec URI) or hf://owner/name[@branch]")
    parser.add_argument("--onnx", action="store_true", help="add model.onnx, compared with the encoder on pictures")
    parser.add_argument(
        "--images",
        help="what to compare on: a picture, a folder of pictures, or a corpus or shards "
        "artifact (default: what the encoder was made from)",
    )
    parser.add_argument("--report", help="an evaluation report that measured this encoder, for the card's figures")
    parser.add_argument("--licence", help="SPDX identifier of the weights' licence, for the card")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser


def write_export(artifact: Artifact, folder: str, options: argparse.Namespace) -> None:
    """Write all files of the export into ``folder``, the manifest last.

    Raises ``UsageError`` if the folder holds another artifact that is not an export.
    """
    _require_free(folder)
    if options.onnx:
        require_packages()
    config, facts = read_config(artifact), _card_facts(artifact, options)
    images = find_pictures(artifact, options.images) if options.onnx else []
    storage.remove_file(storage.join(folder, MANIFEST))  # not an artifact from here until all is written
    storage.remove_file(storage.join(folder, ONNX_FILE))
    names = [CONFIG_FILE, MODEL_FILE]
    for name in names:
        storage.write_atomic(storage.join(folder, name), storage.read_bytes(artifact.path(name)))
    stats = {key: value for key, value in artifact.stats.items() if key not in (EXPORTED, "onnx")}
    if options.onnx:
        stats["onnx"] = _add_onnx(artifact, folder, read_pixels(images, config.transform))
        names.append(ONNX_FILE)
    card = model_card(
        artifact.manifest.name,
        config,
        about=facts["about"],
        licence=facts["licence"],
        figures=facts["figures"],
        origins=facts["lineage"],
        uri=options.to,
        onnx=stats.get("onnx"),
    )
    storage.write_atomic(storage.join(folder, CARD_FILE), card.encode())
    _write_manifest(artifact, folder, sorted(names), {**stats, EXPORTED: facts})
    log.info("export %s", fields(encoder=artifact.uri, to=options.to, onnx=options.onnx))


def _require_free(folder: str) -> None:
    if storage.exists(storage.join(folder, MANIFEST)):
        existing = Artifact.open(folder, check=False)
        if EXPORTED not in existing.stats:
            raise UsageError(
                f"{folder} is the {existing.manifest.kind} artifact {existing.manifest.name!r}, which an export "
                "would overwrite; give another folder"
            )


def _card_facts(artifact: Artifact, options: argparse.Namespace) -> dict[str, Any]:
    """Facts of a card besides the configuration; an export keeps them in its manifest for the cards of its copies."""
    facts: dict[str, Any] = artifact.stats.get(EXPORTED) or {
        "about": _about(artifact),
        "digest": artifact.digest,
        "figures": [],
        "licence": None,
        "lineage": describe_lineage(artifact),
    }
    if options.report:
        report = Artifact.open(storage.absolute(options.report), "report")
        facts = {**facts, "figures": report_figures(report, artifact.manifest.fingerprint)}
    return {**facts, "licence": options.licence or facts["licence"]}


def _about(artifact: Artifact) -> str:
    """Text of the artifact's own card without its title."""
    lines = storage.read_bytes(artifact.path(CARD_FILE)).decode().splitlines()
    return "\n".join(line for line in lines if not line.startswith("# ")).strip()


def _add_onnx(artifact: Artifact, folder: str, pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    config, model = read_encoder(artifact)
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, ONNX_FILE)
        write_onnx(path, model, config.transform.size)
        figures = check_parity(path, model, config, pixels)
        with open(path, "rb") as file:
            storage.write_atomic(storage.join(folder, ONNX_FILE), file.read())
    log.info("onnx %s", fields(**figures))
    return figures


def find_pictures(artifact: Artifact, uri: str | None) -> list[bytes]:
    """Up to ``PARITY_PICTURES`` encoded pictures, from ``uri`` (an image, a folder, an artifact) or the nearest
    ancestor.

    Raises ``UsageError`` if there are none.
    """
    if uri is None:
        ancestors = [ancestor for _, _, ancestor in lineage(artifact) if isinstance(ancestor, Artifact)]
        folders = [ancestor.uri for ancestor in ancestors if ancestor.manifest.kind in ("shards", "corpus")]
    else:
        folders = [storage.absolute(uri)]
    for folder in folders:
        if images := _pictures_in(folder):
            return images
    where = f"at {uri}" if uri else "among what the encoder was made from"
    raise UsageError(f"no pictures {where} to compare the ONNX file on; give --images a folder of pictures or a corpus")


def _pictures_in(folder: str) -> list[bytes]:
    names = storage.list_files(folder)
    uris = [storage.join(folder, name) if name else folder for name in names]
    images = [uri for uri in uris if uri.lower().endswith(IMAGE_SUFFIXES)]
    tables = [uri for uri in uris if uri.endswith(".parquet") and uri.rsplit("/", 1)[-1].startswith("part-")]
    if images or not tables:
        return [storage.read_bytes(uri) for uri in images[:PARITY_PICTURES]]
    column = read_row_group(list_row_groups(tables[:1])[0], ["image"])["image"]
    return [image.as_py() for image in column.slice(0, PARITY_PICTURES)]


def _write_manifest(artifact: Artifact, folder: str, names: Sequence[str], stats: dict[str, Any]) -> None:
    files, created = [describe_file(folder, name) for name in names], datetime.now(UTC).isoformat(timespec="seconds")
    update = {"files": files, "parents": {}, "stats": stats, "created": created}
    write_manifest(folder, artifact.manifest.model_copy(update=update))
