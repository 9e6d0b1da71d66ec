"""Compare two ladders: bytes at equal agreement, by split point; and what each point loses on several sets together.

    mkdir -p build/old build/more
    git show COMMIT:docs/results/ladder.json > build/old/ladder.json
    bitneck-models evaluate --bundle BUNDLE --data MORE --zoo ZOO --json > build/more/ladder.json
    python scripts/compare_ladders.py build/old docs/results [--also build/more]

Each argument is a folder of documents as `bitneck-models report` reads it. The first two are of the same photographs.
With --also, bytes and loss of the second ladder are means over the photographs of both sets.
"""

import argparse
from pathlib import Path

from bitneck.errors import BitneckError
from bitneck_models.report.curves import rate_saving, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--also", type=Path, action="append", default=[], help="another set, of the second ladder")
    arguments = parser.parse_args()
    try:
        old, new = read_results(arguments.old), read_results(arguments.new)
        also = [read_results(folder) for folder in arguments.also]
    except (BitneckError, OSError) as exc:
        parser.error(str(exc))
    for folder, found in zip((arguments.old, arguments.new, *arguments.also), (old, new, *also), strict=True):
        if found.ladder is None:
            parser.error(f"{folder} has no ladder; `evaluate --zoo --json` writes one")
    if (old.dataset, old.images) != (new.dataset, new.images):
        parser.error(f"the ladders are of different photographs: {old.dataset} and {new.dataset}")
    before = dict(old.ladder_curves)
    for split, curve in new.ladder_curves:
        saving = rate_saving(curve, before[split]) if split in before else None
        print("new" if saving is None else f"{-saving:+.1%}", f"bytes at equal agreement at {split}")
    sets = [new, *also]
    names = [{s.name for _, curve in each.ladder_curves for s in curve} for each in sets]
    if any(each != names[0] for each in names):
        parser.error("the folders of --also have other operating points: measure the same bundle on all sets")
    images = sum(each.images for each in sets)
    print(f"{new.metric} lost, and bytes, mean over {images} photographs:")
    for split, curve in new.ladder_curves:
        for sample in curve:
            same = [(each, next(s for s in dict(each.ladder_curves)[split] if s.name == sample.name)) for each in sets]
            lost = sum(each.images * (each.uncompressed - s.accuracy) for each, s in same) / images
            size = sum(each.images * s.payload_bytes for each, s in same) / images
            print(f"{sample.name:14} {size:8.1f} {lost:7.2%}")


if __name__ == "__main__":
    main()
