"""What can be known of ``Dockerfile.cpu`` without building it."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile.cpu"


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its text) in order, continuation lines joined, comments dropped."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


INSTRUCTIONS = read_instructions(DOCKERFILE)


def copies() -> list[tuple[list[str], str]]:
    """(sources, target) of each COPY from the build context."""
    words = [shlex.split(text) for name, text in INSTRUCTIONS if name == "COPY"]
    return [(parts[:-1], parts[-1]) for parts in words if not parts[0].startswith("--from")]


def test_copied_sources_exist_and_are_sent() -> None:
    ignore = (DOCKERFILE.parent / "Dockerfile.cpu.dockerignore").read_text().split()
    assert ignore[ignore.index("*") :]
    kept = [line[1:] for line in ignore if line.startswith("!")]
    sources = [source for group, _ in copies() for source in group]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in kept), source
    assert not any(fnmatch.fnmatch("runs", name) for name in kept)


def test_wheel_is_built_from_every_package_folder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    in_build = {source for group, _ in copies() for source in group}
    needed = {*folders, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= in_build


def test_extras_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.whl\)\[([a-z,]+)\]", DOCKERFILE.read_text())
    assert set(extras.split(",")) == {"cpu", "labels", "sample"} <= set(project["optional-dependencies"])


def test_python_is_the_supported_one_and_user_is_not_root() -> None:
    given = dict(text.partition("=")[::2] for name, text in INSTRUCTIONS if name == "ARG")
    bases = [text.split()[0].strip("${}") for name, text in INSTRUCTIONS if name == "FROM"]
    assert [given[base] for base in bases] == ["python:3.11", "python:3.11-slim"]  # or what --build-arg names
    users = [text for name, text in INSTRUCTIONS if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])  # a number: runAsNonRoot can check it


def test_environment_holds_the_serve_flags() -> None:
    environment = dict(word.split("=", 1) for name, text in INSTRUCTIONS if name == "ENV" for word in shlex.split(text))
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_recipes_and_their_data_lie_where_recipes_say() -> None:
    (workdir,) = [text for name, text in INSTRUCTIONS if name == "WORKDIR"][1:]
    manifests = [
        next(yaml.safe_load_all(path.read_text())) for path in (ROOT / "deploy/kuberay").glob("raycluster.yaml")
    ]
    assert workdir == manifests[0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["workingDir"]
    recipe = yaml.safe_load((ROOT / "deploy/recipes/quickstart.yaml").read_text())
    same_place = [source for group, target in copies() for source in group if target == source]
    for source in recipe["steps"]["corpus"]["settings"]["sources"]:
        assert any(source["uri"].startswith(folder) for folder in same_place)
    assert "deploy/recipes" in same_place


@pytest.mark.parametrize("name", ["torch", "torchvision", "ray", "faiss-cpu", "grpcio"])
def test_versions_are_pinned(name: str) -> None:
    assert re.search(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_haproxys_admin_socket_lies_in_a_folder_of_the_user() -> None:
    text = DOCKERFILE.read_text()
    (folder,) = re.findall(r"install --directory --mode=700 --owner=ray --group=ray (\S+)", text)
    environment = dict(word.split("=", 1) for name, text in INSTRUCTIONS if name == "ENV" for word in shlex.split(text))
    places = {name: value for name, value in environment.items() if name.startswith("RAY_SERVE_HAPROXY_")}
    assert set(places) == {
        f"RAY_SERVE_HAPROXY_{part}"
        for part in ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH", "SERVER_STATE_BASE", "SERVER_STATE_FILE")
    }
    assert all(f"{value}/".startswith(f"{folder}/") for value in places.values())
