"""Zero-shot and retrieval against naive loops, closed forms and simulation."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.errors import UserError
from eval.metrics import bootstrap_interval
from eval.retrieval import (
    Side,
    chance_median_rank,
    chance_recall,
    every_direction,
    listed_positives,
    pair_positives,
    retrieval,
    retrieval_chance,
    retrieve,
)
from eval.zeroshot import class_embeddings, read_prompts, score_zero_shot, unit_rows, zero_shot


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
    with pytest.raises(ValueError, match=r"^positives must be of 4 queries and 4 items, got 3 and 4"):
        retrieval(x, x, labels[:3], labels, (1,))
    with pytest.raises(ValueError, match=r"^query_labels must be .* got \(4,\) and \(4, 1\)"):
        retrieval(x, x, labels, labels[:, None], (1,))
    with pytest.raises(ValueError, match=r"^gallery must have finite, non-zero rows, got 4 of 4"):
        retrieval(x, x * 0, labels, labels, (1,))
    with pytest.raises(ValueError, match=r"^chunk must be at least 1, got 0"):
        retrieval(x, x, labels, labels, (1,), 0)


# Ranks by pairs and by lists


def naive_ranks(queries: Tensor, gallery: Tensor, positives: list[set[int]]) -> list[int]:
    ranks = []
    for query, wanted in zip(queries, positives, strict=True):
        # To 1e-12, as documented: equal rows of other lengths have cosines that differ in their last bits.
        nearness = [round(cosine(query, item), 12) for item in gallery]
        ranking = sorted(range(len(gallery)), key=lambda item: (-nearness[item], item))
        ranks.append(1 + min(ranking.index(item) for item in wanted))
    return ranks


def tied(rows: int, kinds: int, seed: int) -> Tensor:
    """Few directions, each at several lengths: most cosines are equal to another."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(kinds, 4, generator=generator, dtype=torch.float64)
    lengths = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.1
    return directions[torch.randint(kinds, (rows,), generator=generator)] * lengths


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_with_shared_content_equal_naive_loops(seed: int, chunk: int) -> None:
    n = 40
    queries, gallery = tied(n, 6, seed), tied(n, 9, seed + 10)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(kinds, (n,), generator=generator) * 10**15 for kinds in (25, 30))
    pairs = {(int(x), int(y)) for x, y in zip(a, b, strict=True)}
    wanted = [{j for j in range(n) if (int(a[i]), int(b[j])) in pairs} for i in range(n)]
    assert {len(items) for items in wanted} > {1, 2}
    positives = pair_positives(a, b)
    found = retrieve(queries, gallery, positives, (1, 5, 10, n), chunk)
    ranks = naive_ranks(queries, gallery, wanted)
    assert found.ranks.tolist() == ranks
    assert found.recall == {k: sum(rank <= k for rank in ranks) / n for k in (1, 5, 10, n)}
    assert found.median_rank == statistics.median(ranks)
    assert positives.counts().tolist() == [len(items) for items in wanted]
    assert 1 < found.median_rank < n
    listed = listed_positives(wanted, n)
    assert torch.equal(retrieve(queries, gallery, listed, (1,), chunk).ranks, found.ranks)


def test_a_caption_of_another_pair_is_right_only_where_it_cannot_be_told_apart() -> None:
    # Picture 7 stands in two pairs; caption 5 in two. What picture 8 shares with picture 7 is caption 5, not caption 4.
    positives = pair_positives(torch.tensor([7, 7, 8]), torch.tensor([4, 5, 5]))
    assert positives.mask(0, 3).int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert positives.mask(2, 3).int().tolist() == [[0, 1, 1]]
    positives = pair_positives(torch.arange(4), torch.arange(4))
    assert torch.equal(positives.mask(0, 4), torch.eye(4, dtype=torch.bool))


