"""Contrastive losses over every pair of modalities: exact on any number of ranks, in memory of one tile of logits.

Shapes: n rows of this rank, N rows of all ranks, E embedding width, t rows of a tile.

What makes it exact on W ranks. Rank r holds the rows x_r and y_r and makes the block of logits x_r @ y.T (n, N), once;
it serves both directions, since the log-sum-exps of columns are merged over ranks. With G = dL/dlogits of its block,

    dL/dx_r = scale * G @ y, complete,      and      dL/dy = sum over ranks of scale * G.T @ x_r, summed to its owner,

so each rank ends with the gradient of the loss L of the whole batch with respect to its own embeddings. Data
parallelism then averages: (1/W) sum_r (dx_r/dw) g_r has to be dL/dw = sum_r (dx_r/dw) dL/dx_r, hence g_r = W * dL/dx_r.
The value L and its gradients with respect to scale and bias are summed over ranks here, hence equal on all of them,
and an average leaves them as they are.

The gradients are made in the forward pass, while the gathered rows are at hand, and backward only scales them. So what
waits for backward is as large as the embeddings, the logits are made tile by tile, twice, and no collective is left
for backward (see ``objectives.gather``).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.batch import Field
from objectives.gather import gather_counts, gather_rows, sum_to_owner
from objectives.passes import Passes, at_least_float32
from pretrain.model.encoder import Encoder

MAX_LOG_SCALE = math.log(100)
TILE = 512
LOSSES = ("info_nce", "sigmoid")


@dataclass
class ContrastiveConfig:
    """A contrastive loss between the embeddings of every two modalities of a sample."""

    weight: float = 1.0
    """Weight of each pair's term; 0 switches the objective off."""
    weight_end: float | None = None
    """Weight at the end of training, to which it goes in a straight line; null keeps it as it is."""
    loss: str = "info_nce"
    """Allowed: info_nce (CLIP), sigmoid (SigLIP)."""
    temperature: float | None = None
    """Temperature at the start; each pair learns its own. null takes 0.07 for info_nce and 0.1 for sigmoid."""
    cached: bool = True
    """With train.accumulate above 1, contrast all micro-batches of a step as one batch, at the price of a second
    forward pass (GradCache); false: each with itself."""
    tile: int = TILE
    """Rows of similarities that are in memory at a time; it changes memory and speed, not the result."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"objectives.contrastive.loss={self.loss}: allowed are {', '.join(LOSSES)}")
        if self.temperature is not None and not 1 / 100 <= self.temperature < math.inf:
            raise ValueError(f"objectives.contrastive.temperature={self.temperature}: allowed is 0.01 or more")
        if self.tile < 1:
            raise ValueError(f"objectives.contrastive.tile={self.tile}: allowed is 1 or more")


class Contrastive(nn.Module):
    """A term for every pair of modalities, each with a scale of its own (and with ``sigmoid`` a bias).

    After each step the scale is clamped at 100 (CLIP, Radford et al. 2021, section 2.5). A sample that lacks one
    modality of a pair is neither a positive nor a negative of that pair, and terms are means over the samples of all
    ranks that count.
    """

    reads = "pairs"

    @staticmethod
    def learns_from(modalities: Collection[str]) -> bool:
        """It compares two modalities."""
        return len(modalities) >= 2

    def __init__(self, config: ContrastiveConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.width = config, encoder.config.embed_dim
        self.pairs = {f"{a}_{b}": (a, b) for a, b in combinations(encoder.views.used, 2)}
        self.names = tuple(self.pairs)
        start = -math.log(config.temperature or {"info_nce": 0.07, "sigmoid": 0.1}[config.loss])
        # Of one element, not of none: FSDP shares parameters along their first dimension.
        self.log_scale = nn.ParameterDict({name: torch.tensor([start]) for name in self.pairs})
        if config.loss == "sigmoid":
            # So low that the many negatives cost nothing at the start (SigLIP, Zhai et al. 2023, section 3.2).
            self.bias = nn.ParameterDict({name: torch.tensor([-10.0]) for name in self.pairs})

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """A term for every pair that enough samples of all ranks have: two with InfoNCE, one with sigmoid.

        All ranks have the same terms, with the same values, also those on which nothing has the pair.

        Args:
            passes: of which the embeddings are read, and the groups, which all ranks have or none.
        """
        return self.terms(passes.embeddings, passes.groups)

    def terms(self, embeddings: Mapping[str, Field], groups: Tensor | None = None) -> dict[str, Tensor]:
        """As ``forward``, from embeddings (n, E) by modality.

        Args:
            embeddings: with the rows that they stand for.
            groups: (size,) int64, one per row of the batch: rows of equal group are no negatives of each other. Below
                0 is a group of one. All ranks pass it, or none does.
        """
        if not self.pairs:
            return {}
        present = {name: self._common(embeddings, pair, groups) for name, pair in self.pairs.items()}
        device = next(self.parameters()).device
        everywhere = gather_counts([len(pair.x) for pair in present.values()], device)
        least = 2 if self.config.loss == "info_nce" else 1
        terms = {}
        for (name, pair), counts in zip(present.items(), everywhere, strict=True):
            if sum(counts) < least:
                continue
            log_scale = self.log_scale[name][0]
            if self.config.loss == "info_nce":
                terms[name] = info_nce(pair.x, pair.y, log_scale, pair.groups, counts, self.config.tile)
            else:
                terms[name] = pairwise_sigmoid(
                    pair.x, pair.y, log_scale, self.bias[name][0], pair.groups, counts, self.config.tile
                )
        return terms

    @torch.no_grad()
    def after_step(self, _: Encoder, __: float) -> None:
        """Scales stay at 100 or below: the parameters, so that these keep their gradient and can come down again."""
        for log_scale in self.log_scale.values():
            log_scale.clamp_(max=MAX_LOG_SCALE)

    def _common(self, embeddings: Mapping[str, Field], pair: tuple[str, str], groups: Tensor | None) -> "_Common":
        """What both modalities have. Rows ascend, so it comes out aligned."""
        scale = self.log_scale["_".join(pair)]
        absent = Field(scale.new_empty(0, self.width), torch.empty(0, dtype=torch.int64))
        a, b = (embeddings.get(name, absent) for name in pair)
        x = a.select(torch.isin(a.rows, b.rows).nonzero()[:, 0])
        y = b.select(torch.isin(b.rows, a.rows).nonzero()[:, 0])
        return _Common(x.x, y.x, None if groups is None else groups[x.rows.to(groups.device)].to(scale.device))


class _Common(NamedTuple):
    x: Tensor  # (n, E)
    y: Tensor  # (n, E)
    groups: Tensor | None  # (n,)


def info_nce(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    groups: Tensor | None = None,
    counts: Sequence[int] | None = None,
    tile: int = TILE,
) -> Tensor:
    """Mean of both directions' cross-entropy, row i of x belonging to row i of y.

    Args:
        x: (n, E), of any norm.
        y: (n, E), of any norm.
        log_scale: scalar, the logarithm of the factor on the cosines.
        groups: (n,) int64; rows of equal group are no negatives of each other. Below 0 is a group of one.
        counts: n on every rank, of which all call this; the loss is that of the rows of all ranks. Gradients of x and
            y are those times the number of ranks, for averaging over ranks. None: of this process alone.
        tile: rows of the similarities that are in memory at a time.
    """
    return _loss(_info_nce, x, y, log_scale, None, groups, counts, tile)


def pairwise_sigmoid(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    groups: Tensor | None = None,
    counts: Sequence[int] | None = None,
    tile: int = TILE,
) -> Tensor:
    """Every pair of rows judged alone, matching or not (SigLIP, Zhai et al. 2023): summed and divided by N.

    Args:
        x: (n, E), of any norm.
        y: (n, E), of any norm.
        log_scale: scalar, the logarithm of the factor on the cosines.
        bias: scalar, added to the scaled cosines.
        groups: (n,) int64; rows of equal group are no negatives of each other. Below 0 is a group of one.
        counts: as in ``info_nce``.
        tile: as in ``info_nce``.
    """
    return _loss(_sigmoid, x, y, log_scale, bias, groups, counts, tile)


class _Block:
    """Logits of this rank's n rows with all N columns, made tile by tile and never kept."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        groups: Tensor | None,
        counts: Sequence[int] | None,
        tile: int,
    ) -> None:
        self.counts = [len(x)] if counts is None else list(counts)
        self.rank = 0 if len(self.counts) == 1 else dist.get_rank()
        self.first = sum(self.counts[: self.rank])  # the column that belongs to row 0
        self.total = sum(self.counts)
        self.x, self.scale, self.bias, self.tile = x, scale, bias, tile
        self.columns = gather_rows(y, self.counts)  # (N, E)
        self.groups = groups
        self.column_groups = None if groups is None else gather_rows(groups, self.counts)  # (N,)

    def tiles(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Rows of a tile, the column that belongs to the first of them, their logits (t, N); -inf is no negative."""
        for start in range(0, len(self.x), self.tile):
            rows = slice(start, start + self.tile)
            logits = (self.scale * self.x[rows]) @ self.columns.T
            if self.bias is not None:
                logits += self.bias
            if self.groups is not None and self.column_groups is not None:
                mine = self.groups[rows, None]
                same = (mine == self.column_groups) & (mine >= 0)
                same.diagonal(self.first + start).fill_(False)
                logits.masked_fill_(same, -math.inf)
            yield rows, self.first + start, logits

    def gradients(self, pulls: Iterator[tuple[slice, Tensor]]) -> tuple[Tensor, Tensor]:
        """From N * dL/dlogits, tile by tile: the gradients of this rank's x and y (n, E)."""
        dx, dy = torch.empty_like(self.x), torch.zeros_like(self.columns)
        for rows, pull in pulls:
            torch.mm(pull, self.columns, out=dx[rows])
            dy.addmm_(pull.T, self.x[rows])
        factor = self.scale / self.total
        return dx.mul_(factor), sum_to_owner(dy, self.counts).mul_(factor)

    def merge(self, log_sums: Tensor) -> Tensor:
        """Log-sum-exps of columns (N,) over this rank's rows -> over all rows."""
        if len(self.counts) == 1:
            return log_sums
        every = log_sums.new_empty(len(self.counts) * self.total)
        dist.all_gather_single(every, log_sums)
        return every.view(-1, self.total).logsumexp(dim=0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if len(self.counts) > 1:
            dist.all_reduce(values)
        return values


class _Outcome(NamedTuple):
    loss: Tensor  # scalar, this rank's share
    dx: Tensor | None  # (n, E), None where no gradient is wanted
    dy: Tensor | None  # (n, E)
    dbias: Tensor  # scalar, this rank's share


def _info_nce(block: _Block, differentiate: bool) -> _Outcome:
    # Sums over whole rows and columns hold at least the positive, so their logarithms are finite; over a tile or a rank
    # a column may be all masked, hence -inf.
    row_sums, positives = block.x.new_empty(2, len(block.x))
    column_sums = block.x.new_full((block.total,), -math.inf)
    for rows, first, logits in block.tiles():
        positives[rows] = logits.diagonal(first)
        row_sums[rows] = logits.logsumexp(dim=1)
        column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
    column_sums = block.merge(column_sums)
    own = column_sums[block.first : block.first + len(block.x)]
    loss = ((row_sums + own) / 2 - positives).sum() / block.total

    def pulls() -> Iterator[tuple[slice, Tensor]]:
        for rows, first, logits in block.tiles():
            pull = (logits - row_sums[rows, None]).exp_()
            pull += logits.sub_(column_sums).exp_()
            pull.diagonal(first).sub_(2)
            yield rows, pull.div_(2)

    dx, dy = block.gradients(pulls()) if differentiate else (None, None)
    return _Outcome(loss, dx, dy, torch.zeros_like(loss))


def _sigmoid(block: _Block, differentiate: bool) -> _Outcome:
    loss, dbias = block.x.new_zeros(2)

    def pulls() -> Iterator[tuple[slice, Tensor]]:
        for rows, first, logits in block.tiles():
            logits.diagonal(first).neg_()  # what should be small, everywhere
            loss.sub_(F.logsigmoid(-logits).sum())
            pull = logits.sigmoid_()
            pull.diagonal(first).neg_()
            dbias.add_(pull.sum())
            yield rows, pull

    dx = dy = None
    if differentiate:
        dx, dy = block.gradients(pulls())
    else:
        for _ in pulls():
            pass
    return _Outcome(loss / block.total, dx, dy, dbias / block.total)


def _loss(
    measure: Callable[[_Block, bool], _Outcome],
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    counts: Sequence[int] | None,
    tile: int,
) -> Tensor:
    # Cosines times a scale up to 100 need float32: bf16 has 3 digits.
    exact = torch.promote_types(log_scale.dtype, torch.float32)
    differentiate = torch.is_grad_enabled()  # not "whether x needs it": a rank without rows joins the collectives, too
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        (unit_x, norm_x), (unit_y, norm_y) = (_normalise(side.to(exact)) for side in (x, y))
        block = _Block(unit_x, unit_y, log_scale.to(exact).exp(), bias, groups, counts, tile)
        outcome = measure(block, differentiate)
        if outcome.dx is None or outcome.dy is None:
            return block.sum(outcome.loss)
        # Logits are scale * cosine (+ bias), so d/dlog_scale is the sum of unit_x * d/dunit_x.
        loss, dscale, dbias = block.sum(torch.stack([outcome.loss, (unit_x * outcome.dx).sum(), outcome.dbias]))
        ranks = len(block.counts)
        dx = _normalise_backward(unit_x, norm_x, outcome.dx).mul_(ranks)
        dy = _normalise_backward(unit_y, norm_y, outcome.dy).mul_(ranks)
    if bias is None:
        return _known(loss, [dx, dy, dscale], [x, y, log_scale])
    return _known(loss, [dx, dy, dscale, dbias], [x, y, log_scale, bias])


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, E) of length 1, and the lengths (n, 1) that they had."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    return x / norm, norm


def _normalise_backward(unit: Tensor, norm: Tensor, gradient: Tensor) -> Tensor:
    """What of a gradient of unit rows remains for the rows themselves: the part across them."""
    return (gradient - unit * (unit * gradient).sum(dim=1, keepdim=True)).div_(norm)


def _known(value: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    known: Tensor = _Known.apply(value, gradients, *inputs)  # type: ignore[no-untyped-call]
    return known


class _Known(torch.autograd.Function):
    """A value whose gradients with respect to the inputs are known already.

    They wait in their own precision and become that of the inputs once they are scaled: the gradient of a mean over
    many rows is below what fp16 can tell from 0, and a loss scale may be above the largest number that it has.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [each.dtype for each in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((upstream * gradient).to(dtype) for gradient, dtype in pairs)


def with_gradients(value: Tensor, gradients: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """``value``, whose gradient with respect to each of the inputs is the one of that name."""
    return _known(value, [gradients[name] for name in inputs], list(inputs.values()))


# Accumulation with negatives from all micro-batches (GradCache, Gao et al. 2021): embed each micro-batch without a
# graph, find the gradients of all embeddings at once, then embed each again, with the same masks since these depend on
# the rows' seeds alone, and go backward from `with_gradients`.


class EmbeddingGradients(NamedTuple):
    """The outcome of contrasting several micro-batches as one batch.

    Attributes:
        terms: name -> scalar, of the whole batch; without a graph.
        embeddings: for each micro-batch: modality -> (n, E), the gradient of the sum of the terms, in at least float32.
        parameters: the objective's parameters by name -> their gradient, once for all micro-batches and equal on all
            ranks.
    """

    terms: dict[str, Tensor]
    embeddings: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]


def embedding_gradients(
    objective: Contrastive,
    micro_batches: Sequence[Mapping[str, Field]],
    sizes: Sequence[int],
    groups: Sequence[Tensor] | None = None,
) -> EmbeddingGradients:
    """Contrast micro-batches as if they were one batch, together with those of the other ranks.

    Args:
        objective: whose terms are differentiated. The gradients are returned, none is left on its parameters.
        micro_batches: of each the embeddings by modality, as in ``Passes``; no graph of theirs is followed.
        sizes: number of rows of each micro-batch.
        groups: of each micro-batch what ``Contrastive`` takes.
    """
    parts = [
        {name: at_least_float32(each.x.detach()).requires_grad_() for name, each in fields.items()}
        for fields in micro_batches
    ]
    merged: dict[str, Field] = {}
    for name in {name: None for fields in micro_batches for name in fields}:
        holding = [i for i, fields in enumerate(micro_batches) if name in fields]
        rows = [micro_batches[i][name].rows + sum(sizes[:i]) for i in holding]
        merged[name] = Field(torch.cat([parts[i][name] for i in holding]), torch.cat(rows))
    parameters = dict(objective.named_parameters())
    leaves = [leaf for part in parts for leaf in part.values()]
    with torch.enable_grad():
        terms = objective.terms(merged, None if groups is None else torch.cat(list(groups)))
        total = sum(terms.values(), 0 * next(iter(parameters.values())).sum())
    # What feeds no term has a gradient of zeros.
    found = iter(torch.autograd.grad(total, [*parameters.values(), *leaves], allow_unused=True, materialize_grads=True))
    parameter_gradients = {name: next(found) for name in parameters}
    return EmbeddingGradients(
        {name: term.detach() for name, term in terms.items()},
        [{name: next(found) for name in part} for part in parts],
        parameter_gradients,
    )
