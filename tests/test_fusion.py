from typing import Any

import pytest
import torch
from torch import Tensor

import eval.fusion
from eval.compare import paired_bootstrap
from eval.fusion import Fusion, FusionSplit, Part, concat, learn_weights, maximum, mean, relu_product, vote
from eval.linear import Split, linear_probe
from eval.metrics import bootstrap_interval

STRENGTHS = (0.01, 0.1)  # weaker ones take most of the time
SIZES = {"train": 240, "val": 150, "test": 300}
CLASSES = 3


def split(name: str, noise: dict[str, float], seed: int = 0, width: int = 5, **other: Any) -> FusionSplit:
    """Modalities that see the class in noise of their own; each in a place and scale of its own."""
    n = SIZES[name]
    generator = torch.Generator().manual_seed(10 * seed + list(SIZES).index(name))
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    parts = {}
    for i, (modality, level) in enumerate(noise.items()):
        x = centres[labels] + level * torch.randn(n, width, generator=generator)
        parts[modality] = Part(100.0**i * x + i, torch.arange(n))
    return FusionSplit(parts, labels, **other)


def splits(noise: dict[str, float], seed: int = 0) -> list[FusionSplit]:
    return [split(name, noise, seed) for name in SIZES]


def fuse(train: FusionSplit, val: FusionSplit, test: FusionSplit) -> Fusion:
    return eval.fusion.fuse(train, val, test, strengths=STRENGTHS)


def standardised(given: list[FusionSplit], name: str) -> list[Tensor]:
    train = given[0].parts[name].features.double()
    return [(s.parts[name].features.double() - train.mean(0)) / train.std(0, correction=0) for s in given]


def test_fusions_are_what_their_names_say() -> None:
    x, y, z = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[-1.0, -1.0]])
    assert concat([x, y]).tolist() == [[1, -2, 3, 4]]
    assert mean([x, y, z]).tolist() == [[1, pytest.approx(1 / 3)]]
    assert maximum([x, y, z]).tolist() == [[3, 4]]
    assert relu_product([x, y, z]).tolist() == [[3, 0, 0, 2, 0, 0]]  # x*y, x*z, y*z


def test_votes_are_counted_and_equal_ones_decided_by_probability() -> None:
    agree = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25], [0.0, 1.0, 0.0]])  # two for 0, though 1 is likelier
    tie = torch.tensor([[0.6, 0.0, 0.4], [0.0, 0.55, 0.45], [0.34, 0.33, 0.33]])  # 0 twice
    two = torch.tensor([[0.5, 0.05, 0.45], [0.05, 0.5, 0.45], [0.3, 0.4, 0.3]])
    probabilities = torch.stack([agree, tie, two], 1)
    assert vote(probabilities).tolist() == [0, 0, 1]
    assert probabilities.mean(0).argmax(1).tolist() != [0, 0, 1]
    # Of two voters that disagree the surer one is followed, not the class that is second for both.
    assert vote(torch.tensor([[[0.5, 0.05, 0.45]], [[0.04, 0.51, 0.45]]])).tolist() == [1]


def test_every_method_equals_a_probe_of_its_features() -> None:
    given = splits({"image": 1.2, "text": 1.8})
    result = fuse(*given)
    assert list(result.methods) == [
        *("image", "text", "concat", "mean", "max", "relu_product", "weighted", "probability_mean", "vote")
    ]
    x, y = (standardised(given, name) for name in ("image", "text"))
    labels = [s.labels for s in given]
    weights = result.methods["weighted"].chosen["weights"]
    expected = {
        "image": x,
        "text": y,
        "concat": [torch.cat(both, 1) for both in zip(x, y, strict=True)],
        "mean": [(a + b) / 2 for a, b in zip(x, y, strict=True)],
        "max": [torch.maximum(a, b) for a, b in zip(x, y, strict=True)],
        "relu_product": [(a * b).relu() for a, b in zip(x, y, strict=True)],
        "weighted": [weights["image"] * a + weights["text"] * b for a, b in zip(x, y, strict=True)],
    }
    probabilities = []
    for name, matrices in expected.items():
        probe = linear_probe(
            *(Split(m, labels_) for m, labels_ in zip(matrices, labels, strict=True)), strengths=STRENGTHS
        )
        fused = result.methods[name]
        assert torch.equal(fused.predicted, probe.predicted), name
        assert (fused.top1, fused.chosen["strength"]) == (probe.top1, probe.strength)
        if name in ("image", "text"):
            c = probe.classifier
            probabilities.append((((matrices[2] - c.mean) / c.std) @ c.weight.T + c.bias).softmax(1))
    likely = torch.stack(probabilities)
    assert torch.equal(result.methods["probability_mean"].predicted, likely.mean(0).argmax(1))
    assert torch.equal(result.methods["vote"].predicted, vote(likely))