def test_chance_by_pairs_equals_simulation() -> None:
    a, b = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5, 5]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 7, 7])
    positives = pair_positives(a, b)
    mask, trials = positives.mask(0, 10), 20_000
    order = torch.rand(trials, 10, generator=torch.Generator().manual_seed(0)).argsort(1)
    ranks = 1 + mask[:, order].int().argmax(2)  # (10, trials)
    found = chance_recall(positives, (1, 4, 10))
    assert found == pytest.approx({k: (ranks <= k).double().mean().item() for k in (1, 4, 10)}, abs=0.005)
    assert chance_median_rank(positives) == int(ranks.flatten().median())
    assert chance_median_rank(pair_positives(torch.arange(8), torch.arange(8))) == 4


def test_positives_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^positives of query 1 must be one or more of 0..3, got \[2, 4\]"):
        listed_positives([[0], [4, 2]], 4)
    with pytest.raises(ValueError, match=r"^positives of query 0 must be one or more of 0..3, got \[\]"):
        listed_positives([[], [1]], 4)
    with pytest.raises(ValueError, match="at least one query, got none"):
        listed_positives([], 4)
    with pytest.raises(ValueError, match=r"must have one shape \(n,\) with n >= 1, got \(3,\) and \(2,\)"):
        pair_positives(torch.arange(3), torch.arange(2))


