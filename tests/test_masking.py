from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.draws import fork, uniforms
from data.text import continues_word, train_tokenizer
from objectives.masking import MASKS, keep_tokens, mask_tokens, split_patches
from tests.samples import CAPTIONS

KINDS = MASKS["audio"]  # all there are
GRID = (6, 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds(n: int, seed: int = 0) -> Tensor:
    return fork(torch.arange(n), f"test {seed}")


def hidden_patches(n: int, grid: tuple[int, int], keep: float, kind: str, seed: int = 0) -> Tensor:
    """(n, rows, columns) bool."""
    split = split_patches(seeds(n, seed), grid, keep, kind)
    hidden = torch.zeros(n, grid[0] * grid[1], dtype=torch.bool).scatter(1, split.hidden, True)
    return hidden.view(n, *grid)


# Kept tokens


def test_tokens_are_kept_at_random_and_the_first_always() -> None:
    lengths = torch.tensor([9, 5, 3]).repeat(20_000)
    valid = torch.arange(9) < lengths[:, None]
    kept = keep_tokens(seeds(len(valid)), valid, 4)
    assert kept.shape == (60_000, 4)
    assert (kept.diff(dim=1) > 0).all()
    assert (kept[:, 0] == 0).all()
    assert (valid.gather(1, kept).sum(1) == lengths.clamp(max=4)).all()  # padding only where there is nothing else
    for first, length, share in ((0, 9, 3 / 8), (1, 5, 3 / 4)):
        times = kept[first::3].flatten().bincount(minlength=9) / 20_000
        torch.testing.assert_close(times[1:length], torch.full((length - 1,), share), atol=0.015, rtol=0)
        assert not times[length:].any()


def test_what_is_kept_of_a_text_does_not_hang_on_its_padding() -> None:
    lengths = torch.tensor([9, 5, 3, 7])
    kept = keep_tokens(seeds(4), torch.arange(9) < lengths[:, None], 4)
    for row, length in enumerate(lengths.tolist()):
        alone = keep_tokens(seeds(4)[row : row + 1], torch.ones(1, length, dtype=torch.bool), min(4, length))
        assert torch.equal(alone[0], kept[row, : alone.shape[1]])


# Patches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "keep", "kept"),
    [
        ((6, 10), 0.25, 15),
        ((6, 10), 0.45, 27),
        ((1, 7), 0.5, 4),
        ((7, 1), 0.01, 1),
        ((3, 5), 1.0, 15),
        ((1, 1), 0.2, 1),
    ],
)
def test_every_kind_hides_exactly_as_many_as_asked_for(
    kind: str, grid: tuple[int, int], keep: float, kept: int
) -> None:
    number = grid[0] * grid[1]
    visible, hidden = split_patches(seeds(300), grid, keep, kind)
    assert visible.shape == (300, kept)
    assert hidden.shape == (300, number - kept)
    assert torch.equal(torch.cat([visible, hidden], dim=1).sort(dim=1).values, torch.arange(number).expand(300, -1))
    assert split_patches(seeds(0), grid, keep, kind).visible.shape == (0, kept)


def test_random_masks_are_one_draw_per_patch() -> None:
    order = uniforms(seeds(5), 0, 60).argsort(dim=1)
    assert torch.equal(torch.cat(split_patches(seeds(5), GRID, 0.25), dim=1), order)


@pytest.mark.parametrize("kind", KINDS)
def test_a_samples_mask_depends_on_its_seed_alone(kind: str) -> None:
    together = split_patches(seeds(20), GRID, 0.4, kind)
    for row in (0, 7, 19):
        alone = split_patches(seeds(20)[row : row + 1], GRID, 0.4, kind)
        assert torch.equal(alone.visible[0], together.visible[row])
        assert torch.equal(alone.hidden[0], together.hidden[row])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_seeds_differ_and_a_seed_repeats(kind: str) -> None:
    one, again, other = (hidden_patches(50, GRID, 0.5, kind, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(mask.flatten().tolist()) for mask in one}) > 12


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_a_block_is_a_rectangle_but_for_a_part_of_one_side(keep: float) -> None:
    hidden = hidden_patches(1000, (9, 14), keep, "block")
    heights, widths = [], []
    for mask in hidden:
        rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        heights.append(len(box))
        widths.append(box.shape[1])
        sides = [(box[0], box[1:]), (box[-1], box[:-1]), (box[:, 0], box[:, 1:]), (box[:, -1], box[:, :-1])]
        # All of the box but one side of it is hidden, and of that side a part without gaps.
        assert any(
            rest.all() and int((side[1:] != side[:-1]).sum()) <= 2 and bool(side.any()) for side, rest in sides
        ), mask.int()
    assert hidden.any(dim=0).all()  # they lie everywhere
    ratios = torch.tensor(heights) / torch.tensor(widths)
    assert ratios.min() < 0.6
    assert ratios.max() > 0.8


