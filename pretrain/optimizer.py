"""The optimiser: AdamW with its groups of parameters, the schedule of its learning rate, and steps that are skipped."""

import math
import re
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from objectives.pretraining import Pretraining
from pretrain.config import TrainConfig

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear layers, and nothing else: no norm, bias, embedding, position or scale.

    Each group's ``lr_scale`` says by what `set_learning_rate` multiplies the rate: 1, or ``train.layer_decay`` to the
    power of a layer's distance from the end of the encoder (BEiT, Bao et al. 2022, appendix).
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    depth = len(model.encoder.blocks) if isinstance(model, Pretraining) else 0
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.layer_decay ** (depth + 1 - layer_of(name, depth))
            groups.setdefault((-scale, id(parameter) not in decayed), []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": 0.0 if free else config.weight_decay, "lr_scale": -scale}
        for (scale, free), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def layer_of(name: str, depth: int) -> int:
    """Where in the encoder a parameter stands: 0 for tokenizers, 1 .. depth for blocks, depth + 1 for what follows."""
    if name.startswith("encoder.tokenizers."):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the coming step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The peak rate times the schedule; ``step`` counts from 0.

    A linear warm-up from 0, then either a cosine to 0 at the last step, or the peak rate until a straight line to 0
    over the last ``train.cooldown`` of the steps (Zhai et al. 2022, "Scaling vision transformers", section 3.5). Where
    warm-up and cooldown overlap, it is the lower of the two.
    """
    warmup = round(config.warmup * config.steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    if config.schedule == "constant":
        cooldown = round(config.cooldown * config.steps)
        return config.learning_rate * min(rise, (config.steps - step) / (cooldown + 1))
    if step < warmup:
        return config.learning_rate * rise
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


class BadSteps:
    """Steps whose gradient is not finite: the optimiser leaves them out, without the host waiting for the device.

    The norm of the gradient is the same on all ranks, since gradients are averaged before, so all leave out the same.
    """

    def __init__(self, allowed: int, count: int = 0) -> None:
        """Nothing is known yet.

        Args:
            allowed: how many there may be in a run.
            count: how many there were before.
        """
        self.allowed, self.count = allowed, count
        self._seen: list[tuple[int, Tensor, dict[str, Tensor], list[str]]] = []

    def step(self, optimizer: Any, norm: Tensor, loss: Tensor, accelerator: Accelerator) -> Tensor:
        """Make the step if the gradient is finite; returns whether it is to be counted as bad, a bool on the device.

        Args:
            optimizer: bare, or as Accelerate wraps it.
            norm: of the gradient.
            loss: this rank's.
            accelerator: where it scales gradients (fp16), the scaler leaves out steps itself, which is how it finds its
                scale: only those count in which some rank's loss is not finite, or whose scale can't be the reason.
        """
        bad = ~torch.isfinite(norm.detach())
        if accelerator.scaler is not None:
            smallest = accelerator.scaler.get_scale() <= 1
            optimizer.step()
            mean: Tensor = accelerator.reduce(loss.detach(), "mean")
            return bad if smallest else ~torch.isfinite(mean)
        # As torch's own scaler does it: the fused kernel reads the flag, and leaves weights and moments where it is 1.
        getattr(optimizer, "optimizer", optimizer).found_inf = bad.float()
        optimizer.step()
        return bad

    def note(self, step: int, bad: Tensor, terms: dict[str, Tensor], keys: list[str]) -> None:
        """Remember a step until `look`: its number, and what this rank had in it."""
        self._seen.append((step, bad, terms, keys))

    def look(self) -> "list[BadStep]":
        """The bad ones among the steps noted since the last look, now counted; this waits for the device."""
        found = [
            BadStep(step, [name for name, term in terms.items() if not math.isfinite(term.item())], keys)
            for step, bad, terms, keys in self._seen
            if bad.item()
        ]
        self._seen.clear()
        self.count += len(found)
        return found


class BadStep(NamedTuple):
    """A step that was left out.

    Attributes:
        step: its number, counted from 1.
        terms: the losses that were not finite on this rank; none where only the gradient was not.
        keys: of this rank's samples.
    """

    step: int
    terms: list[str]
    keys: list[str]
