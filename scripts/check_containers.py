"""Run the Dockerfiles' own commands without a container engine: every stage in clean virtual environments.

The stages' RUN lines are taken from the files, with their folders moved to a temporary place; COPY is done by hand, and
what needs root (the user) is left out. Then the cloud's entry point serves the bundle that the builder exported, and
the edge's sends it a photograph. It takes a few minutes, and downloads what the images would.

    python scripts/check_containers.py [--keep DIR]
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import skimage

ROOT = Path(__file__).resolve().parent.parent
PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"
NEEDS_ROOT = re.compile(r"&& (useradd|mkdir /cache|chown|rm -rf /wheels)[^&]*")


def stages(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def build(name: str, image: Path) -> None:
    """Do what the Dockerfile says, below `image`."""
    source, environment = image / "src", dict(os.environ)
    source.mkdir(parents=True)
    for instruction, arguments in stages(ROOT / name / "Dockerfile"):
        if instruction == "ARG" and "=" in arguments:
            environment.setdefault(*arguments.split("=", 1))
        elif instruction == "COPY" and not arguments.startswith("--from"):
            *files, target = shlex.split(arguments)
            for file in files:
                place = image / "wheels" if target.startswith("/wheels") else source
                if (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, place / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / file, place)
        elif instruction == "RUN":
            command = NEEDS_ROOT.sub("", arguments)
            command = re.sub(r"(?<![\w./])/(opt|wheels|bundle)\b", rf"{image}/\1", command)
            (image / "opt").mkdir(exist_ok=True)
            print(f"{name}: {command}", flush=True)
            subprocess.run(["bash", "-euc", command], cwd=source, env=environment, check=True, stdout=sys.stderr)


def installed(venv: Path) -> set[str]:
    """Packages of a virtual environment."""
    done = subprocess.run([venv / "bin" / "pip", "list", "--format", "json"], capture_output=True, check=True)
    return {package["name"] for package in json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work here, and leave what was made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        for name in ("cloud", "edge"):
            build(name, root / name)
            packages = installed(root / name / "opt" / "bitneck")
            assert not packages & {"torch", "torchvision", "timm"}, packages
            assert ("fastapi" in packages) == (name == "cloud"), packages
        cloud = [root / "cloud" / "opt" / "bitneck" / "bin" / "bitneck-cloud", "serve"]
        options = ["--bundle", root / "cloud" / "bundle", "--log-format", "json", "--json"]
        addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        with subprocess.Popen([*cloud, *options, *addresses], stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                address = json.loads(server.stdout.readline())["grpc"]
                edge = [root / "edge" / "opt" / "bitneck" / "bin" / "bitneck-edge", "run", PHOTO, "--server", address]
                done = subprocess.run([*edge, "--cache-dir", root / "cache", "--json"], capture_output=True, check=True)
            finally:
                server.terminate()
        answer = json.loads(done.stdout)["frames"][0]
        print(f"{answer['point']}: {answer['payload_bytes']} bytes, {answer['labels'][0]['name']}")


if __name__ == "__main__":
    main()
