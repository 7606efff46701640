"""Attentive probe: a learned query pools an encoder's tokens, for encoders whose pooled output tells less than they."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.metrics import ProbeResult, accuracy, classification

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class TokenSplit(NamedTuple):
    """Token states and labels of one split; on any device, they are moved batch by batch.

    Attributes:
        x: (N, T, D) floating point, any scale and precision.
        y: (N,) integer label ids, any.
        valid: (N, T) bool, False = padding; None = nothing padded.
    """

    x: Tensor
    y: Tensor
    valid: Tensor | None = None


class AttentivePool(nn.Module):
    """One query of cross-attention with several heads over tokens, then a linear classifier."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        """Of tokens of ``width``, which ``heads`` divides."""
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Logits (B, C) of tokens ``x`` (B, T, D); ``valid`` (B, T) as in ``TokenSplit``."""
        heads, size = self.query.shape
        # A single query makes projecting every token needless: its product with the key weights attends to the tokens,
        # and the value weights are applied to what it pooled.
        query = torch.einsum("hs,hsd->hd", self.query, self.key.weight.view(heads, size, -1))
        logits = x @ query.T / math.sqrt(size)  # (B, T, H)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, :, None], -math.inf)
        pooled = logits.softmax(1).transpose(1, 2) @ x  # (B, H, D)
        values = torch.einsum("bhd,hsd->bhs", pooled, self.value.weight.view(heads, size, -1)).flatten(1)
        classified: Tensor = self.classify(values + self.value.bias)
        return classified


