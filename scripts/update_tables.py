"""Write the measured tables of README.md and the model cards from ladder.json. `--check` writes nothing."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "models" / "zoo" / "efficientnet_lite0"
DOCUMENTS = (ROOT / "README.md", ZOO / "README.md")
MARKED = re.compile(r"(<!-- measured: begin -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def table() -> str:
    ladder = json.loads((ZOO / "ladder.json").read_text())
    rows = [
        "| operating point | payload bytes | bpp | top-1 | agreement with uncompressed |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, p in sorted(ladder["points"].items()):
        rate = f"{p['payload_bytes']:.1f} | {p['bpp_payload']:.4f}"
        rows.append(f"| `{name}` | {rate} | {p['accuracy']:.2%} | {p['agreement']:.2%} |")
    rows.append(f"| uncompressed | | | {ladder['uncompressed_accuracy']:.2%} | |")
    return "\n".join(rows).replace("%", " %") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in DOCUMENTS:
        text = path.read_text()
        if not MARKED.search(text):
            sys.exit(f"{path.name} has no place for the table")
        fresh = MARKED.sub(lambda match: match[1] + table() + match[2], text)
        if check and fresh != text:
            sys.exit(f"{path} does not show ladder.json; run python scripts/update_tables.py")
        path.write_text(fresh)


if __name__ == "__main__":
    main()
