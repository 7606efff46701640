"""Zero-shot and retrieval against naive loops, closed forms and simulation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eval.retrieval import retrieval, retrieval_chance
from eval.zeroshot import class_embeddings, unit_rows, zero_shot


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors, exactly rounded up to its last operations."""
    u, v = a.tolist(), b.tolist()
    dot = math.fsum(p * q for p, q in zip(u, v, strict=True))
    return dot / math.sqrt(math.fsum(p * p for p in u)) / math.sqrt(math.fsum(q * q for q in v))


def naive_retrieval(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, k: int) -> float:
    hits = 0
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        ranking = sorted(range(len(gallery)), key=lambda item: (-cosine(query, gallery[item]), item))
        hits += any(int(gallery_labels[item]) == label for item in ranking[:k])
    return hits / len(queries)


def test_class_embeddings_give_each_prompt_one_vote() -> None:
    # A long prompt along one axis must not drown a short one along the other.
    prompts = [torch.tensor([[100.0, 0.0], [0.0, 0.01]]), torch.tensor([[0.0, -3.0]])]
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(class_embeddings(prompts), expected)


def test_class_embeddings_have_unit_length() -> None:
    classes = class_embeddings([normal(count, 16, seed=count) for count in (1, 3, 80)])
    assert classes.shape == (3, 16)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_zero_shot_is_nearest_by_cosine_whatever_the_lengths() -> None:
    embeddings = normal(50, 8) * torch.logspace(-3, 3, 50)[:, None]
    classes = normal(6, 8, seed=1) * torch.logspace(-3, 3, 6)[:, None]
    expected = [max(range(6), key=lambda c, e=e: cosine(e, classes[c])) for e in embeddings]  # type: ignore[misc]
    assert zero_shot(embeddings, classes).tolist() == expected


def test_unit_rows_keep_direction_at_any_magnitude() -> None:
    # The squares of the first and last are outside float32.
    rows = torch.tensor([[3.0, 4.0]]) * torch.tensor([[1e-30], [1.0], [1e30]])
    expected = torch.tensor([[0.6, 0.8]], dtype=torch.float64).expand(3, 2)
    torch.testing.assert_close(unit_rows(rows, "rows"), expected)


def test_zero_shot_refuses_what_has_no_cosine() -> None:
    good = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"^embeddings must have finite, non-zero rows, got 2 of 3"):
        zero_shot(torch.tensor([[0.0, 0.0], [1.0, math.nan], [1.0, 0.0]]), good)
    with pytest.raises(ValueError, match=r"^classes must have finite, non-zero rows, got 1 of 1"):
        zero_shot(good, torch.tensor([[math.inf, 0.0]]))
    with pytest.raises(ValueError, match=r"^embeddings and classes must have one width D, got 2 and 5"):
        zero_shot(good, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"^classes must be \(N, D\) with N, D >= 1, got \(2,\)"):
        zero_shot(good, torch.ones(2))