def test_blocks_have_all_shapes_and_places_equally_often() -> None:
    hidden = hidden_patches(100_000, (20, 20), 0.95, "block")  # 20 patches
    heights, widths = (hidden.any(dim=axis).sum(dim=1) for axis in (2, 1))
    assert (heights > widths).float().mean().item() == pytest.approx(0.45, abs=0.07)  # the rest is square
    assert (widths > heights).float().mean().item() == pytest.approx(0.45, abs=0.07)
    assert (widths.max().item(), heights.max().item()) == pytest.approx((9, 9), abs=1)  # sqrt(20 * 10 / 3) is 8.2
    often = hidden.float().mean(dim=0)
    assert torch.allclose(often, often.flip(0), atol=0.015)
    assert torch.allclose(often, often.flip(1), atol=0.015)
    assert torch.allclose(often, often.T, atol=0.015)
    inner = often[6:14, 6:14]
    assert (inner.max() - inner.min()) / inner.mean() < 0.3


def test_a_block_that_takes_all_rows_lies_anywhere_along_them() -> None:
    hidden = hidden_patches(20_000, (2, 20), 0.5, "block")
    often = hidden[:, 0].float().mean(dim=0)
    # Its beginning is uniform in 0 .. 10: the first column is hidden up to a half, the second up to one and a half.
    expected = [0.05 + 0.1 * min(i, 19 - i) for i in range(20)]
    assert often.tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("kind", "axis"), [("time", 0), ("frequency", 1)])
def test_whole_lines_are_hidden(kind: str, axis: int) -> None:
    hidden = hidden_patches(20_000, GRID, 0.45, kind)  # 33 of 60
    each = hidden.sum(dim=1 + axis)  # in each column, or row
    size = GRID[axis]
    full, part = divmod(33, size)
    expected = [0] * (GRID[1 - axis] - full - 1) + [part] + [size] * full
    assert torch.equal(each.sort(dim=1).values, torch.tensor(expected).expand(20_000, -1))
    assert torch.allclose(hidden.float().mean(dim=0), torch.tensor(0.55), atol=0.02)  # all lines, and all parts of one
    neighbours = (each[:, :-1] == size) & (each[:, 1:] == size)
    lines = GRID[1 - axis]
    assert neighbours.float().mean().item() == pytest.approx(full * (full - 1) / (lines * (lines - 1)), abs=0.02)


