"""Training a segmentation network itself, before it is frozen and split: the head, and the upper blocks under it.

    view --frozen blocks (ONNX Runtime)--> f --upper blocks, head--> logits --CE with the class map

Every random number is drawn from the seed and the number of the step, so a run that was cut off and resumed gives the
same weights. What is kept is the running mean of the weights that did best on the validation photographs, as float16.

Dimensions: N batch, K classes, H x W view.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor, nn

import bitneck
from bitneck.errors import InvalidConfig, ModelFailure
from bitneck.image import load_photo, normalize, preprocess
from bitneck.manifest import sha256_hex
from bitneck.runtime import OnnxModule
from bitneck_models.data.class_maps import (
    VOID,
    ViewRange,
    confusion,
    load_class_map,
    mapped_photos,
    mean_iou,
    random_view,
)
from bitneck_models.networks.backbone import NETWORK_FILE, Backbone, stages_state
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.typed_files import load_toml, validated

__all__ = ["NetworkRecord", "NetworkStep", "NetworkTraining", "load_network_training", "train_network"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkTraining(_Strict):
    """How a network is trained, ``network.toml`` of a zoo entry.

    Attributes:
        backbone: the network's name.
        folder: below the data folder; holds ``train``, ``val`` and ``test``, each with ``images`` and ``labels``.
        train_from: the first stage that is trained; those before it stay as they are.
        height: of a training view, pixels; a multiple of 16.
        width: likewise.
        scale_min: see `ViewRange`; likewise `scale_max` and `light`.
        steps: updates.
        batch: views in an update.
        learning_rate: AdamW's, of the head.
        backbone_learning_rate: likewise, of the blocks under it.
        weight_decay: AdamW's.
        warmup_steps: over which the rates rise; then they fall as ``(1 - t) ** 0.9``.
        rare: a class with share p of the pixels weighs ``1 / ln(rare + p)``: the nearer to 1, the more rare ones count.
        ema: decay of the running mean of the weights.
        validate_every: steps between looks at the validation photographs.
        seed: of everything random.
    """

    backbone: str
    folder: str
    train_from: str
    height: Annotated[int, Field(ge=32, multiple_of=16)] = 288
    width: Annotated[int, Field(ge=32, multiple_of=16)] = 384
    scale_min: Annotated[float, Field(gt=0.1, le=4)] = 0.6
    scale_max: Annotated[float, Field(gt=0.1, le=4)] = 1.5
    light: Annotated[float, Field(ge=0, lt=1)] = 0.4
    steps: Annotated[int, Field(ge=1)] = 1200
    batch: Annotated[int, Field(ge=2)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    backbone_learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    rare: Annotated[float, Field(gt=1)] = 1.05
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Annotated[int, Field(ge=1)] = 150
    seed: int = 0


class NetworkRecord(_Strict):
    """What stands beside a trained network, ``network.json``.

    Attributes:
        recipe: the resolved recipe.
        steps_kept: number of updates of the weights that are kept.
        validation_iou: mean IoU on ``val``, which chose them.
        test_iou: mean IoU on ``test``, measured once, at the end.
        test_iou_by_class: of each class, by name.
        sha256: of ``network.safetensors``.
    """

    recipe: dict[str, Any]
    code_version: str
    torch_version: str
    train_photos: int
    validation_photos: int
    test_photos: int
    steps_kept: int
    validation_iou: float
    test_iou: float
    test_iou_by_class: dict[str, float]
    trained: date
    sha256: str


@dataclass(frozen=True, slots=True)
class NetworkStep:
    """A step of training: its loss, and the validation mean IoU where it was looked at."""

    step: int
    steps: int
    loss: float
    validation_iou: float | None


def load_network_training(path: Path) -> NetworkTraining:
    """Read a recipe.

    Args:
        path: a TOML file, or a folder with ``network.toml``.

    Raises:
        InvalidConfig: no such file, not TOML, an unknown key or a value out of range; the message names it.
    """
    path = path / "network.toml" if path.is_dir() else path
    return validated(NetworkTraining, load_toml(path, "recipe of a network"), path, "recipe")


def train_network(
    recipe: NetworkTraining,
    backbone: Backbone,
    data: Path,
    out: Path,
    runs: Path,
    *,
    report: Callable[[NetworkStep], None] = lambda _step: None,
    stop_after: int | None = None,
) -> NetworkRecord | None:
    """Train a network and write it into a zoo entry; cut off and started again, it goes on where it stopped.

    Args:
        recipe: the schedule.
        backbone: where training begins; its weights are changed.
        data: the folder that the recipe's folder lies in.
        out: the zoo entry: ``network.safetensors`` and ``network.json`` are written there.
        runs: for checkpoints.
        report: called after every step.
        stop_after: save and return after this many steps in all.

    Returns:
        The record; None where `stop_after` came first.

    Raises:
        InvalidConfig: a stage that is not there, photographs without class maps, or a checkpoint of another recipe.
        ModelFailure: the loss is not finite.
    """
    run = _Run(recipe, backbone, data / recipe.folder, runs / recipe.backbone)
    run.load()
    for images, maps in run.batches(min(recipe.steps, stop_after or recipe.steps)):
        loss = run.step(images, maps)
        iou = run.look() if run.done % recipe.validate_every == 0 or run.done == recipe.steps else None
        report(NetworkStep(run.done, recipe.steps, loss, iou))
    run.save()
    if run.done < recipe.steps:
        return None
    return run.finish(out)


def forget_finished(recipe: NetworkTraining, runs: Path) -> None:
    """Remove the checkpoint of a run that came to its end, so that the next one begins anew; one that did not stays."""
    folder = runs / recipe.backbone
    path = folder / "checkpoint.pt"
    if path.is_file() and torch.load(path, weights_only=True)["done"] >= recipe.steps:
        path.unlink()
        (folder / "best.pt").unlink(missing_ok=True)


class _Run:
    """The state of one training run."""

    def __init__(self, recipe: NetworkTraining, backbone: Backbone, data: Path, folder: Path) -> None:
        self.recipe, self.backbone, self.data, self.folder = recipe, backbone, data, folder
        self.classes = len(backbone.labels)
        self.photos = mapped_photos(data / "train")
        self.validation = mapped_photos(data / "val")
        if len(self.photos) < recipe.batch:
            raise InvalidConfig(f"{data}: {len(self.photos)} photographs are fewer than a batch of {recipe.batch}")
        self.views = ViewRange(
            height=recipe.height, width=recipe.width, scale_min=recipe.scale_min, scale_max=recipe.scale_max,
            light=recipe.light,
        )  # fmt: skip
        if recipe.height > backbone.input.height or recipe.width > backbone.input.width:
            raise InvalidConfig(
                f"views of {recipe.height}x{recipe.width} are larger than the input, {backbone.input.height}x"
                f"{backbone.input.width}"
            )
        cut = backbone.stage_index(recipe.train_from)
        names = list(backbone.stages)
        head = names.index("aspp")
        if not 0 < cut <= head:
            raise InvalidConfig(f"train_from {recipe.train_from!r} must be one of {', '.join(names[1 : head + 1])}")
        self.frozen = backbone.segment(0, cut)
        trained = list(backbone.stages.items())[cut:-1]  # the last stage has no weights and fits whole pictures only
        self.net = nn.Sequential(OrderedDict((name.replace(".", "_"), stage) for name, stage in trained))
        self.net.requires_grad_().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.upper = list(self.net)[: head - cut]
        self.head = list(self.net)[head - cut :]
        self.mean = copy.deepcopy(self.net).requires_grad_(requires_grad=False).eval()
        self.weights = self._class_weights()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for m in self.upper for p in m.parameters()], "peak": recipe.backbone_learning_rate},
                {"params": [p for m in self.head for p in m.parameters()], "peak": recipe.learning_rate},
            ],
            weight_decay=recipe.weight_decay,
        )
        self.done, self.best, self.best_step = 0, -1.0, 0
        self._modules: dict[tuple[int, int], OnnxModule] = {}

    def _read(self, photo: Path, labels: Path) -> tuple[Image.Image, NDArray[np.uint8]]:
        return load_photo(photo), load_class_map(labels, self.classes)

    def _class_weights(self) -> Tensor:
        counts = np.zeros(256, np.int64)
        for _, labels in self.photos:
            counts += np.bincount(load_class_map(labels, self.classes).ravel(), minlength=256)
        share = counts[: self.classes] / max(1, counts[: self.classes].sum())
        weights = 1 / np.log(self.recipe.rare + share)
        return torch.from_numpy((weights / weights.mean()).astype(np.float32))

    def _frozen(self, height: int, width: int) -> OnnxModule:
        if (height, width) not in self._modules:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"frozen-{height}x{width}.onnx"
            path.write_bytes(to_onnx(self.frozen, (3, height, width)))
            self._modules[height, width] = OnnxModule(path)
        return self._modules[height, width]

    def batches(self, stop: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
        """Inputs (N, 3, H, W) and class maps (N, H, W) of the steps to come, read ahead by one thread."""

        def one(step: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
            rng = np.random.default_rng([self.recipe.seed, step])
            rows = rng.choice(len(self.photos), self.recipe.batch, replace=False)
            views = [random_view(*self._read(*self.photos[row]), self.views, rng) for row in rows]
            x = np.concatenate([normalize(view, self.backbone.input) for view, _ in views])
            return x, np.stack([labels for _, labels in views])

        with ThreadPoolExecutor(1) as pool:
            ahead: list[Future[tuple[NDArray[np.float32], NDArray[np.uint8]]]] = []
            for step in range(self.done, stop):
                while len(ahead) < 3 and step + len(ahead) < stop:
                    ahead.append(pool.submit(one, step + len(ahead)))
                yield ahead.pop(0).result()

    def step(self, x: NDArray[np.float32], maps: NDArray[np.uint8]) -> float:
        """One update; its loss."""
        t = self.recipe
        f = torch.from_numpy(self._frozen(t.height, t.width).run(x)).contiguous(memory_format=torch.channels_last)
        share = self.done / t.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (self.done + 1) / max(1, t.warmup_steps)) * (1 - share) ** 0.9
        for stage in self.upper:
            stage.eval()  # its batch norms keep ImageNet's statistics
        for stage in self.head:
            stage.train()
        with torch.random.fork_rng():
            torch.manual_seed(t.seed * 1_000_003 + self.done)
            logits = self.net(f)  # (N, K, H / 4, W / 4)
        full = F.interpolate(logits, size=(t.height, t.width), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, torch.from_numpy(maps).long(), weight=self.weights, ignore_index=VOID)
        if not torch.isfinite(loss):
            raise ModelFailure(f"the loss is not finite at step {self.done}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
        self.optimizer.step()
        self.done += 1
        decay = min(t.ema, self.done / (10 + self.done))
        mean = self.mean.state_dict()
        for key, value in self.net.state_dict().items():
            if value.is_floating_point():
                mean[key].lerp_(value.detach(), 1 - decay)
        return loss.item()

    def look(self) -> float:
        """Mean IoU of the running mean on the validation photographs; the best one is kept."""
        iou = mean_iou(self._confusion(self.mean, self.validation))
        if iou > self.best:
            self.best, self.best_step = iou, self.done
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.mean.state_dict(), self.folder / "best.pt")
        self.save()
        return iou

    @torch.no_grad()
    def _confusion(self, net: nn.Module, photos: Sequence[tuple[Path, Path]]) -> NDArray[np.int64]:
        spec, upsample = self.backbone.input, list(self.backbone.stages.values())[-1]
        matrix = np.zeros((self.classes, self.classes), np.int64)
        for photo, labels in photos:
            x = preprocess(load_photo(photo), spec)
            f = torch.from_numpy(self._frozen(spec.height, spec.width).run(x))
            logits = upsample(net(f.contiguous(memory_format=torch.channels_last)))
            truth = load_class_map(labels, self.classes)
            answer = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False).argmax(1)[0]
            matrix += confusion(truth, answer.numpy(), self.classes)
        return matrix

    def _identity(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(exclude={"validate_every"})}

    def save(self) -> None:
        """Write a checkpoint, all or nothing."""
        state = {
            "identity": self._identity(),
            "done": self.done,
            "best": self.best,
            "best_step": self.best_step,
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "checkpoint.part"
        torch.save(state, temporary)
        temporary.rename(self.folder / "checkpoint.pt")

    def load(self) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            InvalidConfig: it belongs to another recipe.
        """
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["identity"] != self._identity():
            raise InvalidConfig(f"{path} belongs to another recipe; remove it to train anew")
        self.done, self.best, self.best_step = state["done"], state["best"], state["best_step"]
        self.net.load_state_dict(state["net"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])

    def finish(self, out: Path) -> NetworkRecord:
        """Write the best weights as float16, and what they do on ``val`` and ``test``."""
        self.net.load_state_dict(torch.load(self.folder / "best.pt", weights_only=True))
        self.net.eval()
        state = stages_state(self.backbone.stages)
        for value in state.values():
            if value.is_floating_point():
                value.copy_(value.half().float())
        self._modules.clear()
        test = mapped_photos(self.data / "test")
        matrices = [self._confusion(self.net, photos) for photos in (self.validation, test)]
        hits = np.diag(matrices[1])
        by_class = hits / np.maximum(1, matrices[1].sum(0) + matrices[1].sum(1) - hits)
        data = save({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()})
        record = NetworkRecord(
            recipe=self.recipe.model_dump(),
            code_version=bitneck.__version__,
            torch_version=torch.__version__,
            train_photos=len(self.photos),
            validation_photos=len(self.validation),
            test_photos=len(test),
            steps_kept=self.best_step,
            validation_iou=mean_iou(matrices[0]),
            test_iou=mean_iou(matrices[1]),
            test_iou_by_class={name: float(v) for name, v in zip(self.backbone.labels, by_class, strict=True)},
            trained=datetime.now(tz=UTC).date(),
            sha256=sha256_hex(data),
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "network.json").write_text(record.model_dump_json(indent=1) + "\n")
        temporary = out / "network.part"
        temporary.write_bytes(data)
        temporary.rename(out / NETWORK_FILE)
        return record
