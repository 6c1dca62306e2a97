"""``lookalike show``: one artifact, with its lineage back to the raw corpus."""

import json
from collections.abc import Sequence

from lookalike.artifacts import Artifact, lineage
from lookalike.errors import ArtifactError, ForeignArtifactError
from lookalike.flags import Parser
from lookalike.telemetry import printable, printable_lines


def show(args: Sequence[str]) -> int:
    """Print manifest, statistics and lineage of an artifact; exit 3 if it or an ancestor is missing or damaged.

    Ancestors in other stores are named and not opened, unless ``--root`` allows it.
    """
    parser = Parser(prog="lookalike show", description="Print an artifact with its lineage.")
    parser.add_argument("uri", help="folder of an artifact, for example runs/quickstart/index/index/<fingerprint>")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON instead")
    parser.add_argument("--verify", action="store_true", help="compare every file by SHA-256, even in large artifacts")
    help_root = "also follow the lineage to artifacts below this URI; repeat it for more"
    parser.add_argument("--root", action="append", default=[], metavar="URI", help=help_root)
    options = parser.parse_args(args)
    artifact = Artifact.open(options.uri)
    if options.verify:
        artifact.verify(content=True)
    if options.json:
        print(json.dumps(artifact.manifest.model_dump(mode="json"), indent=1))
        return 0
    broken = 0
    print(render(artifact))
    print("lineage")
    print(_line(0, "this", artifact))
    for depth, input_name, ancestor in lineage(artifact, roots=options.root):
        broken += isinstance(ancestor, ArtifactError) and not isinstance(ancestor, ForeignArtifactError)
        print(_line(depth, input_name, ancestor))
    return ArtifactError.exit_code if broken else 0


def render(artifact: Artifact) -> str:
    """The facts of an artifact as lines of text."""
    manifest = artifact.manifest
    size = sum(f.size_bytes for f in manifest.files)
    lines = [
        f"{manifest.kind} {manifest.name!r}  {artifact.uri}",
        f"  created {manifest.created}  took {manifest.duration_s:.1f} s  lookalike {manifest.code_version}",
        f"  fingerprint {manifest.fingerprint}  digest {artifact.digest[:16]}",
        f"  {len(manifest.files)} files, {size / 1e6:.2f} MB",
        *(
            f"    {f.path}  {f.size_bytes} bytes" + (f"  {f.rows} rows" if f.rows is not None else "")
            for f in manifest.files
        ),
        "stats",
        *(f"  {key}: {json.dumps(value)[:200]}" for key, value in manifest.stats.items()),
        "settings",
        *(f"  {key}: {json.dumps(value)[:200]}" for key, value in manifest.config.items()),
    ]
    return printable_lines(lines)


def _line(depth: int, input_name: str, ancestor: Artifact | ArtifactError) -> str:
    indent = "  " * (depth + 1)
    if isinstance(ancestor, ArtifactError):
        state = "ELSEWHERE" if isinstance(ancestor, ForeignArtifactError) else "BROKEN"
        return printable(f"{indent}{input_name}: {state}: {ancestor}")
    manifest = ancestor.manifest
    text = f"{indent}{input_name}: {manifest.kind} {manifest.name!r} {manifest.fingerprint}  {manifest.created}"
    return printable(text)
