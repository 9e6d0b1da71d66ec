"""Write the measured tables of README.md and the model cards from ladder.json. `--check` writes nothing."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "models" / "zoo"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "segmentation.md",
    ZOO / "efficientnet_lite0" / "README.md",
    ZOO / "deeplabv3_efficientnet_lite0" / "README.md",
)
METRICS = {"efficientnet_lite0": "top-1", "deeplabv3_efficientnet_lite0": "mean IoU"}
"""What accuracy is, by zoo entry; the mark of a table names the entry."""
MARKED = re.compile(r"(<!-- measured ([\w.-]+): begin -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def table(entry: str) -> str:
    path = ZOO / entry / "ladder.json"
    try:
        ladder = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        sys.exit(f"{path}: not a measured ladder ({exc}); `bitneck-models evaluate --record` writes it")
    rows = [
        f"| operating point | payload bytes | bpp | {METRICS[entry]} | agreement with uncompressed |",
        "|---|---:|---:|---:|---:|",
    ]
    points = sorted(ladder["points"].items(), key=lambda item: (item[0].split("-")[0], item[1]["payload_bytes"]))
    for name, p in points:
        rate = f"{p['payload_bytes']:.1f} | {p['bpp_payload']:.4f}"
        rows.append(f"| `{name}` | {rate} | {p['accuracy']:.2%} | {p['agreement']:.2%} |")
    rows.append(f"| uncompressed | | | {ladder['uncompressed_accuracy']:.2%} | |")
    return "\n".join(rows).replace("%", " %") + "\n"


def _replaced(match: re.Match[str]) -> str:
    return match[1] + table(match[2]) + match[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in DOCUMENTS:
        text = path.read_text()
        entries = [match[2] for match in MARKED.finditer(text)]
        if not entries or len(entries) != text.count("begin -->") or not set(entries) <= set(METRICS):
            sys.exit(f"{path}: every table needs `<!-- measured ENTRY: begin -->`, ENTRY one of {', '.join(METRICS)}")
        fresh = MARKED.sub(_replaced, text)
        if check and fresh != text:
            sys.exit(f"{path} does not show ladder.json; run python scripts/update_tables.py")
        if fresh != text:
            path.write_text(fresh)


if __name__ == "__main__":
    main()
