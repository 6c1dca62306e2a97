"""``lookalike verify``: read every file of artifacts and compare it with the manifest.

Opening an artifact compares only sizes if it is larger than ``artifacts.FULL_CHECK_BYTES``, and libraries that read the
files do not notice a flipped bit. This command does, for any kind of artifact and any store.
"""

import sys
from collections.abc import Sequence

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact
from lookalike.errors import ArtifactError
from lookalike.flags import Parser
from lookalike.progress import progress_bar
from lookalike.telemetry import printable


def verify(args: Sequence[str]) -> int:
    """Print a line for each artifact and each damaged file; exit 3 if a file is damaged."""
    parser = Parser(
        prog="lookalike verify",
        description="Compare every file of artifacts with their manifests by SHA-256; exit 3 if one is damaged.",
    )
    parser.add_argument(
        "uris",
        nargs="+",
        metavar="URI",
        help="an artifact, or a folder with artifacts in it, such as a recipe's root; local or remote",
    )
    damaged = 0
    for uri in parser.parse_args(args).uris:
        for artifact_uri in find_artifacts(uri):
            problems = scrub(artifact_uri)
            damaged += len(problems)
            print(printable(f"{'DAMAGED' if problems else 'ok'}  {artifact_uri}"))
            for problem in problems:
                print(printable(f"  {problem}"))
    if damaged:
        print(
            f"lookalike: {damaged} damaged: remove the folder of each such artifact and run its stage again, or "
            "restore it from a copy",
            file=sys.stderr,
        )
    return ArtifactError.exit_code if damaged else 0


def find_artifacts(uri: str) -> list[str]:
    """URIs of the artifacts at or below ``uri``, sorted; ``ArtifactError`` if there are none."""
    names = storage.list_files(uri) if storage.exists(uri) else []
    folders = [name[: -len(MANIFEST)].rstrip("/") for name in names if f"/{name}".endswith(f"/{MANIFEST}")]
    if not folders:
        raise ArtifactError(f"no artifact at or below {uri}; give the folder of an artifact, or a root that has some")
    return [storage.join(uri, folder) if folder else uri.rstrip("/") for folder in folders]


def scrub(uri: str) -> list[str]:
    """The problems of the artifact at ``uri``, one line per file; reads all files."""
    try:
        artifact = Artifact.open(uri, check=False)
    except ArtifactError as error:
        return [str(error)]
    problems = []
    size = sum(file.size_bytes for file in artifact.manifest.files)
    with progress_bar(f"verify {artifact.manifest.kind}", size, "B") as bar:
        for file, problem in artifact.examine(content=True):
            problems += [problem] if problem else []
            bar.update(file.size_bytes)
    return problems