def test_every_direction_by_pairs_takes_samples_that_have_both() -> None:
    rows = {"image": [0, 1, 2, 4, 6], "text": [1, 2, 3, 4, 5, 6], "audio": [0]}
    sides = {
        name: Side(normal(len(own), 4, seed=i), torch.tensor(own), torch.tensor(own) // 2, torch.zeros(len(own)).long())
        for i, (name, own) in enumerate(rows.items())
    }
    found = every_direction(sides, "pairs", (1, 3, 5))
    assert list(found) == [
        "image_to_text",
        "image_to_audio",
        "text_to_image",
        "audio_to_image",
    ]  # no row has the others
    shown = found["text_to_image"]
    assert (shown.rows.tolist(), shown.content.tolist()) == ([1, 2, 4, 6], [0, 1, 2, 3])
    assert (shown.gallery, shown.left_out) == (4, 2)
    x, y = sides["text"].embeddings[[0, 1, 3, 5]], sides["image"].embeddings[[1, 2, 3, 4]]
    ranks = naive_ranks(x, y, [{0}, {1}, {2}, {3}])
    assert shown.ranks.tolist() == ranks
    assert shown.chance == {"r1": 0.25, "r3": 0.75, "median_rank": 2}
    assert {name: metric.value for name, metric in shown.metrics.items()} == {
        "r1": ranks.count(1) / 4,
        "r3": sum(rank <= 3 for rank in ranks) / 4,
        "median_rank": statistics.median(ranks),
    }
    assert shown.metrics["r3"].interval is not None
    assert found["audio_to_image"].metrics == {"r1": (1.0, None), "median_rank": (1.0, None)}


def test_every_direction_by_labels_takes_all_samples_that_have_an_answer() -> None:
    sides = {
        "image": Side(normal(3, 4), torch.tensor([0, 1, 2]), torch.arange(3), torch.tensor([5, 6, 7])),
        "text": Side(normal(4, 4, seed=1), torch.arange(4, 8), torch.arange(4), torch.tensor([7, 5, 5, 9])),
    }
    found = every_direction(sides, "labels", (1,))["image_to_text"]
    assert (found.rows.tolist(), found.gallery, found.left_out) == ([0, 2], 4, 1)
    wanted: list[set[int]] = [{1, 2}, {0}]
    assert found.ranks.tolist() == naive_ranks(sides["image"].embeddings[[0, 2]], sides["text"].embeddings, wanted)
    broken = {**sides, "text": sides["text"]._replace(embeddings=torch.zeros(4, 4))}
    with pytest.raises(ValueError, match=r"^image_to_text: gallery must have finite, non-zero rows, got 4 of 4"):
        every_direction(broken, "labels", (1,))


# Zero-shot scores


def test_zero_shot_scores_equal_naive_loops() -> None:
    embeddings, labels = tied(60, 12, 0), torch.randint(8, (60,), generator=torch.Generator().manual_seed(1))
    classes = tied(8, 5, 2)  # at least three of the eight can't be told from another
    ranks = naive_ranks(embeddings, classes, [{int(label)} for label in labels])
    found = score_zero_shot(embeddings, classes, labels)
    assert found.metrics["top1"].value == pytest.approx(sum(r == 1 for r in ranks) / 60)
    assert found.metrics["top5"].value == pytest.approx(sum(r <= 5 for r in ranks) / 60)
    assert found.correct.tolist() == [float(r == 1) for r in ranks]
    assert torch.equal(found.predicted, zero_shot(embeddings, classes))
    pairs = list(zip(labels.tolist(), found.predicted.tolist(), strict=True))
    assert found.confusion.tolist() == [[pairs.count((i, j)) for j in range(8)] for i in range(8)]
    assert 0 < found.metrics["top1"].value < found.metrics["top5"].value < 1
    content = torch.arange(60) // 10
    wider = score_zero_shot(embeddings, classes, labels, content=content).metrics["top1"].interval
    assert wider == bootstrap_interval(found.correct, groups=content)


def test_classes_that_cannot_be_told_apart_are_not_all_right() -> None:
    found = score_zero_shot(torch.ones(20, 3), torch.ones(20, 3), torch.arange(20))
    assert [found.metrics[name].value for name in ("top1", "top5")] == pytest.approx([1 / 20, 5 / 20])


def test_zero_shot_scores_of_few_classes_and_bad_labels() -> None:
    x = torch.eye(5)
    assert score_zero_shot(x, x, torch.arange(5, dtype=torch.uint8)).metrics.keys() >= {"top1", "f1"}
    assert "top5" not in score_zero_shot(x, x, torch.arange(5)).metrics
    with pytest.raises(ValueError, match=r"^labels must be in 0..4, got \[-1, 5\]"):
        score_zero_shot(x, x, torch.tensor([5, 0, 1, -1, 2]))
    for wrong in (torch.arange(4), torch.arange(5.0), torch.eye(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^labels must be \(5,\) integers, got"):
            score_zero_shot(x, x, wrong)


# Prompt files


def test_prompt_files_of_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# from the paper\n\na photo of a {}.\n  the sound of {}  \nein schönes {}\n", encoding="utf-8")
    assert read_prompts(path) == (["a photo of a {}.", "the sound of {}", "ein schönes {}"], None)
    path = tmp_path / "prompts.JSON"
    path.write_text('["a {}", "# {}"]')
    assert read_prompts(path) == (["a {}", "# {}"], None)
    path.write_text('{"classes": ["cat", "dog"], "templates": ["a {}"]}')
    assert read_prompts(path) == (["a {}"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b"[", "not JSON"),
        ("p.txt", b"a \xff {}", "not text in UTF-8"),
        ("p.txt", b"# nothing\n", "templates: must hold at least one template, got none"),
        ("p.txt", b"a {}\na photo", "templates: 'a photo' must hold {} once"),
        ("p.json", b'["{} and {}"]', "templates: '{} and {}' must hold {} once"),
        ("p.json", b'{"classes": ["a", "b"]}', "must be a list of templates, or"),
        ("p.json", b'"a {}"', "must be a list of templates, or"),
        (
            "p.json",
            b'{"templates": ["a {}"], "class": ["a"]}',
            "unknown key 'class'; allowed are templates and classes",
        ),
        ("p.json", b'{"templates": "a {}"}', "templates must be a list of non-empty strings, got"),
        ("p.json", b'{"templates": ["a {}"], "classes": ["a", 3]}', "classes must be a list of non-empty strings, got"),
        ("p.json", b'{"templates": ["a {}"], "classes": ["a"]}', "classes must hold at least two names, got"),
        (
            "p.json",
            b'{"templates": ["a {}"], "classes": ["a", "b", "a"]}',
            "classes must differ, got 'a' more than once",
        ),
    ],
)
def test_prompt_files_that_say_nothing_clear(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
