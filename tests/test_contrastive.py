import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import MissingPeerError, open_clip
from data.batch import Field
from objectives.contrastive import (
    Contrastive,
    ContrastiveConfig,
    embedding_gradients,
    info_nce,
    pairwise_sigmoid,
    with_gradients,
)
from objectives.passes import Passes
from tests.samples import encoder

PAIRS = ("image_text", "image_audio", "text_audio")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(got: Any, expected: Any) -> None:
    """Equal but for the rounding of float64; tensors, or dicts of them."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# The losses by their definition, one similarity at a time


def naive_loss(
    kind: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None = None, groups: Sequence[int] | None = None
) -> Tensor:
    x, y, scale = x.double(), y.double(), log_scale.double().exp()
    n = len(x)
    norms = [[row.square().sum().sqrt() for row in side] for side in (x, y)]
    scores = [[scale * (x[i] * y[j]).sum() / (norms[0][i] * norms[1][j]) for j in range(n)] for i in range(n)]
    counted = [
        [i == j or groups is None or groups[i] != groups[j] or groups[i] < 0 for j in range(n)] for i in range(n)
    ]
    total = torch.zeros((), dtype=torch.float64)
    if kind == "sigmoid":
        assert bias is not None
        for i in range(n):
            for j in range(n):
                if counted[i][j]:
                    score = scores[i][j] + bias.double()
                    total = total + torch.log1p(torch.exp(-score if i == j else score))
        return total / n
    for i in range(n):
        row = torch.stack([scores[i][j] for j in range(n) if counted[i][j]]).exp().sum()
        column = torch.stack([scores[j][i] for j in range(n) if counted[j][i]]).exp().sum()
        total = total - (scores[i][i] - row.log()) / 2 - (scores[i][i] - column.log()) / 2
    return total / n


def fast_loss(
    kind: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor, groups: Tensor | None = None, *, tile: int = 512
) -> Tensor:
    if kind == "sigmoid":
        return pairwise_sigmoid(x, y, log_scale, bias, groups, tile=tile)
    return info_nce(x, y, log_scale, groups, tile=tile)


def loss_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss, and its gradient with respect to every input; 0 for what it doesn't read."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves, allow_unused=True)  # 3: as in a weighted sum
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("tile", [1, 3, 7, 512])
@pytest.mark.parametrize(
    "groups", [None, [0, 1, 0, 2, -1, -1, 0], [5] * 7], ids=["no groups", "groups", "all in one group"]
)
def test_losses_and_their_gradients_equal_the_definition(kind: str, tile: int, groups: list[int] | None) -> None:
    for log_scale, bias in ((0.0, 0.5), (math.log(1 / 0.07), -10.0), (4.5, -2.0)):
        given = [randn(7, 5, seed=1), 3 * randn(7, 5, seed=2), torch.tensor(log_scale), torch.tensor(bias)]
        given = [each.double() for each in given]
        members = None if groups is None else torch.tensor(groups)
        got = loss_and_gradients(lambda x, y, s, b, m=members: fast_loss(kind, x, y, s, b, m, tile=tile), *given)
        expected = loss_and_gradients(lambda x, y, s, b: naive_loss(kind, x, y, s, b, groups), *given)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_half_precision_embeddings_are_contrasted_in_float32(kind: str) -> None:
    x = randn(32, 16, seed=1, dtype=torch.bfloat16)
    y = (x + 3 * randn(32, 16, seed=2)).to(torch.bfloat16)
    scale, bias = torch.tensor(4.6), torch.tensor(-50.0)
    with torch.autocast("cpu", torch.bfloat16):
        value, dx, _, dscale, _ = loss_and_gradients(lambda *inputs: fast_loss(kind, *inputs), x, y, scale, bias)
    expected = loss_and_gradients(lambda *inputs: fast_loss(kind, *inputs), *(i.double() for i in (x, y, scale, bias)))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-5, atol=1e-6)
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dx.double(), expected[1], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(dscale.double(), expected[3], rtol=1e-4, atol=1e-5)


def large_and_close(n: int) -> tuple[Tensor, Tensor]:
    """Half-precision embeddings (n, 16) whose gradients are below what fp16 can tell from 0."""
    x = 100 * randn(n, 16, seed=1)
    return x.half(), (x + 20 * randn(n, 16, seed=2)).half()


def assert_near(scaled: Tensor, scale: float, expected: Tensor) -> None:
    """fp16 gradients of a loss times ``scale``, as the optimiser gets them."""
    assert scaled.dtype == torch.float16
    error = (scaled.double() / scale - expected).norm() / expected.norm()
    assert error < 1e-2


@pytest.mark.parametrize("scale", [32768.0, 65536.0])  # the second is infinite in fp16
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_gradients_in_fp16_are_scaled_before_they_are_rounded(kind: str, scale: float) -> None:
    x, y = large_and_close(512)
    given = [x, y, torch.tensor(3.0), torch.tensor(-10.0)]
    leaves = [each.clone().requires_grad_() for each in given]
    got = torch.autograd.grad(scale * fast_loss(kind, *leaves), leaves[:2])
    _, *expected = loss_and_gradients(lambda *inputs: fast_loss(kind, *inputs), *(each.double() for each in given))
    for gradient, exact in zip(got, expected[:2], strict=True):
        assert_near(gradient, scale, exact / 3)


@pytest.mark.parametrize("scale", [32768.0, 65536.0])
def test_micro_batches_in_fp16_are_scaled_before_they_are_rounded(scale: float) -> None:
    contrastive = Contrastive(ContrastiveConfig(), encoder())
    rows = torch.arange(256)
    x, y = large_and_close(512)
    parts = [{"image": Field(x[half], rows), "text": Field(y[half], rows)} for half in (rows, rows + 256)]
    exact = [{name: field._replace(x=field.x.double()) for name, field in part.items()} for part in parts]
    found = embedding_gradients(contrastive, parts, [256, 256])
    expected = embedding_gradients(contrastive, exact, [256, 256])
    for part, gradients, wanted in zip(parts, found.embeddings, expected.embeddings, strict=True):
        leaves = {name: field.x.clone().requires_grad_() for name, field in part.items()}
        total = scale * with_gradients(torch.zeros(()), gradients, leaves)
        for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
            assert_near(gradient, scale, wanted[name])


def test_extreme_similarities_are_finite() -> None:
    """Opposed embeddings at scale 100: the sums of a row and of a column differ by a factor of e^200."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for kind in ("info_nce", "sigmoid"):
        inputs = [x.clone(), -x, torch.tensor(math.log(100)), torch.tensor(-10.0)]
        got = loss_and_gradients(lambda *given, k=kind: fast_loss(k, *given, tile=1), *inputs)
        expected = loss_and_gradients(lambda *given, k=kind: naive_loss(k, *given), *(each.double() for each in inputs))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


