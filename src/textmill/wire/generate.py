"""Makes engine_pb2.py and engine_pb2.pyi from engine.proto: `python -m textmill.wire.generate` (needs grpcio-tools)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def generate(folder: Path) -> None:
    """Write both files into `folder`; raises CalledProcessError if the compiler refuses."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--python_out={folder}", f"--pyi_out={folder}"]
    subprocess.run([*command, "engine.proto"], check=True, cwd=HERE)
    stub = folder / "engine_pb2.pyi"
    # The compiler's stub leaves this type open, which strict checking refuses.
    stub.write_text(stub.read_text().replace(", _Mapping]", ", _Mapping[str, object]]"))


if __name__ == "__main__":
    generate(HERE)
