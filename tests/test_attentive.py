"""Attentive probe: its attention against torch's, the grid against single probes, and what it learns."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.attentive import AttentivePool, TokenSplit, attentive_probe


def tokens(rows: int, seed: int, padded: bool = False) -> TokenSplit:
    """One of 6 tokens says the class and carries a mark; the mean of the tokens hardly tells."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    x = 2 * torch.randn(rows, 6, 8, generator=generator)
    place = torch.randint(4, (rows,), generator=generator)
    x[..., 7] = 0
    x[torch.arange(rows), place, 7] = 4.0
    x[torch.arange(rows), place, :3] = 3 * F.one_hot(y, 3).float()
    valid = None
    if padded:
        valid = torch.arange(6).expand(rows, 6) < torch.randint(4, 7, (rows, 1), generator=generator)
        x = x.masked_fill(~valid[:, :, None], math.nan)
    return TokenSplit(x * 10 + 3, torch.tensor([40, -7, 1000])[y], valid)


def test_pooling_is_multi_head_attention_with_one_query() -> None:
    torch.manual_seed(0)
    pool, x = AttentivePool(8, 3, heads=2), torch.randn(5, 6, 8)
    torch.nn.init.normal_(pool.query)
    valid = torch.arange(6) < torch.tensor([6, 4, 1, 2, 5])[:, None]
    # Torch's module projects the query, too: by nothing, here.
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": torch.cat([torch.eye(8), pool.key.weight, pool.value.weight]),
            "in_proj_bias": torch.cat([torch.zeros(16), pool.value.bias]),
            "out_proj.weight": torch.eye(8),
            "out_proj.bias": torch.zeros(8),
        }
    )
    expected, _ = attention(pool.query.flatten().expand(5, 1, 8), x, x, key_padding_mask=~valid)
    torch.testing.assert_close(pool(x, valid), pool.classify(expected[:, 0]), atol=1e-5, rtol=1e-5)