class Held:
    """A tensor that waits for backward, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_memory_is_that_of_a_tile_and_of_the_embeddings(kind: str) -> None:
    n, width, tile = 300, 4, 16
    inputs = [randn(n, width, seed=1), randn(n, width, seed=2), torch.tensor(1.0), torch.tensor(-5.0)]
    inputs = [each.requires_grad_() for each in inputs]
    saved: WeakSet[Held] = WeakSet()

    def hold(tensor: Tensor) -> Held:
        held = Held(tensor)
        saved.add(held)
        return held

    largest = Largest()  # type: ignore[no-untyped-call]
    with largest, torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor):
        loss = fast_loss(kind, *inputs, tile=tile)
        waiting = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in saved}
        torch.autograd.backward(loss)
    assert largest.elements == tile * n
    assert sum(waiting.values()) <= 4 * (2 * n * width + 10)  # bytes: the gradients of x and y, and scalars


# Against open_clip, whose losses are the ones most used. Its package wants torchvision, its loss.py torch alone.


def open_clip_losses() -> Any:
    try:
        return open_clip("loss")
    except MissingPeerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_losses_and_their_gradients_equal_those_of_open_clip(kind: str) -> None:
    losses = open_clip_losses()

    def theirs(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        loss: Tensor
        if kind == "sigmoid":
            loss = losses.SigLipLoss()(x, y, log_scale.exp(), bias)
        else:
            loss = losses.ClipLoss()(x, y, log_scale.exp())
        return loss

    given = [randn(50, 16, seed=1), randn(50, 16, seed=2), torch.tensor(2.5), torch.tensor(-10.0)]
    given = [each.double() for each in given]
    got = loss_and_gradients(lambda *inputs: fast_loss(kind, *inputs, tile=16), *given)
    for a, b in zip(got, loss_and_gradients(theirs, *given), strict=True):
        assert_same(a, b)


# The module


def fields_of(presence: Sequence[str], values: Mapping[str, Tensor]) -> dict[str, Field]:
    """The rows of ``values`` that a sample has, of i, t and a."""
    fields = {}
    for name, x in values.items():
        rows = torch.tensor([row for row, has in enumerate(presence) if name[0] in has], dtype=torch.int64)
        if len(rows):
            fields[name] = Field(x[rows], rows)
    return fields


def test_the_scale_is_clamped_at_100_and_can_come_down_again() -> None:
    model = encoder()
    contrastive = Contrastive(ContrastiveConfig(), model)
    x, y = randn(6, 5, seed=1), randn(6, 5, seed=2)
    rows = torch.arange(6)
    with torch.no_grad():
        contrastive.log_scale["image_text"].fill_(math.log(200))
    contrastive.after_step(model, 0.5)
    loss = contrastive(Passes(model, {"image": Field(x, rows), "text": Field(y, rows)}, []))["image_text"]
    torch.testing.assert_close(loss.detach(), info_nce(x, y, torch.tensor(math.log(100))))
    torch.testing.assert_close(contrastive.log_scale["image_text"].detach(), torch.tensor([math.log(100)]))
    assert contrastive.log_scale["image_audio"].item() == pytest.approx(math.log(1 / 0.07))
    assert torch.autograd.grad(loss, contrastive.log_scale["image_text"])[0] != 0


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_pairs_are_aligned_by_row_where_modalities_are_missing(kind: str) -> None:
    rows = {"image": [0, 2, 3, 5, 6], "text": [1, 2, 5, 6], "audio": [0, 4]}
    fields = {
        name: Field(randn(len(each), 16, seed=i), torch.tensor(each)) for i, (name, each) in enumerate(rows.items())
    }
    contrastive = Contrastive(ContrastiveConfig(loss=kind), encoder())
    groups = torch.tensor([0, 1, 7, 3, 3, 3, 7])
    for parameter in contrastive.parameters():
        with torch.no_grad():
            parameter.fill_(1.0)
    terms = contrastive(Passes(encoder(), fields, [], groups))
    # Image and audio share row 0 alone: nothing to contrast with, but something to match.
    assert list(terms) == (["image_text"] if kind == "info_nce" else ["image_text", "image_audio"])
    held = {name: dict(zip(each, fields[name].x, strict=True)) for name, each in rows.items()}
    for pair, common in (("image_text", [2, 5, 6]), ("image_audio", [0])):
        if pair in terms:
            x, y = (torch.stack([held[name][row] for row in common]) for name in pair.split("_"))
            one = torch.tensor(1.0)
            expected = naive_loss(kind, x, y, one, one, [int(groups[row]) for row in common])
            torch.testing.assert_close(terms[pair].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "scale", "bias"),
    [
        (ContrastiveConfig(), 1 / 0.07, None),
        (ContrastiveConfig(temperature=0.2), 5, None),
        (ContrastiveConfig(loss="sigmoid"), 10, -10),
        (ContrastiveConfig(loss="sigmoid", temperature=0.2), 5, -10),
    ],
)
def test_each_pair_has_a_scale_of_its_own_from_the_temperature(
    config: ContrastiveConfig, scale: float, bias: float | None
) -> None:
    got = {name: value.item() for name, value in Contrastive(config, encoder()).named_parameters()}
    expected = {f"log_scale.{pair}": math.log(scale) for pair in PAIRS}
    if bias is not None:
        expected |= {f"bias.{pair}": bias for pair in PAIRS}
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss": "triplet"}, r"objectives\.contrastive\.loss=triplet: allowed are info_nce, sigmoid"),
        ({"tile": 0}, r"objectives\.contrastive\.tile=0: allowed is 1 or more"),
        ({"temperature": 0.0}, r"objectives\.contrastive\.temperature=0\.0: allowed is 0\.01 or more"),
        ({"temperature": math.nan}, r"objectives\.contrastive\.temperature=nan: allowed is 0\.01 or more"),
    ],
)
def test_settings_out_of_bounds_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**setting)


# On several ranks: against one process that has the whole batch, and knows of no rank, tile or missing modality


class Case(NamedTuple):
    kind: str
    tile: int
    presence: list[list[str]]  # by rank
    grouped: bool
    micro_batches: int  # above 0: cached accumulation


EVEN = [["ita"] * 4, ["ita"] * 4, ["ita"] * 4]
# Rank 0 has no audio and rank 2 no text with an image; of image and text there are 3, 5 and 0 rows.
UNEVEN = [["it", "t", "it", "i", "it"], ["ita", "a", "it", "ita", "it", "ita"], ["ta", "i", "ta"]]
# Image and text are one row on each of two ranks, image and audio one row of all, and nobody has text and audio.
SCARCE = [["it"], ["i", "it", "a"], ["a", "ia", "t"]]
CACHED = [["it", "ita", "t", "", "i", "it", "ta", "it"], ["a", "ita", "ita", "t", "it", "i", "ita", "ia"], ["ta"] * 8]
CASES = {
    f"{name}-{kind}-{tile}": Case(kind, tile, *given)
    for name, given in {
        "even": (EVEN, False, 0),
        "uneven": (UNEVEN, False, 0),
        "grouped": (UNEVEN, True, 0),
        "scarce": (SCARCE, False, 0),
        "cached": (CACHED, True, 4),
    }.items()
    for kind in ("info_nce", "sigmoid")
    for tile in ((2, 512) if name in ("even", "uneven") else (2,))
}
INPUTS = 6


class Tiny(nn.Module):
    """Two layers per modality with random noise between them, and the objective; one forward, as in pretraining."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        model = encoder()
        self.layers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(INPUTS, 10), nn.Tanh(), nn.Dropout(0.3), nn.Linear(10, 16))
                for name in ("image", "text", "audio")
            }
        )
        self.objective = Contrastive(ContrastiveConfig(loss=case.kind, tile=case.tile), model)
        self.double()
        with torch.no_grad():
            for i, parameter in enumerate(self.objective.parameters()):
                parameter.copy_(torch.tensor(0.7 + 0.3 * i))

    def embed(self, fields: Mapping[str, Field], seed: int) -> dict[str, Field]:
        torch.manual_seed(seed)
        return {name: field._replace(x=self.layers[name](field.x)) for name, field in fields.items()}

    def forward(self, fields: Mapping[str, Field], seed: int, groups: Tensor | None, cached: Any = None) -> Any:
        zero = torch.stack([0 * parameter.sum() for parameter in self.parameters()]).sum()
        embeddings = self.embed(fields, seed)
        if cached is None:
            terms = self.objective.terms(embeddings, groups)
            return sum(terms.values(), zero), terms
        inputs = {name: each.x for name, each in embeddings.items()}
        known = with_gradients(zero.detach(), cached[0], inputs)
        return zero + known + with_gradients(zero.detach(), cached[1], dict(self.objective.named_parameters()))


