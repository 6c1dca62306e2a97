"""The command line: exit codes, a help that answers at once, dry runs, and flags that nobody changes by accident."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lookalike.artifacts import Artifact
from lookalike.cli import COMMANDS, STAGE_HELP, main
from lookalike.stages import BUILT_IN

ROOT = Path(__file__).parents[2]
STAGE_FLAGS = {"--help", "--step", "--dry-run", "--describe"}
FLAGS = {
    **dict.fromkeys(STAGE_HELP, STAGE_FLAGS),
    "export": {"--help", "--to", "--onnx", "--images", "--report", "--licence", "--public"},
    "show": {"--help", "--json", "--verify", "--root"},
    "quickstart": {"--help", "--dry-run"},
    "doctor": {"--help", "--root", "--port", "--json"},
    "experiment": {"--help", "--experiment", "--kind", "--json"},
    "vectors": {
        *("--help", "--table", "--id-column", "--vector-column", "--array", "--column", "--model", "--licence"),
        *("--nested", "--on-bad", "--root", "--set", "--serve", "--dry-run"),
    },
    "serve": {"--help", "--index", "--dry-run", "--emit-config", "--check-config"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Two encoders of a tiny random backbone."""
    step = {"stage": "encoder", "settings": {"backbone": "test_efficientnet", "transform": {"size": 32}}}
    values = {"name": "tiny", "root": str(tmp_path / "runs"), "steps": {"small": step, "other": step}}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from lookalike.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = [m for m in ('torch', 'ray', 'numpy', 'pydantic', 'faiss', 'pyarrow') if m in sys.modules]\n"
        "print('HEAVY', code, heavy)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY 0 []"
    for verb in [*STAGE_HELP, *COMMANDS]:
        assert re.search(rf"^\s+{verb}\s", done.stdout, re.MULTILINE), verb


def test_every_stage_has_a_verb() -> None:
    assert list(STAGE_HELP) == [
        "corpus",
        "encoder",
        "labels",
        "shards",
        "pretrain",
        "finetune",
        "embed",
        "vectors",
        "evaluate",
        "classify",
        "index",
        "plan",
    ]
    assert set(STAGE_HELP) == set(BUILT_IN)


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_flags_are_frozen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) == FLAGS[verb]


def test_a_dry_run_says_what_would_run_and_runs_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encoder", recipe, "--dry-run", "small.seed=3"]) == 0
    small, other = json.loads(capsys.readouterr().out)
    assert (small["step"], small["state"], small["uri"], small["settings"]["seed"]) == ("small", "would run", None, 3)
    assert (other["step"], other["settings"]["seed"]) == ("other", 17)
    assert not (tmp_path / "runs").exists()


def test_a_stage_prints_what_it_published_and_skips_it_the_next_time(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookalike.cluster.ensure_ray", lambda config: None)  # this stage needs no Ray
    assert main(["encoder", recipe, "--step", "small"]) == 0
    uri = capsys.readouterr().out.strip()
    created = Artifact.open(uri, "encoder").manifest
    assert main(["encoder", recipe, "--step", "small"]) == 0
    assert capsys.readouterr().out.strip() == uri
    assert Artifact.open(uri).manifest == created
    assert main(["encoder", recipe, "--dry-run"]) == 0
    states = {step["step"]: (step["state"], step["uri"]) for step in json.loads(capsys.readouterr().out)}
    assert states == {"small": ("published already", uri), "other": ("would run", None)}


def test_ray_starts_for_work_alone(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("lookalike.cluster.ensure_ray", lambda config: started.append(True))
    assert main(["encoder", recipe, "--step", "small"]) == 0
    assert len(started) == 1
    assert main(["encoder", recipe, "--step", "small"]) == 0  # published: skipped
    assert len(started) == 1


def test_a_missing_input_is_found_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("lookalike.cluster.ensure_ray", refuse)
    steps = {
        "small": {"stage": "encoder", "settings": {"backbone": "test_efficientnet"}},
        "vectors": {"stage": "embed", "inputs": {"corpus": str(tmp_path / "corpus"), "encoder": "small"}},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "root": str(tmp_path / "runs"), "steps": steps}, sort_keys=False))
    assert main(["embed", str(file)]) == 3
    assert "no artifact at" in capsys.readouterr().err


def test_only_the_recipe_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("encoder", "run"):
        with pytest.raises(SystemExit):
            main([verb])
        assert "required: recipe\n" in capsys.readouterr().err


def test_describe_prints_the_schema_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoder", "--describe"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["weights"]["default"] == "random"
    assert "timm architecture" in schema["properties"]["backbone"]["description"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["encoder", "RECIPE", "small.bacbone=x"], "unknown key 'bacbone' (did you mean 'backbone'?)"),
        (["encoder", "/no/such.yaml"], "no recipe at /no/such.yaml"),
        (["encoder", "RECIPE", "--step", "smal"], "no step 'smal' (did you mean 'small'?)"),
        (["embed", "RECIPE"], "has no step of stage 'embed'"),
        (["embed", "RECIPE", "--step", "small"], "step 'small' is a 'encoder' step; run `lookalike encoder`"),
        (["encoder", "RECIPE", "nonsense"], "not of the form key.sub=value"),
    ],
)
def test_a_mistake_exits_2_without_a_traceback(
    recipe: str, args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe if arg == "RECIPE" else arg for arg in args]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("lookalike: ")
    assert "Traceback" not in err


def test_unknown_verbs_and_flags_exit_2(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["encodr"], [], ["encoder", recipe, "--dri"], ["encoder"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "usage: lookalike" in err
    assert "unknown verb 'encodr' (did you mean 'encoder'?)" in err


def test_a_missing_artifact_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "encoder" / "x" / "y")]) == 3
    assert "no artifact at" in capsys.readouterr().err
    (tmp_path / "picture.png").write_bytes(b"x")
    assert main(["show", str(tmp_path / "picture.png")]) == 3
    assert "picture.png: it is a file; give the folder of one (<root>/" in capsys.readouterr().err
    assert main(["show", "nosuch://bucket/x"]) == 2  # not a damaged artifact: nothing here opens it
    assert "Protocol not known: nosuch" in capsys.readouterr().err


def test_an_interruption_exits_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lookalike.commands.run.run_stage", interrupt)
    assert main(["encoder"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [("| true", 141, ""), ("2>&1 | true", 141, ""), (">/dev/full", 1, "the output cannot be written (No space left")],
)
def test_nobody_reads_the_output(output: str, code: int, words: str) -> None:
    """A verb whose output is cut off, as by ``| head``, ends without a traceback."""
    verb = f"{sys.executable} -m lookalike.cli finetune --describe x"
    slow = f"(sleep 0.2; exec {verb})" if "|" in output else verb  # the reader is gone before the first line
    script = f"set -o pipefail; {slow} {output}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert words in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["search", "--id", "x", "--wheer", "view=icon"], "did you mean '--where'"),
        (["search", "--id", "x", "--min-recal", "0.9"], "did you mean '--min-recall'"),  # no flag is guessed
        (["search", "--id", "x", "--filter=view"], "unrecognized arguments: --filter=view"),
        (["serve", "r.yaml", "--dryrun"], "did you mean '--dry-run'"),
        (["show", "x", "--jsn"], "did you mean '--json'"),
        (["labels", "r.yaml", "--stp", "x"], "did you mean '--step'"),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
