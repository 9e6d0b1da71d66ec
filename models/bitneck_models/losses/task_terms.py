"""The task term: how far the network with the unit is from the network without it, or from the labels.

    f ------> tail stage -> tail stage -> ... -> teacher's output
                  |             |                    |             mae, mse at any of them; kl and ce at the last
    f_hat --> tail stage -> tail stage -> ... -> student's output

Paper, section 3.3. The tail runs only as far as the deepest layer that a term compares.

Segmentation: a last stage named ``upsample`` only enlarges logits. Terms without a layer then compare the logits before
it, position by position, and class maps are reduced to that size by taking the nearest pixel. The gradient is as good
as that of the enlarged logits, at a sixteenth of the work for a stage that enlarges 4 times.

Dimensions: N batch, L outputs, K classes, H x W class map, h x w logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.typed_files import Strict

__all__ = ["NO_LABEL", "Labels", "TaskLoss", "TaskTerm"]

NO_LABEL = -1
"""Label of a feature or pixel without a known class."""

_UPSAMPLE = "upsample"
"""Name of a last stage that only enlarges logits."""


class TaskTerm(Strict):
    """One summand of the task term, as a recipe gives it.

    Attributes:
        kind: ``mae`` or ``mse`` compare the features of teacher and student at `layer`; ``kl`` is the divergence of
            the student's class probabilities from the teacher's; ``ce`` is the cross-entropy with the labels.
        layer: name of a stage after the split point, for ``mae`` and ``mse``; None for the last.
        weight: weight of this summand.
        rare: for ``kl`` and ``ce``: a class with share p of the batch has the weight ``1 / ln(rare + p)``, relative to
            the others. The nearer to 1, the more rare classes count, as in mean IoU. None for equal weights.
    """

    kind: Literal["mae", "mse", "kl", "ce"]
    layer: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    rare: Annotated[float, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rare is not None and self.kind in ("mae", "mse"):
            raise ValueError(f"{self.kind} compares features, which have no classes; rare is for kl and ce")
        if self.layer is not None and self.kind in ("kl", "ce"):
            raise ValueError(f"{self.kind} compares the network's outputs and takes no layer, got {self.layer!r}")
        return self


@dataclass(frozen=True, slots=True)
class Labels:
    """Classes of a batch whose features may be mixtures of two features.

    Attributes:
        first: classes of the first feature, (N,) or (N, H, W) int64, `NO_LABEL` where unknown.
        second: classes of the second feature, in the same form.
        share: share of the first feature in the mixture, (N,) float32.
    """

    first: Tensor
    second: Tensor
    share: Tensor


class TaskLoss:
    """The task term of one point.

    Args:
        terms: the summands.
        tail: the frozen network after the split point. The names of its children are those of the stages, with
            underscores for dots.

    Raises:
        InvalidConfig: a layer is not after the split point; the message lists the layers that are.
    """

    def __init__(self, terms: Sequence[TaskTerm], tail: nn.Module) -> None:
        self.terms = tuple(terms)
        self.stages = list(tail.named_children()) if isinstance(tail, nn.Sequential) else [("output", tail)]
        names = [name for name, _ in self.stages]
        output = names[-2] if names[-1] == _UPSAMPLE and len(names) > 1 else names[-1]
        self.layers: list[int] = []
        for term in self.terms:
            wanted = output if term.layer is None else term.layer.replace(".", "_")
            if wanted not in names:
                raise InvalidConfig(f"no layer {term.layer!r} after the split point; there are: {', '.join(names)}")
            self.layers.append(names.index(wanted))

    @property
    def needs_labels(self) -> bool:
        """Whether a term uses labels."""
        return any(term.kind == "ce" for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term uses the teacher."""
        return any(term.kind != "ce" for term in self.terms)

    def features(self, f: Tensor) -> dict[int, Tensor]:
        """Run the tail on (N, C, Hf, Wf), and return the outputs that the terms compare, by index of the stage."""
        found = {}
        for index, (_, stage) in enumerate(self.stages[: max(self.layers) + 1]):
            f = stage(f)
            if index in self.layers:
                found[index] = f.float()
        return found

    def __call__(self, student: dict[int, Tensor], teacher: dict[int, Tensor], labels: Labels | None) -> Tensor:
        """The weighted sum of the terms, each a mean over the batch.

        Args:
            student: `features` of f_hat.
            teacher: `features` of f; may be empty if `needs_teacher` is false.
            labels: labels of the batch; may be None if `needs_labels` is false.

        Raises:
            InvalidConfig: there are no labels, and a term needs them.
        """
        total = next(iter(student.values())).new_zeros(())
        for term, layer in zip(self.terms, self.layers, strict=True):
            s = student[layer]
            match term.kind:
                case "mae":
                    value = F.l1_loss(s, teacher[layer])
                case "mse":
                    value = F.mse_loss(s, teacher[layer])
                case "kl":
                    divergence = F.kl_div(
                        s.log_softmax(1), teacher[layer].log_softmax(1), reduction="none", log_target=True
                    )
                    divergence = divergence.sum(1)  # (N,) or (N, h, w)
                    if term.rare is not None:
                        divergence = divergence * _rarity(teacher[layer].softmax(1), term.rare)
                    value = divergence.mean()
                case "ce":
                    if labels is None:
                        raise InvalidConfig("a task term `ce` needs labels")
                    value = _cross_entropy(s, labels, term.rare)
            total = total + term.weight * value
        return total


def _rarity(shares: Tensor, rare: float) -> Tensor:
    """Weight of each sample or position, with a mean of 1.

    Args:
        shares: probabilities of the classes, (N, K) or (N, K, h, w).
        rare: see `TaskTerm`.
    """
    by_class = 1 / (rare + shares.transpose(0, 1).flatten(1).mean(1)).log()  # (K,)
    weights = torch.einsum("nk...,k->n...", shares, by_class)
    return weights / weights.mean()


def _cross_entropy(logits: Tensor, labels: Labels, rare: float | None = None) -> Tensor:
    """Mean cross-entropy over samples or positions with a label, or 0 if there are none.

    A mixture counts for both of its classes, by their shares.

    Args:
        logits: (N, L) or (N, K, h, w).
        labels: labels of the batch; class maps may have any size.
        rare: see `TaskTerm`.
    """
    share = labels.share.view(-1, *[1] * (logits.ndim - 2))  # (N,) or (N, 1, 1)
    total, count = logits.new_zeros(()), logits.new_zeros(())
    for classes, part in ((labels.first, share), (labels.second, 1 - share)):
        wanted = _at_size(classes, logits)
        counts = part * (wanted != NO_LABEL)
        if rare is not None:
            shares = F.one_hot(wanted.clamp(min=0), logits.shape[1]).movedim(-1, 1) * (wanted != NO_LABEL)[:, None]
            counts = counts * _rarity(shares.to(logits.dtype), rare)
        losses = F.cross_entropy(logits, wanted, ignore_index=NO_LABEL, reduction="none")
        total, count = total + (counts * losses).sum(), count + counts.sum()
    return total / count.clamp(min=1e-6)


def _at_size(classes: Tensor, logits: Tensor) -> Tensor:
    """Class maps (N, H, W) reduced to the logits' h x w by taking the nearest pixels; (N,) is returned as it is."""
    if classes.ndim == 1 or classes.shape[1:] == logits.shape[2:]:
        return classes
    rows, columns = (
        ((torch.arange(n, device=classes.device) + 0.5) * (m / n)).long()
        for m, n in zip(classes.shape[1:], logits.shape[2:], strict=True)
    )
    return classes[:, rows[:, None], columns[None, :]]
