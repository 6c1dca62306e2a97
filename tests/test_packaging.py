"""The package as others get it: a source tree, a wheel, a Ray job with either, a bare client."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "platform/lookalike": "lookalike",
    "data": "lookalike/data",
    "train": "lookalike/train",
    "serve": "lookalike/serve",
}
DATA_SUFFIXES = (".yaml", ".txt", ".html", ".proto", ".typed")
NOT_PACKAGED = ("samples/", "proto/buf.yaml")


def run(*command: str, cwd: Path = ROOT, **env: str) -> "subprocess.CompletedProcess[str]":
    """A command without this process's PYTHONPATH; its output as text."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", ["platform", "data", "train", "serve"])
def test_source_root_is_no_package(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_standard_library_platform_is_not_shadowed() -> None:
    result = run(sys.executable, "-c", "import platform; print(platform.system())")
    assert result.stdout.strip() == platform.system(), result.stderr


def test_pytest_starts_at_the_root() -> None:
    result = run(sys.executable, "-m", "pytest", "--version")
    assert result.returncode == 0, result.stderr


def test_source_tree_needs_no_installation() -> None:
    code = "import lookalike, lookalike.data, lookalike.serve, lookalike.train; print(lookalike.__file__)"
    result = run(sys.executable, "-c", code, PYTHONPATH="platform")
    assert Path(result.stdout.strip()).resolve() == ROOT / "platform/lookalike/__init__.py", result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without the sample images: nobody edits it, and a build leaves nothing in ours."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("platform", "data", "train", "serve"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet", "*.so"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source tree."""
    target = tmp_path_factory.mktemp("wheel")
    result = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source))
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = target.glob("*.whl")
    return built


def expected_files() -> set[str]:
    """What the wheel must hold: every module and data file of the four folders."""
    files = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            wanted = path.suffix in {".py", *DATA_SUFFIXES} or path.suffix == ".pyi"
            if wanted and not name.startswith(NOT_PACKAGED) and "__pycache__" not in name:
                files.add(f"{package}/{name}")
    return files


def test_wheel_holds_every_module_and_data_file_and_no_other(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    library = {name for name in packaged if name.startswith("lookalike/retrieval/_native.")}
    assert packaged - library == expected_files()
    headers = Path(sysconfig.get_path("include"), "Python.h")
    assert len(library) == int(shutil.which("gcc") is not None and headers.exists()), "built where it can be"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {
        "lookalike/py.typed",
        "lookalike/serve/proto/retrieval.proto",
        "lookalike/data/interests/interests.yaml",
    } <= packaged


def test_wheel_declares_the_command_and_three_dependencies(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "lookalike = lookalike.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode().splitlines()
    required = [line.split(" ", 1)[1] for line in metadata if line.startswith("Requires-Dist:") and "extra" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["grpcio", "numpy", "protobuf"]


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a virtual environment with the wheel and its three dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", str(folder))
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    needed = run(*pip, "-c", str(ROOT / "constraints.txt"), "grpcio", "protobuf", "numpy")
    if needed.returncode != 0:
        pytest.skip(f"pip reaches no index here: {needed.stderr.strip().splitlines()[-1]}")
    result = run(*pip, "--no-deps", "--no-index", str(wheel))
    assert result.returncode == 0, result.stderr
    return folder / "bin"


@pytest.mark.slow
def test_client_needs_only_three_packages(bare: Path, tmp_path: Path) -> None:
    code = """
import sys
from lookalike.serve.client import Client
with Client("127.0.0.1:1", timeout_s=5.0) as client:
    pass
heavy = {"torch", "ray", "faiss", "pyarrow", "pydantic", "yaml", "fsspec"} & set(sys.modules)
print(sorted(heavy))
"""
    result = run(str(bare / "python"), "-c", code, cwd=tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_command_answers_in_a_bare_environment(bare: Path, tmp_path: Path) -> None:
    help_text = run(str(bare / "lookalike"), "--help", cwd=tmp_path)
    assert help_text.returncode == 0, help_text.stderr
    assert "finetune" in help_text.stdout
    version = run(str(bare / "lookalike"), "--version", cwd=tmp_path)
    assert version.stdout.startswith("lookalike "), version.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["corpus", "show", "serve"])
def test_verb_without_its_extra_says_what_to_install(bare: Path, tmp_path: Path, verb: str) -> None:
    result = run(str(bare / "lookalike"), verb, "recipe.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install 'lookalike[cpu]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one corpus of 40 sample records, with absolute paths: a job has a working directory of its own."""
    folder = tmp_path_factory.mktemp("records")
    sample = next(iter(sorted((ROOT / "data/samples/furniture").glob("*.parquet"))))
    pq.write_table(pq.read_table(sample).slice(0, 40), folder / "records.parquet")
    step = {"stage": "corpus", "settings": {"sources": [{"uri": f"{folder}/records.parquet", "dataset": "furniture"}]}}
    recipe = {"name": "job", "root": str(folder / "root"), "steps": {"corpus": step}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


JOBS = """
import json, pathlib, socket, subprocess, sys, time
from ray.job_submission import JobSubmissionClient

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

# `ray start`, not ray.init: it alone can move the job agent from its port, which another Ray of this host may hold.
dashboard = free_port()
cluster = subprocess.Popen([
    str(pathlib.Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2",
    "--object-store-memory=160000000", f"--port={free_port()}", "--include-dashboard=true",
    f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={sys.argv[1]}",
    "--disable-usage-stats"], stdout=sys.stderr, stderr=sys.stderr)
deadline = time.monotonic() + 240

def insist(call):
    while True:
        try:
            return call()
        except (RuntimeError, ConnectionError):  # dashboard and job agent answer some seconds after the start
            if time.monotonic() > deadline:
                raise
            time.sleep(1)

try:
    client = insist(lambda: JobSubmissionClient(f"http://127.0.0.1:{dashboard}"))
    results = []
    for job in json.load(sys.stdin):
        job_id = insist(lambda: client.submit_job(**job))
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
        results.append([client.get_job_status(job_id).value, client.get_job_logs(job_id)])
    print("RESULTS " + json.dumps(results))
finally:
    cluster.terminate()
    cluster.wait(60)
"""


@pytest.fixture(scope="module")
def jobs(source: Path, wheel: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> (status, log) of two Ray jobs on a cluster of their own: the source tree, and the wheel alone."""
    where = f"{sys.executable} -c 'import lookalike.data.corpus as m; print(m.__file__)'"

    def command(root: str) -> str:
        return f"{where} && {sys.executable} -m lookalike.cli corpus {records}/recipe.yaml root={records}/{root}"

    empty = tmp_path_factory.mktemp("empty")
    submitted = {
        "tree": {
            "entrypoint": command("tree"),
            "runtime_env": {"working_dir": str(source), "env_vars": {"PYTHONPATH": "platform"}},
        },
        "wheel": {
            "entrypoint": command("wheel"),
            "runtime_env": {"working_dir": str(empty), "py_modules": [str(wheel)]},
        },
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment["RAY_AUTH_MODE"] = "token"  # or the client sends none
    # Ray installs the wheel by the pip of its PATH: an activated environment's
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    short = tempfile.mkdtemp(prefix="lj-", dir="/tmp")  # sockets lie below it, and their paths may have 107 letters
    result = subprocess.run(
        [sys.executable, "-c", JOBS, short],
        cwd=empty,
        env=environment,
        check=False,
        text=True,
        input=json.dumps(list(submitted.values())),
        capture_output=True,
    )
    shutil.rmtree(short, ignore_errors=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, result.stdout + result.stderr
    return dict(zip(submitted, json.loads(lines[0].removeprefix("RESULTS ")), strict=True))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("name", "imported_from"), [("tree", "working_dir_files"), ("wheel", "py_modules_files")])
def test_ray_job_runs_a_stage_with_nothing_installed(
    jobs: dict[str, Any], records: Path, name: str, imported_from: str
) -> None:
    status, log = jobs[name]
    assert status == "SUCCEEDED", log
    assert any(imported_from in line and line.endswith("corpus.py") for line in log.splitlines()), log
    (manifest,) = (records / name).glob("corpus/corpus/*/manifest.json")
    assert json.loads(manifest.read_text())["kind"] == "corpus"