def test_a_grid_side_by_side_is_as_many_probes_and_the_best_on_val_is_chosen() -> None:
    train, val, test = tokens(100, 0), tokens(100, 1), tokens(150, 2)
    rates = [1e-4, 3e-3, 1e-2]
    few: dict[str, Any] = {"epochs": 8, "heads": 2, "batch_size": 50}
    alone = [attentive_probe(train, val, test, learning_rates=[rate], samples=0, **few) for rate in rates]
    side = attentive_probe(train, val, test, learning_rates=rates[::-1], samples=50, **few)
    best = max(result.val_top1 for result in alone)
    chosen = next(result for result in alone if result.val_top1 == best)  # of equals the lowest
    assert best > alone[0].val_top1
    assert side.chosen == chosen.chosen
    assert torch.equal(side.predicted, chosen.predicted)
    for ours, theirs in zip(side.classifier.parameters(), chosen.classifier.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert side.metrics["top1"].interval is not None

    shuffled = test._replace(y=test.y[torch.randperm(150, generator=torch.Generator().manual_seed(3))])
    again = attentive_probe(train, val, shuffled, learning_rates=rates, samples=0, **few)
    assert again.chosen == side.chosen
    assert torch.equal(again.predicted, side.predicted)
    assert again.top1 < side.top1


def test_training_is_adamw_with_a_cosine_on_shuffled_batches() -> None:
    train = tokens(50, 0)
    result = attentive_probe(train, train, train, learning_rates=[1e-2], epochs=3, heads=2, batch_size=20, samples=0)
    torch.manual_seed(0)
    pool, generator = AttentivePool(8, 3, heads=2), torch.Generator().manual_seed(0)
    x = (train.x - train.x.mean((0, 1))) / train.x.std((0, 1), correction=0)
    y = torch.tensor([[-7, 40, 1000].index(label) for label in train.y.tolist()])
    optimizer = torch.optim.AdamW(pool.parameters(), weight_decay=0.01)
    for step in range(9):
        if step % 3 == 0:
            order = torch.split(torch.randperm(50, generator=generator), 20)
        rows = order[step % 3]
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 9)) / 2
        gradients = torch.autograd.grad(F.cross_entropy(pool(x[rows], None), y[rows]), list(pool.parameters()))
        for parameter, gradient in zip(pool.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for ours, naive in zip(result.classifier.parameters(), pool.parameters(), strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_it_finds_the_token_that_tells(padded: bool) -> None:
    train, val, test = tokens(400, 0, padded), tokens(100, 1, padded), tokens(200, 2, padded)
    with torch.inference_mode():
        result = attentive_probe(train, val, test, learning_rates=[3e-3, 1e-2], epochs=15, heads=2, batch_size=64)
    assert result.top1 > 0.9
    assert set(result.predicted.tolist()) == {40, -7, 1000}
    assert result.top1 == (result.predicted == test.y).double().mean()


def test_scale_offset_and_batches_of_evaluation_do_not_matter_and_the_generator_is_left_alone() -> None:
    train, val, test = tokens(64, 0), tokens(32, 1), tokens(50, 2)
    state = torch.get_rng_state()
    plain = attentive_probe(train, val, test, epochs=3, samples=0)
    assert torch.equal(torch.get_rng_state(), state)
    moved = [split._replace(x=split.x * 1e-3 + 1) for split in (train, val, test)]
    other = attentive_probe(*moved, epochs=3, samples=0)
    assert other.chosen == plain.chosen
    assert (other.predicted == plain.predicted).double().mean() > 0.95


def test_a_rate_that_diverges_is_not_chosen() -> None:
    train, val, test = tokens(64, 0), tokens(32, 1), tokens(50, 2)
    settings: dict[str, Any] = {"epochs": 2, "weight_decay": 0.0, "samples": 0}
    result = attentive_probe(train, val, test, learning_rates=[1e-3, 1e30], **settings)
    assert result.chosen["learning_rate"] == 1e-3
    alone = attentive_probe(train, val, test, learning_rates=[1e-3], **settings)
    assert torch.equal(result.predicted, alone.predicted)
    with pytest.raises(ValueError, match="must have one that gives finite outputs"):
        attentive_probe(train, val, test, learning_rates=[1e30], **settings)


def test_bad_input_is_refused_by_name() -> None:
    good, padded = tokens(20, 0), tokens(20, 0, padded=True)
    nan = good._replace(x=good.x.index_fill(0, torch.tensor([3]), math.nan))
    for position, split, message in (
        (1, nan, "^val features must be finite, got NaN or infinity in 1 of 20 rows"),
        (0, padded._replace(valid=None), "^train features must be finite"),
        (2, good._replace(x=good.x[..., :4]), "^test must have the 8 features of train, got 4"),
        (2, TokenSplit(good.x[:0], good.y[:0]), r"^test must be x \(N, T, D\) .* got x \(0, 6, 8\)"),
        (0, good._replace(y=torch.full((20,), 4)), "^train must have at least two classes, got only class 4"),
        (1, good._replace(y=good.y.float()), "^val labels must be integers"),
        (1, good._replace(valid=torch.ones(20, 5, dtype=torch.bool)), r"^val valid must be \(20, 6\) bool"),
        (
            2,
            good._replace(valid=torch.zeros(20, 6, dtype=torch.bool)),
            "^test must have a valid token .* got 20 without",
        ),
    ):
        splits = [good, good, good]
        splits[position] = split
        with pytest.raises(ValueError, match=message):
            attentive_probe(*splits)
    with pytest.raises(ValueError, match=r"^heads must divide the width of tokens, 8, got 3"):
        attentive_probe(good, good, good, heads=3)
    with pytest.raises(ValueError, match=r"^epochs and batch_size must be at least 1, got 0 and 256"):
        attentive_probe(good, good, good, epochs=0)
    for rates in ([], [0.0], [math.nan]):
        with pytest.raises(ValueError, match=r"^learning_rates must be one or more positive finite numbers"):
            attentive_probe(good, good, good, learning_rates=rates)
