"""Check the Dockerfiles without a container engine: run their own commands in clean virtual environments.

    python scripts/check_containers.py [--keep DIR]

The RUN lines are taken from the files; their folders are moved to a temporary place. This script does the COPY lines
itself and leaves out what needs root. Then the cloud's entry point serves the bundle that was copied in, and the
edge's entry point sends it a photograph, one in HEIC and a video. It takes a few minutes and downloads what the images
would download. Run `make bundle` before.
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
from typing import Any

import av
import pillow_heif

from bitneck_testing.photographs import photo, sample_photo
from bitneck_testing.processes import edge_run, run_json, running_server

ROOT = Path(__file__).resolve().parent.parent
NEEDS_ROOT = re.compile(r"&& (useradd|mkdir /cache|mkdir /bundles|chown|rm -rf /wheels)[^&]*")


def stages(dockerfile: Path) -> list[tuple[str, str]]:
    """The (instruction, arguments) of a Dockerfile: continued lines are joined, comments are left out."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def build(name: str, image: Path) -> None:
    """Do what the Dockerfile of a component says, below the folder `image`."""
    source, environment, given = image / "src", dict(os.environ), dict[str, str]()
    source.mkdir(parents=True)
    for instruction, arguments in stages(ROOT / name / "Dockerfile"):
        if instruction == "ARG" and "=" in arguments:
            environment.setdefault(*arguments.split("=", 1))
            given.update([arguments.split("=", 1)])
        elif instruction == "COPY" and not arguments.startswith("--from"):
            *files, target = shlex.split(re.sub(r"\$\{(\w+)\}", lambda match: given[match[1]], arguments))
            for file in files:
                place = image / "wheels" if target.startswith("/wheels") else source
                if target.startswith("/bundles"):
                    shutil.copytree(ROOT / file, image / target.removeprefix("/"))
                elif (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, place / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / file, place)
        elif instruction == "RUN":
            command = NEEDS_ROOT.sub("", arguments)
            command = re.sub(r"(?<![\w./])/(opt|wheels)\b", rf"{image}/\1", command)
            (image / "opt").mkdir(exist_ok=True)
            print(f"{name}: {command}", flush=True)
            subprocess.run(["bash", "-euc", command], cwd=source, env=environment, check=True, stdout=sys.stderr)


def installed(venv: Path) -> set[str]:
    """The packages that a virtual environment has."""
    done = subprocess.run([venv / "bin" / "pip", "list", "--format", "json"], capture_output=True, check=True)
    return {package["name"] for package in json.loads(done.stdout)}


def make_heic(path: Path) -> Path:
    """A photograph as phones write it."""
    pillow_heif.from_pillow(photo(1, (640, 480))).save(path)
    return path


def make_video(path: Path) -> Path:
    """Five pictures in the format that most cameras write to files."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for k in range(5):
            out.mux(stream.encode(av.VideoFrame.from_image(photo(k, (320, 240)))))
        out.mux(stream.encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this folder, and keep it afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        for name in ("cloud", "edge"):
            build(name, root / name)
            packages = installed(root / name / "opt" / "bitneck")
            assert not packages & {"torch", "torchvision", "timm"}, packages
            assert ("fastapi" in packages) == (name == "cloud"), packages
        bundle = root / "cloud" / "bundles" / "efficientnet_lite0"
        cloud, edge = (root / name / "opt" / "bitneck" / "bin" / f"bitneck-{name}" for name in ("cloud", "edge"))
        with running_server(bundle, options=("--log-format", "json"), program=cloud) as server:
            document = run_json(edge_run(server.grpc, root / "cache", "--json", sample_photo(), program=edge))
            answer = document["frames"][0]
            print(f"{answer['point']}: {answer['payload_bytes']} bytes, {answer['labels'][0]['name']}")
            for source in (make_heic(root / "photo.heic"), make_video(root / "video.mp4")):
                document = run_json(edge_run(server.grpc, root / "cache", "--json", source, program=edge))
                print(f"{source.name}: {len(document['frames'])} frames of an image's own libraries")
            run_json(
                [edge, "doctor", "--server", server.grpc, "--cache-dir", root / "cache", "--json", root / "video.mp4"]
            )


if __name__ == "__main__":
    main()
