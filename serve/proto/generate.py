"""``python -m lookalike.serve.proto.generate``: the Python stubs from ``retrieval.proto``; needs grpcio-tools."""

import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

PACKAGE = "lookalike/serve/proto"  # where the stubs import each other from
PROTO = "retrieval.proto"


def generate(folder: Path) -> list[Path]:
    """Write ``retrieval_pb2.py``, its type stub and ``retrieval_pb2_grpc.py`` into ``folder`` and return their paths.

    Raises ``RuntimeError`` when protoc refuses the file; its reasons are on stderr.
    """
    from grpc_tools import protoc

    here = Path(__file__).parent
    includes = [f"-I{PACKAGE}={here}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [f"--{kind}_out={temporary}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", *includes, *outputs, f"{PACKAGE}/{PROTO}"]) != 0:
            raise RuntimeError(f"protoc refuses {here / PROTO}; correct it where stderr says")
        made = sorted(Path(temporary, PACKAGE).iterdir())
        return [Path(shutil.copy(path, folder / path.name)) for path in made]


if __name__ == "__main__":
    for stub in generate(Path(__file__).parent):
        sys.stdout.write(f"{stub}\n")
