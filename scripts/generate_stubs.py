"""Generate shared/bitneck/v2 from proto/bitneck/v2. `--check` writes nothing and fails if the stubs are stale."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = "bitneck/v2/inference.proto"
NAMES = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py", "inference_pb2_grpc.pyi")


def generate(out: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--pyi_out={out}",
            f"--grpc_python_out={out}", f"--mypy_grpc_out={out}", PROTO,
        ],
        check=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip


def stale() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, kept = Path(folder) / "bitneck" / "v2", ROOT / "shared" / "bitneck" / "v2"
        return [n for n in NAMES if not (kept / n).is_file() or (kept / n).read_bytes() != (fresh / n).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if names := stale():
            sys.exit(f"stale stubs: {', '.join(names)}; run `make stubs`")
        return
    generate(ROOT / "shared")
    (ROOT / "shared" / "bitneck" / "v2" / "__init__.py").write_text(
        '"""Generated from proto/bitneck/v2; see `make stubs`."""\n'
    )


if __name__ == "__main__":
    main()
