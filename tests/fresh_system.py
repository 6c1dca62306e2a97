"""The README's two commands on fresh Debian systems: ``make test-fresh``, as root, for hours.

debootstrap makes each system from the mirror that apt uses here: python3, python3-venv and make, with ``--compilers
yes`` also gcc, g++ and Python's headers. A plain user runs the commands in a copy of this tree, with this machine's
settings of pip, in a process namespace: all processes end with the command. Prints a JSON row per command; the output
is in ``runs/fresh``.

    python -m tests.fresh_system --suites bookworm --compilers no --commands quickstart
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("python3", "python3-venv", "make", "ca-certificates")
COMPILER = ("gcc", "g++", "python3-dev")
USER, USER_ID, HOME = "newcomer", 1000, "/home/newcomer"
TREE = f"{HOME}/lookalike"


def output(*command: str) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def mirror() -> str:
    """Address of this machine's Debian mirror, from the configuration of apt."""
    sites = output("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages").splitlines()
    if not sites:
        raise SystemExit("apt names no mirror on this machine; give its address by --mirror")
    return sites[0]


def pip_settings() -> dict[str, str]:
    """This machine's pip configuration as environment variables."""
    settings = {}
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, value = line.split("=", 1)
        settings["PIP_" + name.split(".", 1)[1].upper().replace("-", "_")] = value.strip("'\"").replace("\\n", " ")
    return settings


def named_paths(settings: dict[str, str]) -> set[Path]:
    """Files and folders of this machine that the values of ``settings`` name."""
    words = " ".join(settings.values()).split()
    paths = {Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))}
    # an index on the disk may name files beside its folder
    wide = {path.parent if path.is_dir() and len(path.parts) > 3 else path for path in paths}
    return {path for path in wide if path.exists()}


def build(system: Path, suite: str, compiler: bool, address: str) -> None:
    """Make a Debian with the packages that README names, and a plain user with a copy of this tree."""
    packages = ",".join(PACKAGES + (COMPILER if compiler else ()))
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", suite, str(system), address]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["chroot", str(system), "useradd", "--create-home", "--uid", str(USER_ID), USER], check=True)
    tree = system / TREE.lstrip("/")
    for name in output("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    subprocess.run(["chown", "-R", f"{USER_ID}:{USER_ID}", str(tree)], check=True)


def script(system: Path, command: str) -> str:
    """Shell script that runs ``command`` in ``system`` as the plain user, from within a namespace of its own."""
    settings = pip_settings()
    lines = ["set -e", "mount --make-rprivate /", f"mount -t proc proc {system}/proc"]
    lines += [f"mount --rbind /sys {system}/sys", f"mkdir -p {system}/dev/shm"]
    lines += [f"mount -t tmpfs -o mode=1777 tmpfs {system}/dev/shm"]
    for path in sorted(named_paths(settings)):
        target = f"{system}{path}"
        lines.append(f"mkdir -p {target}" if path.is_dir() else f"mkdir -p {Path(target).parent} && touch {target}")
        lines.append(f"mount --bind {path} {target}")
    environment = {"HOME": HOME, "USER": USER, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **settings}
    words = " ".join(quote(f"{name}={value}") for name, value in environment.items())
    inside = quote(f"cd {TREE} && {command}")
    # not exec: the shell stays, as the first process of the namespace, and reaps orphans
    lines += [f"chroot --userspec={USER_ID}:{USER_ID} {system} env -i {words} sh -c {inside} </dev/null; exit $?"]
    return "\n".join(lines)


def run(system: Path, command: str, log: Path) -> int:
    """Run a command in a fresh system; its exit code. Whatever it started ends with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script(system, command)]
        process = subprocess.Popen(namespace, stdout=stream, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        finally:
            process.kill()
            process.wait()


def last_figures(text: str) -> str:
    """The last line of a command's output that counts tests or gives the time of a query; "" if none does."""
    return next(iter(re.findall(r"^.*(?:\d+ passed|\d+ failed|a query alone took).*$", text, re.MULTILINE)[-1:]), "")


def attempt(options: argparse.Namespace, suite: str, compiler: str) -> bool:
    """Try the commands on one fresh system and print their rows; whether all ended well."""
    codes = []
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        system = Path(folder) / suite
        build(system, suite, compiler == "yes", options.mirror or mirror())
        for command in options.commands:
            log = options.logs / f"{suite}-compiler-{compiler}-{command}.log"
            start = time.monotonic()
            codes.append(run(system, f"make {command}", log))
            row = {"suite": suite, "compiler": compiler, "command": command, "exit": codes[-1]}
            row["seconds"] = round(time.monotonic() - start)
            print(json.dumps(row | {"figures": last_figures(log.read_text(errors="replace"))}), flush=True)
    return not any(codes)


def main() -> int:
    """Try every system; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["bookworm", "trixie"])
    parser.add_argument("--compilers", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--commands", nargs="+", choices=["quickstart", "test"], default=["quickstart", "test"])
    parser.add_argument("--mirror", help="address of a Debian mirror; by default the one that apt uses here")
    parser.add_argument("--logs", type=Path, default=ROOT / "runs/fresh")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        parser.error("this needs root and debootstrap: install the package debootstrap and run as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the context managers, which end what was started
    return int(not all([attempt(options, *system) for system in product(options.suites, options.compilers)]))


if __name__ == "__main__":
    sys.exit(main())
