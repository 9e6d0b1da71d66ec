"""Measuring learned baselines through real bytes, on the photographs of an evaluation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.image import load_photo, preprocess
from bitneck_models.learned.image_codec import ImageCodec, ImageCoder
from bitneck_models.learned.photos import evaluation_crop, to_pixels
from bitneck_models.learned.recipe import ImageCodecRecipe, StudentRecipe
from bitneck_models.learned.training import TunedStudent
from bitneck_models.measure.judge import BaselinePoint, Judge
from bitneck_models.training.photo_sets import PhotoSets, sampled_photos

__all__ = ["codec_points", "student_points"]

_TABLE_PHOTOS = 1000
"""Training photographs that tables are fitted to."""

Progress = Callable[[int, int], None]


def codec_points(
    recipe: ImageCodecRecipe, codecs: Sequence[ImageCodec], judge: Judge, sets: PhotoSets, progress: Progress
) -> list[BaselinePoint]:
    """The uncompressed network's answers to decoded pictures, at every lambda.

    Args:
        recipe: of the codecs.
        codecs: one for each lambda.
        judge: has the photographs.
        sets: training photographs; the tables of z are fitted to some.
        progress: called with (photographs done, all).
    """
    photos, spec = sets.by_photo()[0], judge.backbone.input
    chosen = [photos[k] for k in sampled_photos(sets, _TABLE_PHOTOS, 2)]
    points: list[BaselinePoint] = []
    total = len(codecs) * len(judge.crops)
    for lambda_, codec in zip(recipe.lambdas, codecs, strict=True):
        hyper = np.concatenate([codec.symbols(torch.from_numpy(evaluation_crop(p, spec))[None])[1] for p in chosen])
        coder = ImageCoder(codec, FactorizedModel.fit(hyper))
        sizes, pictures = [], []
        for image in judge.crops:
            payloads = coder.encode(torch.from_numpy(to_pixels(np.asarray(image)))[None])
            decoded = coder.decode(payloads, (image.height, image.width))[0]
            octets = (decoded * 255).round().byte().permute(1, 2, 0).numpy()
            sizes.append(sum(len(payload) for payload in payloads))
            pictures.append(Image.fromarray(octets))
            progress(len(points) * len(judge.crops) + len(sizes), total)
        answers = judge.answers(judge.network, judge.inputs(pictures))
        points.append(judge.point(recipe.name, f"lambda {lambda_:g}", "", float(np.mean(sizes)), answers))
    return points


@torch.no_grad()
def student_points(
    recipe: StudentRecipe, students: Sequence[TunedStudent], judge: Judge, sets: PhotoSets, progress: Progress
) -> list[BaselinePoint]:
    """The students' answers, at every lambda; see `codec_points`."""
    photos, spec = sets.by_photo()[0], judge.backbone.input
    chosen = [photos[k] for k in sampled_photos(sets, _TABLE_PHOTOS, 2)]
    photographs = judge.inputs(judge.crops)
    points: list[BaselinePoint] = []
    total = len(students) * len(photographs)
    for lambda_, tuned in zip(recipe.lambdas, students, strict=True):
        encoder, decoder = tuned.student.encoder, tuned.student.decoder
        inputs = (torch.from_numpy(preprocess(load_photo(path), spec)) for path in chosen)
        symbols = [encoder(x).round().int().numpy()[0] for x in inputs]
        tables = FactorizedModel.fit(np.stack(symbols))
        codec = FactorizedCodec(tables, symbols[0].shape)
        sizes, answers = [], []
        for one in photographs:
            y = encoder(torch.from_numpy(one[None])).round().int().numpy()[0]
            payload = codec.encode(y.clip(tables.lo[:, None, None], tables.hi[:, None, None]))
            y_hat = torch.from_numpy(codec.decode(payload))[None].float()
            sizes.append(len(payload))
            answers.append(judge.metric.answer(tuned.rest(decoder(y_hat))[0].numpy()))
            progress(len(points) * len(photographs) + len(sizes), total)
        points.append(judge.point(recipe.name, f"lambda {lambda_:g}", "", float(np.mean(sizes)), np.stack(answers)))
    return points