def test_fusing_helps_where_modalities_err_apart_and_gains_are_paired_with_the_best_single() -> None:
    result = fuse(*splits({"text": 1.8, "image": 1.4}, seed=1))
    assert result.order == ["image", "text"]
    right = {name: (fused.predicted == result.labels).double() for name, fused in result.methods.items()}
    assert right["image"].mean() > right["text"].mean()
    for name, fused in result.methods.items():
        if name in ("image", "text"):
            assert fused.gain is None
        else:
            assert fused.gain == paired_bootstrap(right[name], right["image"], groups=torch.arange(300))
    assert (gain := result.methods["concat"].gain) is not None
    assert gain.verdict == "ahead"
    assert all(fused.interval is not None for fused in result.methods.values())


def test_weights_follow_the_better_modality() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    good = (labels * 2.0 - 1)[:, None] + 0.7 * torch.randn(200, 4, generator=generator)
    noise = torch.randn(200, 4, generator=generator)
    for parts, better in (((good, noise), 0), ((noise, good), 1), ((noise, good, noise.flip(0)), 1)):
        train, val = ([x[part] for x in parts] for part in (slice(0, 100), slice(100, 200)))
        weights = learn_weights(train, val, labels[:100], labels[100:])
        assert sum(weights) == pytest.approx(1)
        assert weights[better] > 0.5
    # Of equals the most even ones.
    assert learn_weights([good[:100]] * 2, [good[100:]] * 2, labels[:100], labels[100:]) == (0.5, 0.5)


def test_labels_of_test_choose_nothing() -> None:
    train, val, test = splits({"image": 1.5, "text": 1.6, "audio": 2.0})
    shuffled = test.labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    a, b = fuse(train, val, test), fuse(train, val, test._replace(labels=shuffled))
    assert a.order == b.order
    for first, second in ((a.methods, b.methods), *((a.missing[name], b.missing[name]) for name in a.missing)):
        assert all(torch.equal(first[name].predicted, second[name].predicted) for name in first)
        assert all(first[name].chosen == second[name].chosen for name in first)
    assert a.methods["concat"].top1 > b.methods["concat"].top1 + 0.2


def test_the_yardstick_is_the_best_single_on_validation_not_on_test() -> None:
    train, val, test = splits({"image": 1.4, "text": 2.4})
    useless = Part(torch.zeros(150, 5), torch.arange(150))
    result = fuse(train, val._replace(parts={**val.parts, "image": useless}), test)
    assert result.order == ["text", "image"]
    assert result.methods["image"].top1 > result.methods["text"].top1
    right = {name: (fused.predicted == result.labels).double() for name, fused in result.methods.items()}
    assert result.methods["vote"].gain == paired_bootstrap(right["vote"], right["text"], groups=torch.arange(300))


def test_a_missing_modality_is_its_training_mean_or_left_out() -> None:
    given = splits({"image": 1.0, "text": 1.6, "audio": 2.6})
    result = fuse(*given)
    train, val, test = given
    # The same, told by hand: the test split has the training mean of text.
    blank = train.parts["text"].features.double().mean(0).expand(300, -1)
    replaced = test._replace(parts={**test.parts, "text": Part(blank, torch.arange(300))})
    expected = fuse(train, val, replaced).methods
    found = result.missing["text"]
    assert "text" not in found
    for name in ("concat", "mean", "max", "relu_product", "weighted"):
        assert torch.equal(found[name].predicted, expected[name].predicted), name
        assert not torch.equal(found[name].predicted, result.methods[name].predicted), name
    without = [s._replace(parts={name: s.parts[name] for name in ("image", "audio")}) for s in given]
    two = fuse(*without).methods
    for name in ("image", "audio", "probability_mean", "vote"):
        assert torch.equal(found[name].predicted, two[name].predicted), name
    # Without the best one, the next best is what fusions are measured by.
    assert result.order == ["image", "text", "audio"]
    right = {name: (fused.predicted == result.labels).double() for name, fused in result.missing["image"].items()}
    gain = result.missing["image"]["concat"].gain
    assert gain == paired_bootstrap(right["concat"], right["text"], groups=torch.arange(300))
    # Of two, one remains, and decisions are its own.
    alone = fuse(*without).missing["image"]
    assert alone["vote"].gain == alone["probability_mean"].gain == (0.0, (0.0, 0.0), 0.0)


