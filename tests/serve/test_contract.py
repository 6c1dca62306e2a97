"""The wire contract: lint-clean, its stubs up to date, and a client that needs three packages."""

import subprocess
import sys
from pathlib import Path

import pytest

from lookalike.serve import proto
from lookalike.serve.proto.generate import generate

FOLDER = Path(str(proto.__file__)).parent
BUF = Path(sys.executable).with_name("buf")


def test_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    made = generate(tmp_path)
    assert [path.name for path in made] == ["retrieval_pb2.py", "retrieval_pb2.pyi", "retrieval_pb2_grpc.py"]
    for path in made:
        assert path.read_text() == (FOLDER / path.name).read_text(), f"{path.name}: run make proto"


@pytest.mark.skipif(not BUF.exists(), reason="buf is not installed (extra dev)")
def test_buf_lint_is_clean() -> None:
    done = subprocess.run([BUF, "lint", "."], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# typing_extensions comes with grpcio
BARE = """
import sys

ALLOWED = {"grpc", "typing_extensions", "google", "numpy", "lookalike", *sys.stdlib_module_names}

class OnlyThree:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"not in a bare environment: {name}", name=name)

sys.meta_path.insert(0, OnlyThree())
import lookalike.serve.client
from lookalike import Client
assert Client is lookalike.serve.client.Client
Client("127.0.0.1:1").close()
try:
    import yaml
except ModuleNotFoundError:
    print("the hook works")
"""


def test_the_client_imports_with_grpcio_protobuf_and_numpy_alone() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the hook works" in done.stdout
