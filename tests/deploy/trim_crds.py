"""Make the CRD schemas that the manifest tests validate against, from KubeRay's own.

``python tests/deploy/trim_crds.py FOLDER`` reads ``ray.io_<plural>.yaml`` (KubeRay, ray-operator/config/crd/bases) and
writes ``tests/deploy/data/<kind>.json.gz``: the schema of version v1 without descriptions and status, which is all that
a validation of ``spec`` needs.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
DATA = Path(__file__).resolve().parent / "data"


def read_schema(folder: Path, kind: str) -> dict[str, Any]:
    """The v1 schema of ``kind`` as KubeRay publishes it."""
    text = (folder / f"ray.io_{KINDS[kind]}.yaml").read_text()
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = document["spec"]["versions"]
    return dict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])


def trim(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` without descriptions at any depth and without ``status``."""
    spec = {name: value for name, value in schema["properties"].items() if name != "status"}
    return dict(_without_descriptions({**schema, "properties": spec}))


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_descriptions(item) for item in node]
    if isinstance(node, dict):  # a property may itself be called description: its value is a schema, not a text
        return {
            key: _without_descriptions(value)
            for key, value in node.items()
            if key != "description" or not isinstance(value, str)
        }
    return node


def main(folder: Path) -> None:
    """Write one file a kind; the same input gives the same bytes."""
    for kind in KINDS:
        content = json.dumps(trim(read_schema(folder, kind)), separators=(",", ":"), sort_keys=True).encode()
        (DATA / f"{kind}.json.gz").write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