def test_columns_and_rows_are_hidden_together() -> None:
    hidden = hidden_patches(5000, GRID, 0.45, "time_frequency")
    rows, columns = hidden.all(dim=2), hidden.all(dim=1)
    covered = rows[:, :, None] | columns[:, None, :]
    left = (hidden & ~covered).sum(dim=(1, 2))
    assert left.max() < max(GRID)  # of the last line alone
    assert (rows.any(dim=1) & columns.any(dim=1)).float().mean() > 0.8
    assert torch.allclose(hidden.float().mean(dim=0), torch.tensor(0.55), atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_the_hidden_are_a_random_part_of_them(kind: str) -> None:
    _, hidden = split_patches(seeds(20_000), GRID, 0.5, kind)
    place = torch.stack([hidden // GRID[1], hidden % GRID[1]], dim=2).float()  # (n, 30, 2)
    distance = (place - place.mean(dim=1, keepdim=True)).norm(dim=2)
    by_order = distance.mean(dim=0)
    assert (by_order - by_order.mean()).abs().max() < 0.1
    assert (place.mean(dim=0) - place.mean(dim=(0, 1))).abs().max() < 0.15


# Words. Ids 0 to 4 are special, of the others the odd ones go on with a word.

ORDINARY = torch.arange(40) > 4
CONTINUES = ORDINARY & (torch.arange(40) % 2 == 1)
MASK = 4


def captions(n: int = 4000, length: int = 60) -> tuple[Tensor, Tensor]:
    """Ids with special tokens among them, and the number of each token's word."""
    ids = torch.randint(5, 40, (n, length), generator=generator(7))
    ids[torch.rand(n, length, generator=generator(8)) < 0.05] = 3
    ids[:, 0] = 0
    words = torch.zeros_like(ids)
    number = 0
    for i, row in enumerate(ids.tolist()):
        for j, token in enumerate(row):
            if not (token > 4 and token % 2 == 1 and row[j - 1] > 4):
                number += 1
            words[i, j] = number
    return ids, words


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_a_words_tokens_are_chosen_together_at_berts_rates(rate: float) -> None:
    ids, words = captions()
    assert ORDINARY[ids].sum() > 200_000
    corrupted, chosen = mask_tokens(ids, seeds(len(ids)), ORDINARY, MASK, rate, CONTINUES)
    assert not chosen[~ORDINARY[ids]].any()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[ORDINARY[ids]].float().mean().item() == pytest.approx(rate, abs=0.005)

    # Each word has as many chosen tokens as it has tokens, or none.
    flat, size = words.flatten(), int(words.max()) + 1
    lengths, hits = (torch.zeros(size).index_add(0, flat, each.flatten().float()) for each in (ORDINARY[ids], chosen))
    assert (lengths > 2).sum() > 10_000
    assert ((hits == 0) | (hits == lengths)).all()
    assert (hits > 0)[lengths > 0].float().mean().item() == pytest.approx(rate, abs=0.005)

    became_mask = (corrupted == MASK) & chosen
    stayed = (corrupted == ids) & chosen
    count = chosen.sum()
    assert (became_mask.sum() / count).item() == pytest.approx(0.8, abs=0.01)
    assert (stayed.sum() / count).item() == pytest.approx(0.1 + 0.1 / 35, abs=0.01)
    assert ORDINARY[corrupted[chosen & ~became_mask]].all()
    masks = torch.zeros(size).index_add(0, flat, became_mask.flatten().float())
    assert ((masks == 0) | (masks == lengths)).all()  # what is left of a word would tell the rest


def test_single_tokens_are_chosen_where_words_are_not_asked_for() -> None:
    ids, words = captions(500)
    _, chosen = mask_tokens(ids, seeds(len(ids)), ORDINARY, MASK, 0.5)
    same = words[:, 1:] == words[:, :-1]
    agree = (chosen[:, 1:] == chosen[:, :-1])[same & ORDINARY[ids[:, :-1]]]
    assert agree.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_text_may_begin_with_the_rest_of_a_word() -> None:
    ids = torch.tensor([[7, 9, 6]]).expand(2000, 3)
    _, chosen = mask_tokens(ids, seeds(len(ids)), ORDINARY, MASK, 0.5, CONTINUES)
    assert torch.equal(chosen[:, 0], chosen[:, 1])
    assert chosen.float().mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.05)


UNKNOWN = "[UNK]"
SPECIAL = [UNKNOWN, "[MASK]", "[PAD]", "[CLS]"]


def fast(model: Any, pre_tokenizer: Any, decoder: Any) -> PreTrainedTokenizerBase:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    named = dict(zip(("unk_token", "mask_token", "pad_token", "cls_token"), SPECIAL, strict=True))
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    return made


WORDPIECE = ["play", "##ing", "##s", ".", "'", "##'", "s", "##9", "9", "日", "one", "two"]
UNIGRAM = ["▁play", "ing", "s", "▁s", ".", "▁.", "9", "▁one", "▁two", "▁"]


def wordpiece() -> PreTrainedTokenizerBase:
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDPIECE)}
    return fast(
        models.WordPiece(vocabulary, unk_token=UNKNOWN), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    )


def unigram() -> PreTrainedTokenizerBase:
    pieces = [(token, -1.0) for token in SPECIAL + UNIGRAM]
    return fast(models.Unigram(pieces, 0), pre_tokenizers.Metaspace(), decoders.Metaspace())


def byte_level() -> PreTrainedTokenizerBase:
    return train_tokenizer([*CAPTIONS, "größe, größer", "日本語 don't stop."] * 9, 400)


@pytest.mark.parametrize(
    ("tokenizer", "text", "words"),
    [
        (wordpiece, "playing plays. s 9", ["play ##ing", "play ##s", ".", "s", "9"]),
        (wordpiece, "one 日 play9's", ["one", "日", "play ##9", "'", "s"]),
        (unigram, "playing plays. s.", ["▁play ing", "▁play s", ".", "▁s", "."]),
        (byte_level, "größere Größe", ["ĠgrÃ¶ÃŁer e", "Ġ G r Ã¶ÃŁe"]),
        (byte_level, "a cat's, ä", ["Ġa", "Ġcat", "' s", ",", "Ġ Ã ¤"]),
    ],
)
def test_a_tokenizer_tells_where_its_words_begin(tokenizer: Any, text: str, words: list[str]) -> None:
    made = tokenizer()
    ids = made(text, add_special_tokens=False)["input_ids"]
    goes_on = continues_word(made)
    assert goes_on.shape == (len(made),)
    assert not goes_on[made.all_special_ids].any()
    found: list[str] = []
    for token, inside in zip(made.convert_ids_to_tokens(ids), goes_on[ids].tolist(), strict=True):
        if inside:
            found[-1] += f" {token}"
        else:
            found.append(token)
    assert found == words


def test_a_tokenizer_that_marks_where_words_end_is_refused() -> None:
    """As that of CLIP: whether a token begins a word is up to the one before it."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"onetw", "o</w>", "e</w>"])}
    bpe = models.BPE(vocabulary, [], end_of_word_suffix="</w>", unk_token=UNKNOWN)
    with pytest.raises(ValueError, match=r"whole_words=true: .* don't tell where words begin \('one two' .* 1 of"):
        continues_word(fast(bpe, pre_tokenizers.Whitespace(), decoders.BPEDecoder()))
