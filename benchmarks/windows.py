"""What it saves to code several windows of a latent together: groups of windows, rotated to their principal components.

    python benchmarks/windows.py models/zoo/deeplabv3_efficientnet_lite0 --point s1-r6 --data PHOTOS [--runs runs]

The latents are those of a trained separable unit; no transform is trained further. The photographs of one drive (file
names that are equal up to the first `_`) are left out at a time: transform and tables are fitted to the training views
of the other drives, and the drive that was left out is coded.

Prints for each drive and group the ideal payload bytes at the squared error at which single windows, rotated in the
same way, cost 300, 200 and 100 bytes. `-` means that no step that was tried comes near that error.
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
"""Quantizer steps to try, in steps of the operating point."""
_PLAIN = (300.0, 200.0, 100.0)
"""Bytes of single windows, at whose errors the groups are compared."""


def grouped(y: NDArray[np.float32], group: tuple[int, int]) -> NDArray[np.float32]:
    """Windows of a group become channels: (N, Cr, h * G1, w * G2) to (N, Cr * G1 * G2, h, w)."""
    t: torch.Tensor = SpaceToDepth(group)(torch.from_numpy(y))
    return t.numpy()


def curve(
    fitted: NDArray[np.float32], coded: NDArray[np.float32], group: tuple[int, int], step: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared error and ideal bytes of a photograph at each of `_STEPS`.

    Args:
        fitted: latents that transform and tables are fitted to, (N, Cr, h, w).
        coded: latents to code, (N, Cr, h, w).
        group: windows that are coded together, (height, width).
        step: of the operating point.
    """
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
    parser.add_argument("zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--point", required=True, help="a trained operating point with a separable unit")
    parser.add_argument("--data", type=Path, required=True, help="folder of the recipe's photographs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the cached features")
    parser.add_argument("--views", type=int, default=6, help="views of each photograph, at most")
    args = parser.parse_args()
    entry = ZooEntry(args.zoo)
    backbone, point = entry.backbone(), entry.recipe.point(args.point)
    sets = photo_sets(entry.recipe, args.data, backbone)
    features, _ = split_features(backbone, point.split, sets, entry.recipe.training.seed, args.runs)
    kept = np.concatenate([np.arange(views) < args.views for _, views in sets.train])
    drives = np.concatenate([[path.name.split("_")[0]] * views for path, views in sets.train])[kept]
    if len(set(drives)) < 2:
        parser.error("all photographs are of one drive, so none can be left out")
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
