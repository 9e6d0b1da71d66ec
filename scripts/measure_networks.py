"""Time and memory of exporting the paper's networks at their own input size, as docs/networks.md states them.

Random weights, and a unit of random weights at every split point: neither changes what an export costs. Prints one line
for each network, and the largest relative difference of the proof, chain == network at every split, torch and ONNX.

    python scripts/measure_networks.py [resnet50|deeplabv3_resnet50 ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitneck.image import preprocess
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.registry import build_backbone
from bitneck_models.networks.weights import RANDOM
from bitneck_models.training.point import point_record
from bitneck_models.training.tables import prune_and_fit
from bitneck_models.training.validation import Validation
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import new_unit, round_weights, save_point, save_unit
from bitneck_models.zoo.records import UnitRecord

POINT = '[[units]]\nid = "{s}-r1"\nsplit = "{s}"\nstride = {stride}\nchannels = 32\nstep = 0.5\nlambda = 1.0\n'


def make_entry(backbone: Backbone, folder: Path) -> None:
    stride = 2 if backbone.input.height < 500 else 8
    points = "".join(POINT.format(s=split, stride=stride) for split in backbone.splits)
    text = f'name = "{backbone.name}"\nbackbone = "{backbone.name}"\n[[data]]\nfolder = "x"\n{points}'
    (folder / "recipe.toml").write_text(text)
    entry = ZooEntry(folder)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((640, 480))
    x = torch.from_numpy(preprocess(picture, backbone.input))
    for point in entry.recipe.units:
        with torch.no_grad():
            f = backbone.head(point.split)(x).numpy().astype(np.float16)
        unit = new_unit(backbone, point)
        round_weights(unit)
        unit, tables = prune_and_fit(unit, point, f)
        record = UnitRecord(
            recipe={}, training={}, code_version="", torch_version="", train_features=1, lambda_final=1.0,
            estimated_bytes=0.0, trained=date(1970, 1, 1),
        )  # fmt: skip
        save_unit(entry.unit_folder(point.id), unit, record)
        fitted = point_record(point, point.step, 1, Validation(payload_bytes=1.0, agreement=1.0))
        save_point(entry.point_folder(point.id), tables, fitted)


def make(name: str, folder: Path) -> None:
    make_entry(build_backbone(name, RANDOM), folder)


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], Path(sys.argv[3]))
        return
    for name in sys.argv[1:] or ["resnet50", "deeplabv3_resnet50"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            subprocess.run([sys.executable, __file__, "--make", name, temporary], check=True)
            command = [sys.executable, "-c", "from bitneck_models.cli.main import main; main()", "export", temporary]
            command += ["--out", str(folder / "bundle"), "--weights", "random", "--json"]
            began = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - began
            if status:
                sys.exit(f"{name}: the export ended with status {os.waitstatus_to_exitcode(status)}")
            document = json.loads(output)
            peak = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
            proof = document["proof"]
            worst = max([*proof["chain"].values(), *proof["encoders"].values(), *proof["decoders"].values()])
            print(
                f"{name}: {seconds:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of processor, peak {peak:.0f} MB; "
                f"bundle {document['bytes'] / 1e6:.0f} MB; proof on {proof['images']} images: {worst:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
