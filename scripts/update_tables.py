"""Write the measured tables of README.md and the model cards from ladder.json. `--check` writes nothing."""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "models" / "zoo"
DOCUMENTS = (
    (ROOT / "README.md", "efficientnet_lite0", "top-1"),
    (ZOO / "efficientnet_lite0" / "README.md", "efficientnet_lite0", "top-1"),
    (ZOO / "deeplabv3_efficientnet_lite0" / "README.md", "deeplabv3_efficientnet_lite0", "mean IoU"),
)
"""Each with the zoo entry that its table is of, and what accuracy is there."""
MARKED = re.compile(r"(<!-- measured: begin -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def table(entry: str, metric: str) -> str:
    ladder = json.loads((ZOO / entry / "ladder.json").read_text())
    rows = [
        f"| operating point | payload bytes | bpp | {metric} | agreement with uncompressed |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, p in sorted(ladder["points"].items()):
        rate = f"{p['payload_bytes']:.1f} | {p['bpp_payload']:.4f}"
        rows.append(f"| `{name}` | {rate} | {p['accuracy']:.2%} | {p['agreement']:.2%} |")
    rows.append(f"| uncompressed | | | {ladder['uncompressed_accuracy']:.2%} | |")
    return "\n".join(rows).replace("%", " %") + "\n"


def _replaced(rows: str, match: re.Match[str]) -> str:
    return match[1] + rows + match[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, entry, metric in DOCUMENTS:
        text = path.read_text()
        if not MARKED.search(text):
            sys.exit(f"{path.name} has no place for the table")
        fresh = MARKED.sub(partial(_replaced, table(entry, metric)), text)
        if check and fresh != text:
            sys.exit(f"{path} does not show ladder.json; run python scripts/update_tables.py")
        path.write_text(fresh)


if __name__ == "__main__":
    main()
