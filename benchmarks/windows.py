"""What coding windows of a latent together saves: groups of windows, rotated to their principal components.

    python benchmarks/windows.py models/zoo/deeplabv3_efficientnet_lite0 --point s1-r6 --data PHOTOS [--runs runs]

The latents are those of a trained separable unit. Photographs of one drive (the file name up to the first `_`) are left
out in turn: transform and tables are fitted to the other drives' training views, and the drive left out is coded. No
transform is trained further. Printed: ideal payload bytes at the squared error at which windows coded by themselves,
rotated likewise, cost 300, 200, 100 bytes; `-` beyond the steps that were tried.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck.coding.factorized_model import FactorizedModel
from bitneck_models.training.photo_sets import photo_sets, split_features
from bitneck_models.units.layers import SpaceToDepth
from bitneck_models.zoo.entry import ZooEntry

_CHUNK = 50
_STEPS = np.geomspace(0.7, 12, 11)
"""In steps of the point."""
_PLAIN = (300.0, 200.0, 100.0)


def grouped(y: NDArray[np.float32], group: tuple[int, int]) -> NDArray[np.float32]:
    """(N, Cr, h * G1, w * G2) to (N, Cr * G1 * G2, h, w)."""
    t: torch.Tensor = SpaceToDepth(group)(torch.from_numpy(y))
    return t.numpy()


def curve(
    fitted: NDArray[np.float32], coded: NDArray[np.float32], group: tuple[int, int], step: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared error and ideal bytes a photograph at each of `_STEPS`; both latents are (N, Cr, h, w)."""
    train, test = grouped(fitted, group), grouped(coded, group)
    mean = train.mean(axis=(0, 2, 3), keepdims=True)
    flat = (train - mean).transpose(1, 0, 2, 3).reshape(train.shape[1], -1)
    _, components = np.linalg.eigh(flat @ flat.T)
    train, test = (np.einsum("nchw,cd->ndhw", t - mean, components, optimize=True) for t in (train, test))
    errors, sizes = [], []
    for q in _STEPS * step:
        symbols = np.rint(train / q).astype(np.int32)
        alive = (symbols != 0).any(axis=(0, 2, 3))  # the others are not coded
        tables = FactorizedModel.fit(symbols[:, alive])
        lo, hi = tables.lo[:, None, None], tables.hi[:, None, None]
        symbols = np.clip(np.rint(test[:, alive] / q).astype(np.int32), lo, hi)
        lost = np.square(symbols * q - test[:, alive]).sum(axis=(1, 2, 3)) + np.square(test[:, ~alive]).sum((1, 2, 3))
        errors.append(float(lost.mean()))
        sizes.append(float(np.mean([tables.ideal_bits(s) for s in symbols])) / 8)
    return np.array(errors), np.array(sizes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--point", required=True, help="a separable point, trained")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--views", type=int, default=6, help="of each photograph, at most")
    args = parser.parse_args()
    entry = ZooEntry(args.zoo)
    backbone, point = entry.backbone(), entry.recipe.point(args.point)
    sets = photo_sets(entry.recipe, args.data, backbone)
    features, _ = split_features(backbone, point.split, sets, entry.recipe.training.seed, args.runs)
    kept = np.concatenate([np.arange(views) < args.views for _, views in sets.train])
    drives = np.concatenate([[path.name.split("_")[0]] * views for path, views in sets.train])[kept]
    if len(set(drives)) < 2:
        parser.error("the photographs are of one drive; none can be left out")
    unit, rows = entry.unit(backbone, point), np.flatnonzero(kept)
    with torch.no_grad():
        chunks = (rows[k : k + _CHUNK] for k in range(0, len(rows), _CHUNK))
        y = np.concatenate([unit.encoder(torch.from_numpy(features[c].astype(np.float32))).numpy() for c in chunks])
    height, width = y.shape[2:]
    groups = [(a, b) for a in range(1, height + 1) for b in range(1, width + 1) if height % a == 0 and width % b == 0]
    groups = [g for g in groups if g in {(1, 1), (2, 2), (2, 4), (3, 4), (height, width)}]
    print("| drive left out | group | " + " | ".join(f"at the error of {b:.0f} bytes" for b in _PLAIN) + " |")
    print("|---|---|" + "---:|" * len(_PLAIN))
    for drive in sorted(set(drives)):
        fitted, coded = y[drives != drive], y[drives == drive]
        plain_errors, plain_sizes = curve(fitted, coded, (1, 1), point.step)
        wanted = np.interp(_PLAIN, plain_sizes[::-1], plain_errors[::-1], left=np.nan, right=np.nan)
        for group in groups:
            errors, sizes = curve(fitted, coded, group, point.step)
            sizes_there = np.interp(wanted, errors, sizes, left=np.nan, right=np.nan)
            found = " | ".join("-" if np.isnan(b) else f"{b:.0f}" for b in sizes_there)
            print(f"| {drive} | {group[0]}x{group[1]} | {found} |", flush=True)


if __name__ == "__main__":
    main()