def test_only_rows_that_have_everything_take_part() -> None:
    given = splits({"image": 1.2, "text": 1.5})
    train, val, test = given
    keep = torch.arange(300) % 4 != 0
    fewer = {**test.parts, "text": Part(test.parts["text"].features[keep], torch.arange(300)[keep])}
    result = fuse(train, val, test._replace(parts=fewer))
    assert result.left_out == {"train": 0, "val": 0, "test": 75}
    assert torch.equal(result.rows, torch.arange(300)[keep])
    assert torch.equal(result.labels, test.labels[keep])
    everything = fuse(*given)
    for name, fused in result.methods.items():
        assert torch.equal(fused.predicted, everything.methods[name].predicted[keep]), name


def test_the_joint_pass_is_one_more_matrix() -> None:
    given = splits({"image": 1.5, "text": 2.0})
    joint = [
        Part(s.parts["image"].features + 0.01 * s.parts["text"].features, torch.arange(len(s.labels))) for s in given
    ]
    train, val, test = (s._replace(joint=part) for s, part in zip(given, joint, strict=True))
    test = test._replace(joint_without={"text": Part(test.parts["image"].features[5:], torch.arange(5, 300))})
    result = fuse(train, val, test)
    probe = linear_probe(
        *(Split(part.features, s.labels) for part, s in zip(joint, given, strict=True)), strengths=STRENGTHS
    )
    assert torch.equal(result.methods["joint"].predicted, probe.predicted[5:])
    assert result.left_out["test"] == 5
    own = probe.classifier.predict(test.parts["image"].features[5:])
    assert torch.equal(result.missing["text"]["joint"].predicted, own)
    assert "joint" not in result.missing["image"]
    assert result.skipped == {"joint without image": "no features of such a joint pass"}


def test_other_widths_skip_what_needs_one_and_say_so() -> None:
    given = splits({"image": 1.5, "text": 1.5})
    cut = [
        s._replace(parts={**s.parts, "text": Part(s.parts["text"].features[:, :3], s.parts["text"].rows)})
        for s in given
    ]
    result = fuse(*cut)
    assert list(result.methods) == ["image", "text", "concat", "probability_mean", "vote"]
    reason = "needs equal widths, got image 5, text 3"
    assert result.skipped == {
        **dict.fromkeys(("mean", "max", "relu_product", "weighted"), reason),
        "joint": "no features of a joint pass",
    }


def test_without_resamples_or_with_one_group_there_are_no_intervals() -> None:
    train, val, test = splits({"image": 1.2, "text": 2.0})
    drawn = fuse(train, val, test)
    for plain in (
        eval.fusion.fuse(train, val, test, strengths=STRENGTHS, samples=0),
        fuse(train, val, test._replace(groups=torch.zeros(300).long())),
    ):
        for name, fused in plain.methods.items():
            assert (fused.top1, fused.interval) == (drawn.methods[name].top1, None)
            assert (fused.gain is None) == (name in ("image", "text"))
            if fused.gain is not None:
                assert fused.gain.value == pytest.approx(fused.top1 - plain.methods["image"].top1)
                assert fused.gain.interval is None


def test_intervals_are_those_of_each_method_alone() -> None:
    train, val, test = splits({"image": 1.2, "text": 2.0})
    groups = torch.arange(300) // 3
    result = fuse(train, val, test._replace(groups=groups))
    for at_test in (result.methods, *result.missing.values()):
        for fused in at_test.values():
            right = (fused.predicted == result.labels).double()
            assert fused.interval == bootstrap_interval(right, groups=groups)


def test_fusion_refuses_splits_that_do_not_fit() -> None:
    train, val, test = splits({"image": 1.5, "text": 1.5})
    one = train._replace(parts={"image": train.parts["image"]})
    with pytest.raises(ValueError, match=r"at least two modalities, got \['image'\]"):
        fuse(one, val, test)
    with pytest.raises(
        ValueError, match=r"^val must have the modalities of train, \['image', 'text'\], got \['image'\]"
    ):
        fuse(train, val._replace(parts={"image": val.parts["image"]}), test)

    def changed(part: Part) -> FusionSplit:
        return test._replace(parts={**test.parts, "text": part})

    x, rows = test.parts["text"]
    for part, message in (
        (Part(x[:, :4], rows), r"^text must have one width in train, val and test, got \[5, 5, 4\]"),
        (Part(x[:5], rows), r"^text of test must be features \(n, D\) and rows \(n,\), got \(5, 5\) and \(300,\)"),
        (Part(x, rows + 1), r"^rows of text of test must ascend within 0..299, one per label"),
        (Part(x, rows.flip(0)), r"^rows of text of test must ascend"),
        (Part(x[:2], rows[[1, 1]]), r"^rows of text of test must ascend"),
        (Part(x[:0], rows[:0]), r"^test has no sample with all of image, text"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(train, val, changed(part))
    with pytest.raises(ValueError, match=r"^labels of test must be \(N,\), one per row, got \(300, 3\)"):
        fuse(train, val, test._replace(labels=torch.ones(300, 3, dtype=torch.bool)))
