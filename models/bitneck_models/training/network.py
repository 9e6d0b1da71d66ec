"""Training a segmentation network itself, before it is frozen and split: the head, and the upper blocks below it.

    view --frozen blocks (ONNX Runtime)--> f --upper blocks, head--> logits --CE with the class map

Kept is the running mean of the weights that did best on the validation photographs, as float16.

Dimensions: N batch, K classes, H x W view.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel
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
    class_iou,
    confusion,
    load_class_map,
    mapped_photos,
    mean_iou,
    random_view,
)
from bitneck_models.networks.backbone import NETWORK_FILE, Backbone, stages_state
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.training.run import (
    RunningMean,
    due,
    polynomial,
    run,
    seeded,
    set_learning_rates,
    write_atomically,
)
from bitneck_models.zoo.network_training import NetworkTraining
from bitneck_models.zoo.records import NetworkRecord

__all__ = ["NetworkStep", "forget_finished", "train_network"]

_CHECKPOINT, _BEST = "checkpoint.pt", "best.pt"
_AHEAD = 3
"""Batches that are read ahead."""

Batch = tuple[NDArray[np.float32], NDArray[np.uint8]]
"""Inputs (N, 3, H, W) and class maps (N, H, W)."""


@dataclass(frozen=True, slots=True)
class NetworkStep:
    """What a step cost.

    Attributes:
        step: number of updates so far.
        steps: number of updates in all.
        loss: the loss.
        validation_iou: mean IoU on the validation photographs; None if they were not looked at.
    """

    step: int
    steps: int
    loss: float
    validation_iou: float | None


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
    """Train a network and write it into a zoo entry. Interrupted training resumes from its last checkpoint.

    Args:
        recipe: the schedule.
        backbone: the network as its training begins; its weights are changed.
        data: the folder that holds the recipe's folder.
        out: the zoo entry, which gets ``network.safetensors`` and ``network.json``.
        runs: folder for checkpoints.
        report: called after every step.
        stop_after: save and return after this many steps in all.

    Returns:
        The record; None if `stop_after` came first.

    Raises:
        InvalidConfig: a stage does not exist, photographs have no class maps, or the checkpoint is unreadable or
            belongs to another recipe.
        ModelFailure: the loss is not finite.
    """
    folder = runs / recipe.backbone
    trainer = _NetworkTrainer(recipe, backbone, data / recipe.folder, folder)
    complete = run(
        trainer,
        folder / _CHECKPOINT,
        steps=recipe.steps,
        save_every=recipe.validate_every,
        report=report,
        stop_after=stop_after,
    )
    return trainer.finish(out) if complete else None


def forget_finished(recipe: NetworkTraining, runs: Path) -> None:
    """Remove the checkpoint of a complete run, so that the next run begins anew. An incomplete one stays."""
    folder = runs / recipe.backbone
    path = folder / _CHECKPOINT
    if path.is_file() and torch.load(path, weights_only=True)["done"] >= recipe.steps:
        path.unlink()
        (folder / _BEST).unlink(missing_ok=True)


class _NetworkTrainer:
    """See `bitneck_models.training.run.Trainer`."""

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
        self.mean = RunningMean(self.net, recipe.ema, lead=0)
        self.class_weights = self._class_weights()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for m in self.upper for p in m.parameters()], "peak": recipe.backbone_learning_rate},
                {"params": [p for m in self.head for p in m.parameters()], "peak": recipe.learning_rate},
            ],
            weight_decay=recipe.weight_decay,
        )
        self.done, self.best, self.best_step = 0, -1.0, 0
        self.device = torch.device("cpu")
        self._modules: dict[tuple[int, int], OnnxModule] = {}

    @property
    def identity(self) -> Mapping[str, BaseModel]:
        default = NetworkTraining.model_fields["validate_every"].default  # validation decides what is kept, not trained
        return {"recipe": self.recipe.model_copy(update={"validate_every": default})}

    def _class_weights(self) -> Tensor:
        counts = np.zeros(256, np.int64)
        for _, labels in self.photos:
            counts += np.bincount(load_class_map(labels, self.classes).ravel(), minlength=256)
        share = counts[: self.classes] / max(1, counts[: self.classes].sum())
        weights = 1 / np.log(self.recipe.rare + share)
        return torch.from_numpy((weights / weights.mean()).astype(np.float32))

    def _features(self, x: NDArray[np.float32]) -> Tensor:
        """What the frozen blocks give, by ONNX Runtime."""
        height, width = x.shape[2:]
        if (height, width) not in self._modules:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"frozen-{height}x{width}.onnx"
            path.write_bytes(to_onnx(self.frozen, (3, height, width)))
            self._modules[height, width] = OnnxModule(path)
        return torch.from_numpy(self._modules[height, width].run(x)).contiguous(memory_format=torch.channels_last)

    def updates(self, stop: int) -> Iterator[NetworkStep]:
        t = self.recipe
        for x, maps in self._batches(stop):
            loss = self._update(x, maps)
            iou = self._look() if due(self.done, t.validate_every, t.steps) else None
            yield NetworkStep(self.done, t.steps, loss, iou)

    def _batches(self, stop: int) -> Iterator[Batch]:
        """The batches of the steps to come, read ahead by one thread."""

        def one(step: int) -> Batch:
            rng = np.random.default_rng([self.recipe.seed, step])
            rows = rng.choice(len(self.photos), self.recipe.batch, replace=False)
            views = [
                random_view(load_photo(photo), load_class_map(labels, self.classes), self.views, rng)
                for photo, labels in (self.photos[row] for row in rows)
            ]
            x = np.concatenate([normalize(view, self.backbone.input) for view, _ in views])
            return x, np.stack([classes for _, classes in views])

        with ThreadPoolExecutor(1) as pool:
            ahead: list[Future[Batch]] = []
            for step in range(self.done, stop):
                while len(ahead) < _AHEAD and step + len(ahead) < stop:
                    ahead.append(pool.submit(one, step + len(ahead)))
                yield ahead.pop(0).result()

    def _update(self, x: NDArray[np.float32], maps: NDArray[np.uint8]) -> float:
        """Update the weights once; the loss."""
        t = self.recipe
        f = self._features(x)
        set_learning_rates(self.optimizer, self.done, t.steps, t.warmup_steps, polynomial)
        for stage in self.upper:
            stage.eval()  # its batch norms keep ImageNet's statistics
        for stage in self.head:
            stage.train()
        with seeded(t.seed, self.done):
            logits = self.net(f)  # (N, K, H / 4, W / 4)
        full = F.interpolate(logits, size=(t.height, t.width), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, torch.from_numpy(maps).long(), weight=self.class_weights, ignore_index=VOID)
        if not torch.isfinite(loss):
            raise ModelFailure(f"the loss is not finite at step {self.done}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
        self.optimizer.step()
        self.done += 1
        self.mean.update(self.net, self.done)
        return loss.item()

    def _look(self) -> float:
        """Mean IoU of the running mean on the validation photographs; the best weights are kept."""
        iou = mean_iou(self._confusion(self.mean.module, self.validation))
        if iou > self.best:
            self.best, self.best_step = iou, self.done
            write_atomically(self.mean.module.state_dict(), self.folder / _BEST)
        return iou

    @torch.no_grad()
    def _confusion(self, net: nn.Module, photos: Sequence[tuple[Path, Path]]) -> NDArray[np.int64]:
        spec, upsample = self.backbone.input, list(self.backbone.stages.values())[-1]
        matrix = np.zeros((self.classes, self.classes), np.int64)
        for photo, labels in photos:
            logits = upsample(net(self._features(preprocess(load_photo(photo), spec))))
            truth = load_class_map(labels, self.classes)
            answer = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False).argmax(1)[0]
            matrix += confusion(truth, answer.numpy(), self.classes)
        return matrix

    def state(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "net": self.net.state_dict(),
            "mean": self.mean.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.net.load_state_dict(state["net"])
        self.mean.module.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])

    def finish(self, out: Path) -> NetworkRecord:
        """Write the best weights as float16, and their accuracy on ``val`` and ``test``."""
        self.net.load_state_dict(torch.load(self.folder / _BEST, weights_only=True))
        self.net.eval()
        state = stages_state(self.backbone.stages)
        for value in state.values():
            if value.is_floating_point():
                value.copy_(value.half().float())
        self._modules.clear()
        test = mapped_photos(self.data / "test")
        matrices = [self._confusion(self.net, photos) for photos in (self.validation, test)]
        by_class = np.nan_to_num(class_iou(matrices[1]))  # 0 for a class that does not occur
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
