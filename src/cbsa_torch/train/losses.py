"""What training minimises: the cross-entropy, and what a student learns from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch.models.adapt.find import find_attention
from cbsa_torch.train.config import WEIGHTS
from cbsa_torch.train.data import IGNORE

Loss = Callable[[nn.Module, Any, Tensor], Tensor]
"""A scalar of (model, images, targets): a mean over the targets that are not ``IGNORE``."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def mean_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the targets that are known.

    Args:
        logits: ``(B, classes)`` of images, or ``(B, classes, height, width)`` of pixels.
        targets: ``(B)`` or ``(B, height, width)``, a class or ``IGNORE`` each.
        label_smoothing: share of a target that is spread over all classes.
        weights: of the classes, ``(classes,)``; the mean is still over the targets, not over their weights.
    """
    total = F.cross_entropy(
        logits, targets, weights, label_smoothing=label_smoothing, ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def cross_entropy(
    label_smoothing: float,
    weights: Tensor | None = None,
    call: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Loss:
    """:func:`mean_loss` of a model's outputs.

    Args:
        label_smoothing, weights: of :func:`mean_loss`.
        call: gives the outputs of (model, inputs). Default: ``model(inputs)``.
    """

    def loss(model: nn.Module, images: Any, targets: Tensor) -> Tensor:
        logits = (model(images) if call is None else call(model, images)).float()
        given = None if weights is None else weights.to(logits)
        return mean_loss(logits, targets, label_smoothing, given)

    return loss


@dataclass
class DistillConfig:
    """What the adapted model learns from the original besides the labels. The loss is the weighted sum.

    Examples:
        >>> from cbsa_torch.train import DistillConfig
        >>> DistillConfig(labels=0.5, logits=0.5).wanted
        True
    """

    labels: float = 1.0
    """Weight of the cross-entropy against the labels; 0: only the teacher counts."""
    logits: float = 0.0
    """Weight of the Kullback-Leibler divergence from the teacher's classes, times temperature squared."""
    temperature: float = 2.0
    """Logits of both are divided by it."""
    features: float = 0.0
    """Weight of the difference after every block with attention: its square over that of the teacher's
    features, mean over the images and the blocks."""
    teacher: str | None = field(default=None, metadata=WEIGHTS)
    """As model.original. Default: that."""
    teacher_weights: str | None = field(default=None, metadata=WEIGHTS)
    """As model.weights, of the timm model that `teacher` names."""

    @property
    def wanted(self) -> bool:
        """Whether a teacher is needed."""
        return self.logits > 0 or self.features > 0


class Distillation:
    """A loss for :class:`cbsa_torch.train.tasks.base.TaskSetup`.

    Args:
        student: the model that is trained, bare; the loop hands over what Accelerate made of it.
        teacher: the original; its weights stay as they are.
        config: the weights of the parts.
        label_smoothing: of the labels.
        precision: of ``engine.precision``; the teacher computes as the student does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        label_smoothing: float = 0.0,
        precision: str = "no",
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.config, self.label_smoothing, self.dtype = config, label_smoothing, AUTOCAST.get(precision)
        names, others = (blocks_with_attention(m) if config.features else [] for m in (student, teacher))
        if others != names:
            raise ValueError(f"it has {len(others)} blocks with attention, the model {len(names)}")
        self.blocks = [student.get_submodule(name) for name in names]
        self.teacher_blocks = [teacher.get_submodule(name) for name in names]

    @torch.no_grad()
    def check(self, student: nn.Module, input_size: tuple[int, int, int]) -> None:
        """Let an empty image through both, before a run touches anything.

        Raises:
            ValueError: the teacher does not take the image, or its features have another shape.
        """
        image = torch.zeros(1, *input_size)
        student.eval()
        with recorded(self.blocks) as features:
            student(image)
        try:
            with recorded(self.teacher_blocks) as wanted:
                self.teacher(image)
        except Exception as error:  # any model of timm, fed with anything
            raise ValueError(f"it does not take an image of {input_size}: {error}") from error
        shapes = [[tuple(tensor.shape) for tensor in both] for both in (features, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"its features have shapes {shapes[1]}, those of the model {shapes[0]}")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The weighted sum, a mean over the images with a known target."""
        config, known = self.config, targets != IGNORE
        with recorded(self.blocks) as features:
            logits = model(images).float()
        # also where it weighs nothing: every parameter then has a gradient, as processes expect
        loss = config.labels * mean_loss(logits, targets, self.label_smoothing)
        if not known.any():
            return loss
        self.teacher.to(images.device)
        autocast: Any = (
            nullcontext() if self.dtype is None else torch.autocast(images.device.type, dtype=self.dtype)
        )
        with torch.no_grad(), autocast, recorded(self.teacher_blocks) as wanted:
            teacher_logits = self.teacher(images).float()
        if config.logits:
            loss = loss + config.logits * divergence(logits[known], teacher_logits[known], config.temperature)
        if config.features:
            pairs = zip(features, wanted, strict=True)
            each = [relative_error(own[known], other[known]) for own, other in pairs]
            loss = loss + config.features * torch.stack(each).mean()
        return loss


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(logits / T)), mean over the images.

    The factor keeps gradients of one size at any temperature (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits, teacher: ``(B, classes)``.
        temperature: T.
    """
    student_log, teacher_log = (F.log_softmax(values / temperature, dim=-1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")


def relative_error(features: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance over the teacher's squared norm, mean over the images.

    Each image by itself: a step in parts, or shared between processes, then has the loss of the whole batch.

    Args:
        features, teacher: ``(B, ...)`` of one shape.
    """
    features, teacher = features.float().flatten(1), teacher.float().flatten(1)
    norm = teacher.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((features - teacher).square().sum(1) / norm).mean()


def blocks_with_attention(model: nn.Module) -> list[str]:
    """Names of the modules that hold the attention layers, in order; of parallel attention, what holds all."""
    names: list[str] = []
    for layer in find_attention(model):
        name = layer.name.rpartition(".")[0]
        while name and isinstance(model.get_submodule(name), (nn.ModuleList, nn.Sequential)):
            name = name.rpartition(".")[0]
        if name and not layer.is_pool and name not in names:
            names.append(name)
    return names


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of ``modules``, in the order they are called within."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda _m, _i, out: outputs.append(out)))
        yield outputs
