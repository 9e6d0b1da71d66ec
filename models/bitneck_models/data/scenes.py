"""Short scenes, each made from one photograph: frames of a camera that stands still, or moves over the photograph.

There is no video among the training photographs. So frames are cut from a photograph, and each gets what a camera adds:
flickering light, shot and read noise of the sensor, and JPEG compression.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bitneck.manifest import InputSpec

__all__ = ["Camera", "Path2D", "moving", "still"]

_GAMMA = 2.2
_GREY = 0.18
"""Linear light of mid grey, at which `Camera.noise` is defined."""
_SHOT_SHARE = 0.8
"""Share of shot noise in the variance at mid grey; the rest, read noise, does not depend on the light."""
_SHORT_SIDE = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """What the camera adds to each frame.

    Attributes:
        noise: standard deviation of the noise at mid grey, in steps of 8-bit values.
        flicker: standard deviation of the light's change from frame to frame, as a share; half of a change lasts two
            frames.
        quality: JPEG quality.
    """

    noise: float
    flicker: float = 0.01
    quality: int = 85


@dataclass(frozen=True, slots=True, kw_only=True)
class Path2D:
    """How a view moves over a photograph.

    Attributes:
        speed: distance per frame, as a share of the view's side.
        zoom: side of the view in the first frame, as a share of the largest view's.
        growth: growth of the view per frame, as a share.
    """

    speed: float
    zoom: float = 0.7
    growth: float = 0.0


def still(
    photo: Image.Image, spec: InputSpec, camera: Camera, frames: int, rng: np.random.Generator
) -> Iterator[Image.Image]:
    """A camera that stands still.

    Args:
        photo: RGB.
        spec: the backbone's input, which gives the aspect.
        camera: what the camera adds.
        frames: number of frames.
        rng: source of randomness.
    """
    picture = _view(photo, spec, 0.5, 0.5, 1.0)
    for light in _light(camera, frames, rng):
        yield _taken(picture, light, camera, rng)


def moving(
    photo: Image.Image, spec: InputSpec, camera: Camera, path: Path2D, frames: int, rng: np.random.Generator
) -> Iterator[Image.Image]:
    """A camera that moves in a straight line, turns back at the edges, and may zoom.

    Args:
        photo: RGB.
        spec: the backbone's input, which gives the aspect.
        camera: what the camera adds.
        path: how it moves; the direction is random.
        frames: number of frames.
        rng: source of randomness.
    """
    angle = rng.uniform(0, 2 * np.pi)
    position = rng.uniform(0.35, 0.65, 2)
    zoom, growth = path.zoom, path.growth
    velocity = np.array([np.cos(angle), np.sin(angle)]) * path.speed * zoom
    for light in _light(camera, frames, rng):
        yield _taken(_view(photo, spec, position[0], position[1], zoom), light, camera, rng)
        position = position + velocity
        outside = np.abs(position - 0.5) > (1 - path.zoom) / 2
        velocity = np.where(outside, -velocity, velocity)
        position = np.where(outside, position + 2 * velocity, position)
        zoom *= 1 + growth
        if not 0.5 <= zoom <= 0.95:
            growth = -growth


def _view(photo: Image.Image, spec: InputSpec, x: float, y: float, zoom: float) -> Image.Image:
    """A part of the photograph with the input's aspect: centre (x, y), as shares, and `zoom` times the largest size."""
    scale = min(photo.width / spec.width, photo.height / spec.height) * zoom
    w, h = min(spec.width * scale, photo.width), min(spec.height * scale, photo.height)  # not an ulp more
    left = max(min(x * photo.width - w / 2, photo.width - w), 0.0)
    top = max(min(y * photo.height - h / 2, photo.height - h), 0.0)
    enlarge = max(_SHORT_SIDE, spec.height, spec.width) / min(spec.height, spec.width)
    size = (round(spec.width * enlarge), round(spec.height * enlarge))
    return photo.resize(
        size, Image.Resampling.BICUBIC, box=(left, top, min(left + w, photo.width), min(top + h, photo.height))
    )


def _light(camera: Camera, frames: int, rng: np.random.Generator) -> Iterator[float]:
    light = 1.0
    for _ in range(frames):
        yield light
        light = 1.0 + 0.7 * (light - 1.0) + camera.flicker * float(rng.standard_normal())


def _taken(picture: Image.Image, light: float, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """The picture with what the camera adds."""
    linear = (np.asarray(picture, dtype=np.float32) / 255.0) ** _GAMMA * light
    slope = 255.0 / _GAMMA * _GREY ** (1 / _GAMMA - 1)  # 8-bit steps by linear light, at mid grey
    variance = (camera.noise / slope) ** 2
    deviation = np.sqrt(variance * (_SHOT_SHARE / _GREY * linear + 1 - _SHOT_SHARE))
    linear = linear + deviation * rng.standard_normal(linear.shape).astype(np.float32)
    values = np.rint(np.clip(linear, 0.0, 1.0) ** (1 / _GAMMA) * 255.0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=camera.quality)
    return Image.open(buffer, formats=("JPEG",)).convert("RGB")