def test_class_embeddings_refuse_what_has_no_mean_direction() -> None:
    with pytest.raises(ValueError, match="at least one class, got none"):
        class_embeddings([])
    with pytest.raises(ValueError, match=r"^prompts of class 1 must be \(N, D\) with N, D >= 1, got \(0, 4\)"):
        class_embeddings([torch.ones(2, 4), torch.ones(0, 4)])
    with pytest.raises(ValueError, match=r"^prompts must have one width D in all classes, got \[4, 5\]"):
        class_embeddings([torch.ones(2, 4), torch.ones(2, 5)])
    with pytest.raises(ValueError, match=r"^mean prompts of the classes .* got 1 of 2"):
        class_embeddings([torch.ones(2, 4), torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_retrieval_equals_naive_loops(chunk: int) -> None:
    queries = normal(40, 5) * torch.logspace(-2, 2, 40)[:, None]
    gallery = normal(60, 5, seed=1) * torch.logspace(2, -2, 60)[:, None]
    generator = torch.Generator().manual_seed(2)
    query_labels = torch.randint(12, (40,), generator=generator)
    gallery_labels = torch.cat([torch.arange(12), torch.randint(12, (48,), generator=generator)])
    ks = (1, 2, 5, 10, 60)
    found = retrieval(queries, gallery, query_labels, gallery_labels, ks, chunk)
    expected = {k: naive_retrieval(queries, gallery, query_labels, gallery_labels, k) for k in ks}
    assert found == pytest.approx(expected, abs=1e-12)
    assert list(found) == list(ks)
    assert 0 < found[1] < found[5] < found[10] < found[60] == 1


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_retrieval_ranks_equal_cosines_by_index(chunk: int) -> None:
    # Every direction stands in the gallery eight times, at lengths that round differently, under labels that
    # differ: only the order of indices says which copy comes first.
    directions = normal(6, 33)
    lengths = torch.rand(48, 1, generator=torch.Generator().manual_seed(1)).double() + 0.1
    gallery = directions.repeat(8, 1).double() * lengths
    gallery_labels = torch.arange(8).repeat_interleave(6)
    for label in range(8):
        found = retrieval(directions, gallery, torch.full((6,), label), gallery_labels, tuple(range(1, 9)), chunk)
        assert found == {k: float(k > label) for k in range(1, 9)}


def test_retrieval_chance_equals_simulation() -> None:
    gallery_labels = torch.tensor([0] * 1 + [1] * 4 + [2] * 15)
    query_labels = torch.tensor([0, 0, 0, 1, 1, 2])
    ks = (1, 3, 6, 20)
    trials = 20_000
    order = torch.rand(trials, 20, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = gallery_labels[order]
    expected = {
        k: sum((shuffled[:, :k] == label).any(1).double().mean().item() for label in query_labels) / 6 for k in ks
    }
    found = retrieval_chance(query_labels, gallery_labels, ks)
    assert found == pytest.approx(expected, abs=0.006)
    assert found[1] == pytest.approx((3 * 1 + 2 * 4 + 15) / 6 / 20)
    assert found[20] == 1


def test_retrieval_chance_is_exact_for_large_galleries() -> None:
    # C(100000, 500) has over a thousand digits, far beyond float.
    labels = torch.arange(100_000)
    assert retrieval_chance(labels[:1], labels, (500,))[500] == pytest.approx(0.005, rel=1e-12)


def test_absent_labels_and_impossible_ks_are_refused() -> None:
    labels = torch.tensor([3, 4])
    x = torch.eye(2)
    calls: list[Callable[[Tensor, tuple[int, ...]], dict[int, float]]] = [
        lambda query_labels, ks: retrieval(x, x, query_labels, labels, ks),
        lambda query_labels, ks: retrieval_chance(query_labels, labels, ks),
    ]
    for refused in calls:
        with pytest.raises(ValueError, match=r"query label must occur in gallery_labels, got absent \[8\]"):
            refused(torch.tensor([8, 3]), (1,))
        for ks in ((1, 3), (0,), ()):
            with pytest.raises(ValueError, match=r"^ks must be one or more of 1..2, got \["):
                refused(labels, ks)


def test_retrieval_refuses_mismatched_arguments() -> None:
    x, labels = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"^queries and gallery must have one width D, got 4 and 3"):
        retrieval(x, torch.ones(4, 3), labels, labels, (1,))
    with pytest.raises(ValueError, match=r"^query_labels must be \(4,\), got \(3,\)"):
        retrieval(x, x, labels[:3], labels, (1,))
    with pytest.raises(ValueError, match=r"^gallery_labels must be \(4,\), got \(4, 1\)"):
        retrieval(x, x, labels, labels[:, None], (1,))
    with pytest.raises(ValueError, match=r"^gallery must have finite, non-zero rows, got 4 of 4"):
        retrieval(x, x * 0, labels, labels, (1,))
    with pytest.raises(ValueError, match=r"^chunk must be at least 1, got 0"):
        retrieval(x, x, labels, labels, (1,), 0)
