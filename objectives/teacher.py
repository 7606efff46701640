"""A teacher: an average of past weights, whose outcome on whole inputs is what the trained module has to predict."""

import copy
import math
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass
class TeacherConfig:
    """The average of the encoder's past weights. In use where the target is latent or kl."""

    momentum: float = 0.996
    """Share of its weights that the teacher keeps at a step, at the start; a cosine raises it to 1 at the end."""
    layers: int = 4
    """Targets are the mean of the states behind this many of the last blocks."""
    prototypes: int = 1024
    """With kl: number of prototypes to which states are assigned, per modality."""
    temperature: float = 0.04
    """With kl: temperature of the teacher's assignments; below the student's, so that they don't all become equal."""
    student_temperature: float = 0.1
    """With kl: temperature of the student's assignments."""
    centre_momentum: float = 0.9
    """With kl: share of itself that the running mean of the teacher's similarities keeps at a step. It is subtracted
    from them, so that no prototype takes everything."""

    def __post_init__(self) -> None:
        where = "objectives.masked_region.teacher"
        for name in ("momentum", "centre_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: allowed is 0 to 1")
        for name, least in (("layers", 1), ("prototypes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: allowed is {least} or more")
        for name in ("temperature", "student_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: allowed is above 0")


class Teacher(nn.Module):
    """A copy of a module that follows it slowly: no gradients, always in evaluation mode, saved like any weights."""

    def __init__(self, module: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher drops nothing out."""
        return self

    def follow(self, module: nn.Module, progress: float) -> None:
        """Take over a part of the weights of what it is a copy of; ``progress`` is the share of steps done, 0 .. 1."""
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
        average(list(self.module.parameters()), [parameter.detach() for parameter in module.parameters()], None)
