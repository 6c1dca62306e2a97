"""``lookalike verify``: read every file of artifacts and compare it with the manifest.

Opening an artifact compares contents up to ``artifacts.FULL_CHECK_BYTES`` and sizes above; no library that reads the
files notices a flipped bit. This is the scrub that does, for any kind of artifact and any store.
"""

import argparse
import sys
from collections.abc import Sequence

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact
from lookalike.errors import ArtifactError
from lookalike.progress import progress_bar


def verify(args: Sequence[str]) -> int:
    """Print a line for each artifact and each damaged file; exit 3 when there is one."""
    parser = argparse.ArgumentParser(
        prog="lookalike verify",
        description="Compare every file of artifacts with their manifests by SHA-256; exit 3 when one is damaged.",
    )
    parser.add_argument(
        "uris",
        nargs="+",
        metavar="URI",
        help="an artifact, or a folder with artifacts below it, such as a recipe's root; local or remote",
    )
    damaged = 0
    for uri in parser.parse_args(args).uris:
        for found in find_artifacts(uri):
            problems = scrub(found)
            damaged += len(problems)
            print(f"{'DAMAGED' if problems else 'ok'}  {found}")
            for problem in problems:
                print(f"  {problem}")
    if damaged:
        print(
            f"lookalike: {damaged} damaged: remove the folder of each such artifact and run its stage again, or "
            "restore it from a copy",
            file=sys.stderr,
        )
    return ArtifactError.exit_code if damaged else 0


def find_artifacts(uri: str) -> list[str]:
    """URIs of the artifacts at or below ``uri``, sorted; ``ArtifactError`` when there are none."""
    names = storage.list_files(uri) if storage.exists(uri) else []
    folders = [name[: -len(MANIFEST)].rstrip("/") for name in names if f"/{name}".endswith(f"/{MANIFEST}")]
    if not folders:
        raise ArtifactError(f"no artifact at or below {uri}; give the folder of one, or a root that holds some")
    return [storage.join(uri, folder) if folder else uri.rstrip("/") for folder in folders]


def scrub(uri: str) -> list[str]:
    """What is wrong with the artifact at ``uri``, a line for each file; all files are read."""
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