class Part(NamedTuple):
    """What one rank has, or one of its micro-batches."""

    fields: dict[str, Field]
    groups: Tensor | None
    size: int


def parts_of(case: Case, rank: int) -> list[Part]:
    presence = case.presence[rank]
    values = {
        name: randn(len(presence), INPUTS, seed=10 * rank + i, dtype=torch.float64)
        for i, name in enumerate(("image", "text", "audio"))
    }
    groups = torch.arange(len(presence)) % 3 - 1 if case.grouped else None
    size = len(presence) // max(1, case.micro_batches)
    assert size * max(1, case.micro_batches) == len(presence)
    parts = []
    for start in range(0, len(presence), size):
        rows = slice(start, start + size)
        fields = fields_of(presence[rows], {name: x[rows] for name, x in values.items()})
        parts.append(Part(fields, None if groups is None else groups[rows], size))
    return parts


class Result(NamedTuple):
    terms: dict[str, Tensor]
    gradients: Mapping[str, Tensor | None]


def expected_result(case: Case, world: int) -> Result:
    model = Tiny(case)
    samples: list[dict[str, Tensor]] = []
    groups: list[int] = []
    for rank in range(world):
        for number, part in enumerate(parts_of(case, rank)):
            held: list[dict[str, Tensor]] = [{} for _ in range(part.size)]
            for name, field in model.embed(part.fields, seed=number).items():
                for row, x in zip(field.rows.tolist(), field.x, strict=True):
                    held[row][name] = x
            samples += held
            groups += [-1] * part.size if part.groups is None else part.groups.tolist()
    terms = {}
    for pair in PAIRS:
        a, b = pair.split("_")
        common = [i for i, sample in enumerate(samples) if a in sample and b in sample]
        if len(common) >= (2 if case.kind == "info_nce" else 1):
            x, y = (torch.stack([samples[i][name] for i in common]) for name in (a, b))
            bias = model.objective.bias[pair][0] if case.kind == "sigmoid" else None
            chosen = [groups[i] for i in common]
            terms[pair] = naive_loss(case.kind, x, y, model.objective.log_scale[pair][0], bias, chosen)
    parameters = dict(model.named_parameters())
    zero = torch.stack([0 * parameter.sum() for parameter in parameters.values()]).sum()
    gradients = torch.autograd.grad(sum(terms.values(), zero), list(parameters.values()))
    return Result({name: term.detach() for name, term in terms.items()}, dict(zip(parameters, gradients, strict=True)))


