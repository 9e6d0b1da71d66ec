"""The baselines, on a network of three stages and generated photographs."""

from pathlib import Path

import numpy as np
import pytest

from bitneck.errors import InvalidConfig
from bitneck_models.data.photos import LabelledPhoto
from bitneck_models.measure.baselines import image_baselines, raw_baselines, training_free
from bitneck_models.measure.sweeps import CODECS
from bitneck_testing.networks import small_backbone
from bitneck_testing.photographs import photo


@pytest.fixture
def photos(tmp_path: Path) -> list[LabelledPhoto]:
    found = []
    for k in range(12):
        path = tmp_path / f"{k:02d}.png"
        photo(k, (60, 50)).save(path)
        found.append(LabelledPhoto(path, k % 10))
    return found


@pytest.mark.parametrize("codec", list(CODECS))
def test_bytes_rise_with_quality_and_so_does_agreement(codec: str, photos: list[LabelledPhoto], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    top1, points = image_baselines(
        small_backbone(), photos, tmp_path / "cache", codecs={codec: (5, 50, 95)}, progress=lambda *c: calls.append(c)
    )
    assert 0 <= top1 <= 1
    assert [p.setting for p in points] == ["quality 5", "quality 50", "quality 95"]
    sizes = [p.bytes_mean for p in points]
    assert sizes == sorted(set(sizes))
    assert points[-1].agreement >= 0.8
    assert points[-1].bpp == points[-1].bytes_mean * 8 / 32**2
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_raw_features(photos: list[LabelledPhoto], tmp_path: Path) -> None:
    whole, octets = raw_baselines(small_backbone(), "s1", photos, tmp_path / "cache")
    assert whole.agreement == 1.0
    assert octets.agreement >= 0.9
    assert octets.bytes_mean < whole.bytes_mean < 12 * 4 * 4 * 2 + 30


def test_training_free(photos: list[LabelledPhoto], tmp_path: Path) -> None:
    backbone = small_backbone()
    train = np.random.default_rng(0).normal(size=(300, 12, 4, 4)).astype(np.float16)
    fine, coarse, pooled = training_free(
        backbone, "s1", train, photos, tmp_path / "cache", sweep=((1.0, 0.01), (1.0, 0.3), (0.5, 0.01))
    )
    assert fine.agreement == 1.0
    assert fine.bytes_mean > coarse.bytes_mean
    assert fine.bytes_mean > 3 * pooled.bytes_mean
    assert pooled.setting == "2x2, step 0.01"


def test_what_is_refused(photos: list[LabelledPhoto], tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no image codec gif; known: jpeg, webp, avif, heic"):
        image_baselines(small_backbone(), photos, tmp_path / "cache", codecs=["gif"])
    with pytest.raises(InvalidConfig, match="no photographs"):
        image_baselines(small_backbone(), [], tmp_path / "cache")