def attentive_probe(
    train: TokenSplit,
    val: TokenSplit,
    test: TokenSplit,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    heads: int = 4,
    epochs: int = 20,
    batch_size: int = 256,
    weight_decay: float = 0.01,
    seed: int = 0,
    device: torch.device | None = None,
    content: Tensor | None = None,
    samples: int = 1000,
) -> ProbeResult:
    """Metrics on ``test`` of a classifier that attends to the frozen tokens of ``train`` with one learned query.

    Tokens are standardised by the mean and standard deviation of the tokens of ``train`` that are no padding. A probe
    per learning rate, all from the same weights, learns from the same batches, which are loaded once for all: AdamW,
    the rate falling to 0 along a cosine. The one with the best accuracy on ``val`` is chosen, of equals that of the
    lowest rate; it is not refitted with ``val``. ``test`` takes no part in the choice. Rows of val and test of a class
    that train lacks count as wrong.

    Metrics are those of ``eval.metrics.classification``, with intervals from ``samples`` resamples by ``content`` (N
    of test,). ``chosen`` has ``learning_rate`` and ``val_top1``.

    Source: Chen et al. 2022, Context Autoencoder for Self-Supervised Representation Learning (attentive probing);
    Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision (a grid side by side).

    Raises:
        ValueError: a split is empty, misshapen or holds NaN or infinity, or a row without a valid token; its labels are
            not integers; the splits differ in width; train has a single class; ``learning_rates`` is empty or holds
            one that is not positive and finite; ``heads`` does not divide the width; ``epochs`` or ``batch_size`` is
            below 1; no learning rate gives finite outputs.
    """
    if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
        raise ValueError(f"learning_rates must be one or more positive finite numbers, got {list(learning_rates)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    for name, split in (("train", train), ("val", val), ("test", test)):
        _check(name, split, train.x.shape[-1])
    width = train.x.shape[2]
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width of tokens, {width}, got {heads}")
    classes = torch.unique(train.y).long()
    if len(classes) < 2:
        raise ValueError(f"train must have at least two classes, got only class {classes.item()}")
    device = train.x.device if device is None else device
    rates = sorted(set(learning_rates))
    # Training needs gradients, and leaving inference mode also undoes a caller's no_grad.
    with torch.inference_mode(False):
        mean, std = _moments(train, batch_size, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = AttentivePool(width, len(classes), heads)
        probes = [copy.deepcopy(first).to(device) for _ in rates]
        places = torch.searchsorted(classes, train.y.long().to(classes.device))
        groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        steps = epochs * math.ceil(len(train.y) / batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(train.y), generator=generator)
            for rows, x, valid in _batches(train, order, batch_size, mean, std, device):
                y = places[rows.to(places.device)].to(device)
                # Each loss has parameters of its own, so that their sum trains every probe as if it were alone.
                torch.autograd.backward([F.cross_entropy(probe(x, valid), y) for probe in probes])
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    on_val = _logits(probes, val, batch_size, mean, std, device)
    classes = classes.cpu()
    scores = {
        place: accuracy(classes[logits.argmax(1)], val.y.long().cpu())
        for place, logits in enumerate(on_val)
        if logits.isfinite().all()
    }
    if not scores:
        raise ValueError(f"learning_rates must have one that gives finite outputs, got {rates}")
    best = max(scores, key=lambda place: (scores[place], -place))
    (logits,) = _logits([probes[best]], test, batch_size, mean, std, device)
    labels, predicted = test.y.long().cpu(), classes[logits.argmax(1)]
    return ProbeResult(
        metrics=classification(logits, labels, classes, groups=content, samples=samples),
        chosen={"learning_rate": rates[best], "val_top1": scores[best]},
        predicted=predicted,
        correct=(predicted == labels).double(),
        classifier=probes[best],
    )


def _batches(
    split: TokenSplit, order: Tensor, size: int, mean: Tensor, std: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows (b,), standardised tokens (b, T, D) float32 and which are valid, ``size`` rows of ``order`` at a time."""
    for rows in torch.split(order, size):
        places = rows.to(split.x.device)
        x = (split.x[places].to(device).float() - mean) / std
        if split.valid is None:
            yield rows, x, None
        else:
            valid = split.valid[places.to(split.valid.device)].to(device)
            yield rows, x.masked_fill(~valid[:, :, None], 0.0), valid  # padding may hold anything, NaN included


def _logits(
    probes: Sequence[AttentivePool], split: TokenSplit, size: int, mean: Tensor, std: Tensor, device: torch.device
) -> list[Tensor]:
    """Per probe (N, C) float32 on the CPU."""
    found: list[list[Tensor]] = [[] for _ in probes]
    with torch.no_grad():
        for _, x, valid in _batches(split, torch.arange(len(split.y)), size, mean, std, device):
            for parts, probe in zip(found, probes, strict=True):
                parts.append(probe(x, valid).cpu())
    return [torch.cat(parts) for parts in found]


def _moments(split: TokenSplit, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) float32 of valid tokens; the latter 1 where a feature is constant."""
    width = split.x.shape[2]
    zero, one = torch.zeros(width, device=device), torch.ones(width, device=device)
    # About the first valid token, so that a far offset does not drown the deviations.
    start = split.x[0, 0 if split.valid is None else int(split.valid[0].int().argmax())].to(device).float()
    count, total, squares = 0, zero.double(), zero.double()
    for _, x, valid in _batches(split, torch.arange(len(split.y)), size, start, one, device):
        count += x.shape[0] * x.shape[1] if valid is None else int(valid.sum())
        total += x.sum((0, 1), dtype=torch.float64)
        squares += x.double().square().sum((0, 1))
    mean = total / count
    variance = squares / count - mean.square()
    std = torch.where(variance > 1e-12 * squares / count, variance, 1.0).sqrt()
    return start + mean.float(), std.float()


def _check(name: str, split: TokenSplit, width: int) -> None:
    """Raise a ValueError, calling it ``name``, unless ``split`` can be used and has tokens of ``width``."""
    x, y, valid = split
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or not x.numel():
        raise ValueError(
            f"{name} must be x (N, T, D) and y (N,) with N, T, D >= 1, got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if x.shape[2] != width:
        raise ValueError(f"{name} must have the {width} features of train, got {x.shape[2]}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{name} labels must be integers, got {y.dtype}")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"{name} valid must be {tuple(x.shape[:2])} bool, got {tuple(valid.shape)} {valid.dtype}")
    if valid is not None and not valid.any(1).all():
        raise ValueError(f"{name} must have a valid token in every row, got {int((~valid.any(1)).sum())} without")
    # A row at a time, for memory's sake: a mask of all tokens can be as large as a machine.
    broken = sum(
        not (x[i] if valid is None else x[i, valid[i].to(x.device)]).isfinite().all().item() for i in range(len(x))
    )
    if broken:
        raise ValueError(f"{name} features must be finite, got NaN or infinity in {broken} of {len(x)} rows")