def actual_result(case: Case, rank: int, world: int) -> Result:
    model = Tiny(case)
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    parts = parts_of(case, rank)
    if case.micro_batches:
        with torch.no_grad():
            embeddings = [model.embed(part.fields, seed=number) for number, part in enumerate(parts)]
        groups = None if parts[0].groups is None else [part.groups for part in parts if part.groups is not None]
        cached = embedding_gradients(model.objective, embeddings, [part.size for part in parts], groups)
        terms = cached.terms
        for number, (part, gradients) in enumerate(zip(parts, cached.embeddings, strict=True)):
            last = number == len(parts) - 1
            zeros = {name: torch.zeros_like(each) for name, each in cached.parameters.items()}
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                given = (gradients, cached.parameters if last else zeros)
                wrapped(part.fields, number, part.groups, given).backward()
    else:
        (part,) = parts
        with torch.no_grad():
            evaluated = model(part.fields, 0, part.groups)[1]
        total, terms = wrapped(part.fields, 0, part.groups)
        for name, term in terms.items():
            torch.testing.assert_close(evaluated[name], term.detach(), rtol=0, atol=0)
        total.backward()
    learnt = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result({name: term.detach() for name, term in terms.items()}, learnt)


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    results: dict[str, Any] = {name: actual_result(case, rank, world) for name, case in CASES.items()}

    for name in ("uneven-info_nce-2", "uneven-sigmoid-2"):
        (part,) = parts_of(CASES[name], rank)
        total, _ = Tiny(CASES[name])(part.fields, 0, None)
        if rank == 0:  # alone: a collective in backward would wait for the others, see the last test
            total.backward()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Result]]]:
    """World size -> results by rank; each is launched once."""

    @cache
    def launch(world: int) -> list[dict[str, Result]]:
        if world == 1:
            return [{name: actual_result(case, 0, 1) for name, case in CASES.items()}]
        folder = tmp_path_factory.mktemp(f"world{world}")
        spawn(run_rank, args=(world, str(folder)), nprocs=world)  # type: ignore[no-untyped-call]
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return launch


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_are_those_of_the_whole_batch_in_one_process(
    name: str, world: int, results: Callable[[int], list[dict[str, Result]]]
) -> None:
    expected = expected_result(CASES[name], world)
    for by_case in results(world):
        got = by_case[name]
        assert_same(got.terms, expected.terms)
        assert [parameter for parameter, gradient in got.gradients.items() if gradient is None] == []
        assert_same(got.gradients, expected.gradients)


def test_backward_needs_no_other_rank(results: Callable[[int], list[dict[str, Result]]]) -> None:
    """Collectives in backward would fall between those of data parallelism; here rank 0 alone goes backward."""
    assert len(results(2)) == 2
