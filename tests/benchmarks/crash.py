"""Kill -9 in the middle of every step of a recipe, run again, and compare with a run that was left alone.

    python -m tests.benchmarks.crash [--recipe deploy/recipes/smoke.yaml] [--root runs/crash] [--seed 1]

The driver is killed at a random point of each step's usual duration; the next run resumes. One JSON row a kill, and a
summary that says whether all artifacts have the files (figures, where a stage records times) of the undisturbed run.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lookalike.artifacts import Artifact
from lookalike.recipe import Recipe

TIMED = {"plan"}  # its files hold measured times
BEGUN = re.compile(r"(start|skip) step=(\S+)")


def command(recipe: str, root: Path) -> list[str]:
    """Command of the run that is killed and repeated."""
    return [sys.executable, "-m", "lookalike.cli", "quickstart", recipe, f"root={root}"]


def run_until_killed(recipe: str, root: Path, step: str, delay_s: float) -> dict[str, Any]:
    """Start a run, kill its driver ``delay_s`` after ``step`` starts, and return a JSON row.

    A run that skips the step, which another has published before its kill came, is killed at once and not counted.
    """
    is_new = False
    with subprocess.Popen(command(recipe, root), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            begun = BEGUN.search(line)
            if begun and begun.group(2) == step:
                is_new = begun.group(1) == "start"
                time.sleep(delay_s if is_new else 0)
                run.send_signal(signal.SIGKILL)
                break
        run.stderr.close()
        code = run.wait()
    fired = is_new and code == -signal.SIGKILL
    return {"bench": "crash", "case": step, "delay_s": round(delay_s, 1), "exit_code": code, "fired": fired}


def artifacts(recipe: str, root: Path) -> dict[str, Artifact]:
    """Step -> its artifact; every step must be published."""
    loaded = Recipe.load(recipe, [f"root={root}"])
    by_step = {name: loaded.published(name) for name in loaded.steps}
    missing = [name for name, artifact in by_step.items() if artifact is None]
    assert not missing, f"steps {missing} are not published under {root}"
    return {name: artifact for name, artifact in by_step.items() if artifact is not None}


def published(recipe: str, root: Path) -> dict[str, Any]:
    """Step -> SHA-256 of its files, or its statistics without times where files hold measured times."""
    result: dict[str, Any] = {}
    for name, artifact in artifacts(recipe, root).items():
        figures = {k: v for k, v in artifact.stats.items() if not k.endswith(("_us", "_ratio"))}
        result[name] = figures if artifact.manifest.kind in TIMED else content(artifact)
    return result


def content(artifact: Artifact) -> dict[str, str]:
    """File -> SHA-256, without the training history, which records speeds."""
    return {f.path: f.sha256 for f in artifact.manifest.files if f.path != "history.json"}


def main() -> int:
    """Kill the run in every step, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="deploy/recipes/smoke.yaml")
    parser.add_argument("--root", type=Path, default=Path("runs/crash"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", nargs="*", help="steps to kill (default: all)")
    parser.add_argument("--undisturbed", type=Path, help="root of a finished run to compare with (default: make one)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    steps = options.steps or list(Recipe.load(options.recipe).steps)
    calm, root = options.undisturbed or options.root / "calm", options.root / "killed"
    subprocess.run(command(options.recipe, calm), check=True, stdout=subprocess.DEVNULL)
    durations = {name: artifact.manifest.duration_s for name, artifact in artifacts(options.recipe, calm).items()}
    kills = 0
    for step in steps:
        delay_s = chance.uniform(0.05, 0.9) * durations[step]
        row = run_until_killed(options.recipe, root, step, delay_s)
        kills += row["fired"]
        print(json.dumps(row), flush=True)
        time.sleep(3.0)  # Ray's own processes notice that their driver is gone
    subprocess.run(command(options.recipe, root), check=True, stdout=subprocess.DEVNULL)
    killed, left_alone = published(options.recipe, root), published(options.recipe, calm)
    differ = {name: [left_alone[name], killed[name]] for name in killed if killed[name] != left_alone[name]}
    print(
        json.dumps(
            {
                "bench": "crash",
                "summary": True,
                "kills": kills,
                "asked": len(steps),
                "steps": len(killed),
                "different": differ,
                "cpus": os.cpu_count(),
            }
        )
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
