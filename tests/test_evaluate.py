import copy
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes
from transformers import PreTrainedTokenizerBase

import eval.encoders
import eval.fusion
import eval.retrieval
import eval.run
import eval.tasks
from data.batch import Field
from data.shards import write_shards
from data.source import SampleError, Source
from data.transforms import make_field
from eval.__main__ import main
from eval.encoders import Pretrained
from eval.features import Features, content_ids, sweep
from eval.fusion import FusionSplit
from eval.joint import joint_features
from eval.linear import Split
from eval.report import HEADLINES, Results, read_results, table, write_results
from eval.ridge import ridge_probe
from eval.run import Evaluation
from eval.run import evaluate as evaluate_scored
from eval.splits import hold_out, label_ids
from eval.tasks import EvalConfig, EvaluationError, _drawn, on_device
from eval.tokens import token_splits
from pretrain.model.encoder import Encoder
from tests.samples import free_port
from tests.tiny import (
    CAPTIONS,
    CLASSES,
    COUNTS,
    RATE,
    VIEWS,
    embeddings_of,
    extract,
    open_shards,
    picture,
    samples,
    tiny_encoder,
    tiny_tokenizer,
    tone,
    write_split,
)

CPU = torch.device("cpu")


def evaluate(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Source], config: EvalConfig
) -> Evaluation:
    return evaluate_scored(Pretrained("tiny", encoder, tokenizer), splits, config, CPU, 0)


CONFIG = EvalConfig("label", classes=list(CLASSES), templates=list(CAPTIONS), batch_size=7)


class Tiny(NamedTuple):
    folder: Path
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Source]
    results: Results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random encoder in a checkpoint's folder, shards, and its results. Only read by tests."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny_tokenizer()
    encoder = tiny_encoder(tokenizer)
    (folder / "last" / "encoder").mkdir(parents=True)
    encoder.save(folder / "last" / "encoder")
    tokenizer.save_pretrained(folder / "last" / "encoder" / "tokenizer")
    splits = {split: open_shards(write_split(folder, split)) for split in COUNTS}
    return Tiny(folder, encoder, tokenizer, splits, evaluate(encoder, tokenizer, splits, CONFIG).results)


def mixed(folder: Path, members: Sequence[str]) -> Source:
    """One sample per entry, with the members whose initials it names: i, t, a."""
    random = np.random.default_rng(0)
    samples: list[dict[str, bytes | str]] = []
    for number, initials in enumerate(members):
        png, flac = io.BytesIO(), io.BytesIO()
        picture(number % 3, random).save(png, format="png")
        soundfile.write(flac, tone(number % 3, random), RATE, format="flac")
        everything = {"i": ("png", png.getvalue()), "t": ("txt", b"a low tone"), "a": ("flac", flac.getvalue())}
        samples.append({"__key__": f"{number}", "json": b"{}", **dict(everything[initial] for initial in initials)})
    return open_shards(write_shards(samples, folder / "mixed", max_samples=3))


def by_hand(tiny: Tiny, source: Source, modality: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and embeddings of one sample after another."""
    view = VIEWS.used[modality]
    rows = []
    for shard, sample in source.places():
        values = source.values(shard, sample, {modality: view}, training=False)
        if modality in values:
            field = make_field(view, [values[modality]], tiny.tokenizer)
            field = view.on_device()(field)
            with torch.inference_mode():
                rows.append(tiny.encoder(modality, field))
    features, embeddings = zip(*rows, strict=True)
    return torch.cat(features), torch.cat(embeddings)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 0), (100, 1)])
def test_each_sample_comes_once_in_the_order_of_the_shards(tiny: Tiny, batch_size: int, workers: int) -> None:
    source = tiny.splits["train"]
    labels = list(range(100, 100 + COUNTS["train"]))
    found = extract([tiny.encoder], tiny.tokenizer, source, labels, CPU, batch_size, workers)[0]
    assert list(found) == ["image", "text", "audio"]
    for modality, features in found.items():
        assert features.labels.tolist() == labels
        expected, embeddings = by_hand(tiny, source, modality)
        assert (features.features - expected).abs().max() < 1e-5
        assert (embeddings_of(features) - embeddings).abs().max() < 1e-5
        assert features.features.dtype == embeddings_of(features).dtype == features.raw.dtype == torch.float32
        assert [len(part) for part in features if part is not None] == [COUNTS["train"]] * 6
        assert not features.features.requires_grad


def test_labels_stay_with_samples_where_modalities_are_missing(tiny: Tiny, tmp_path: Path) -> None:
    members = ["ita", "t", "ia", "a", "ti", "", "a", "ita"]
    source = mixed(tmp_path, members)
    found = extract([tiny.encoder], tiny.tokenizer, source, list(range(len(members))), CPU, 3, 0)[0]
    for modality, features in found.items():
        assert features.labels.tolist() == [i for i, has in enumerate(members) if modality[0] in has]
        assert (features.features - by_hand(tiny, source, modality)[0]).abs().max() < 1e-5


def test_a_modality_that_no_sample_has_is_absent(tiny: Tiny, tmp_path: Path) -> None:
    source = mixed(tmp_path, ["i", "it", "i"])
    assert list(extract([tiny.encoder], tiny.tokenizer, source, [0, 1, 2], CPU, 2, 0)[0]) == ["image", "text"]


def test_evaluation_sees_no_augmentation(tiny: Tiny) -> None:
    def features() -> dict[str, Features]:
        return extract([tiny.encoder], tiny.tokenizer, tiny.splits["val"], [0] * COUNTS["val"], CPU, 4, 0)[0]

    a, b = features(), features()
    for name, features_of in a.items():
        for x, y in zip(features_of, b[name], strict=True):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y)


def test_raw_inputs_are_what_they_say(tiny: Tiny) -> None:
    source = tiny.splits["val"]
    found = extract([tiny.encoder], tiny.tokenizer, source, [0] * len(source), CPU, 5, 0)[0]
    assert {name: tuple(part.raw.shape) for name, part in found.items()} == {
        "image": (COUNTS["val"], 3 * 16 * 16),
        "text": (COUNTS["val"], tiny.encoder.vocabulary.size),
        "audio": (COUNTS["val"], 32 * 12),
    }
    captions = list(source.captions(100))
    for row, caption in zip(found["text"].raw, captions, strict=True):
        expected = torch.bincount(torch.tensor(tiny.tokenizer(caption)["input_ids"]), minlength=len(row))
        assert torch.equal(row, expected.float())  # padding is not counted


def test_content_is_equal_for_equal_inputs_only() -> None:
    x = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3], [3, 2, 1]], dtype=torch.uint8)
    a, b, c, d = content_ids(Field(x, torch.arange(4))).tolist()
    assert a == c
    assert len({a, b, d}) == 3
    assert all(0 <= value < 2**63 for value in (a, b, d))
    assert content_ids(Field(x[[0]], torch.arange(1))).tolist() == [a]  # the same in another batch


def test_content_of_equal_captions_is_equal_in_batches_of_other_lengths(tiny: Tiny, tmp_path: Path) -> None:
    captions = ["low", "one low tone, played on an organ", "high", "low"]
    samples: list[dict[str, bytes | str]] = [
        {"__key__": f"{i}", "txt": caption.encode()} for i, caption in enumerate(captions)
    ]
    source = open_shards(write_shards(samples, tmp_path / "captions", max_samples=10))
    content = extract([tiny.encoder], tiny.tokenizer, source, [0] * 4, CPU, 2, 0)[0]["text"].content
    assert content[0] == content[3]
    assert len(set(content.tolist())) == 3


def test_content_follows_the_samples(tiny: Tiny) -> None:
    source = tiny.splits["train"]
    found = extract([tiny.encoder], tiny.tokenizer, source, [0] * len(source), CPU, len(source), 0)[0]
    # Every caption comes several times; pictures and sounds are all different.
    captions = list(source.captions(100))
    assert len(set(found["text"].content.tolist())) == len(set(captions)) == 9
    assert len(set(zip(captions, found["text"].content.tolist(), strict=True))) == 9
    assert len(set(found["image"].content.tolist())) == len(set(found["audio"].content.tolist())) == len(source)


@pytest.mark.parametrize(
    ("labels", "classes", "expected", "names"),
    [
        ({"train": [2, 0], "test": [1]}, [], {"train": [2, 0], "test": [1]}, []),
        ({"train": [7, -3], "test": [900]}, [], {"train": [7, -3], "test": [900]}, []),
        ({"train": [2, 0], "test": [1]}, ["a", "b", "c"], {"train": [2, 0], "test": [1]}, ["a", "b", "c"]),
        ({"train": ["b", "a"], "test": ["c"]}, [], {"train": [1, 0], "test": [2]}, ["a", "b", "c"]),
        ({"train": ["b", "a"], "test": ["c"]}, ["c", "b", "a"], {"train": [1, 2], "test": [0]}, ["c", "b", "a"]),
        ({"train": [["b"], []], "test": [["a", "b"]]}, [], {"train": [[0, 1], [0, 0]], "test": [[1, 1]]}, ["a", "b"]),
        ({"train": [[2], [0]], "test": [[]]}, [], {"train": [[0, 0, 1], [1, 0, 0]], "test": [[0, 0, 0]]}, []),
    ],
)
def test_labels_become_integers(
    labels: dict[str, list[Any]], classes: list[str], expected: dict[str, Any], names: list[str]
) -> None:
    found, found_names = label_ids(labels, classes)
    assert {split: each.int().tolist() for split, each in found.items()} == expected
    assert found_names == names
    assert {each.dtype for each in found.values()} == {
        torch.bool if isinstance(labels["train"][0], list) else torch.int64
    }


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([0, 3], ["a", "b", "c"], r"\[3\] are outside the 3 names of eval.classes"),
        ([-1], ["a"], r"\[-1\] are outside"),
        ([0, "a"], [], "whole numbers, all names or all lists of them, got int, str"),
        ([0.5], [], "got float"),
        ([None], [], "got NoneType"),
        ([["a"], "a"], [], "got list, str"),
        ([[-1]], [], "numbers of 0 or more"),
        ([True, False], [], "got bool"),
        (["a", "d"], ["a", "b"], r"\['d'\] are not among eval.classes: a, b"),
    ],
)
def test_labels_that_fit_nothing_are_refused(labels: list[Any], classes: list[str], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        label_ids({"train": ["a"] if isinstance(labels[0], str) else [], "test": labels}, classes)


# A validation split cut from the training one


def test_a_tenth_of_every_class_is_held_out_and_groups_stay_together() -> None:
    labels = torch.arange(400) % 4
    held = hold_out(labels)
    assert labels[held].bincount().tolist() == [10, 10, 10, 10]
    assert torch.equal(held, hold_out(labels))
    groups = [f"speaker {number // 8}" for number in range(400)]
    held = hold_out(labels, groups)
    assert 32 <= int(held.sum()) <= 48
    assert len({groups[row] for row in held.nonzero()[:, 0].tolist()}) * 8 == int(held.sum())
    several = hold_out(labels[:, None] == torch.arange(4))
    assert int(several.sum()) == 40
    with pytest.raises(EvaluationError, match=r"from 4 groups: name one with --val"):
        hold_out(labels, ["a", "b", "c", "d"] * 100)


def test_without_a_validation_split_test_decides_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: tiny.splits[name] for name in ("train", "test")}
    found = evaluate(tiny.encoder, tiny.tokenizer, splits, CONFIG).results
    assert found.keys() == tiny.results.keys()
    labels = Source.labels

    def shuffled(self: Source, field: str) -> list[Any]:
        values = labels(self, field)
        return values[7:] + values[:7] if self is splits["test"] else values

    monkeypatch.setattr(Source, "labels", shuffled)
    again = evaluate(tiny.encoder, tiny.tokenizer, splits, CONFIG).results
    assert again["linear/image"]["metrics"] != found["linear/image"]["metrics"]
    for task, result in found.items():
        assert again[task].get("chosen") == result.get("chosen"), task


# Results


def test_every_task_has_its_numbers_and_baselines(tiny: Tiny) -> None:
    names = ("image", "text", "audio")
    pairs = [(a, b) for a in names for b in names if a != b]
    expected = {
        *(f"{task}/{name}" for task in ("linear", "knn", "fewshot", "labelfree") for name in names),
        *(f"zeroshot/{name}" for name in ("image", "audio")),
        *(f"retrieval/{a}_to_{b}" for a, b in pairs),
        *("labelfree/image_text", "labelfree/image_audio", "labelfree/text_audio"),
    }
    assert expected == {task for task in tiny.results if not task.startswith("fusion/")}
    methods = {"concat", "mean", "max", "weighted", "relu_product", "probability_mean", "vote", "joint"}
    ways = {*methods, *(f"{name}_alone" for name in names)}
    assert {f"fusion/{way}" for way in ways} | {
        f"fusion/{way}_without_{missing}" for way in ways for missing in names if way != f"{missing}_alone"
    } == {task for task in tiny.results if task.startswith("fusion/")}
    for task, result in tiny.results.items():
        metrics, baselines = result["metrics"], result["baselines"]
        kind = task.partition("/")[0]
        for name, metric in metrics.items():
            if metric["interval"] is not None:
                low, high = metric["interval"]
                assert low <= metric["value"] <= high, (task, name)
        for of_baseline in baselines.values():
            assert of_baseline.keys() <= metrics.keys()
        if kind == "retrieval":
            assert metrics.keys() == {"r1", "r5", "r10", "median_rank"}
            assert baselines.keys() == {"chance", "random_init"}
            assert metrics["r1"]["value"] <= metrics["r5"]["value"] <= metrics["r10"]["value"] <= 1
            assert baselines["chance"]["r1"] == pytest.approx(1 / 3)
        elif kind in ("linear", "knn", "zeroshot"):
            assert metrics.keys() >= {"top1", "mean_per_class", "precision", "recall", "f1"}
            assert baselines["chance"]["top1"] == pytest.approx(1 / 3)
            assert 0 <= baselines["random_init"]["top1"] <= 1
            assert result["counts"]["distinct_inputs"] == (9 if task.endswith("text") else COUNTS["test"])
            for guess in (baselines["chance"], baselines["majority"]):
                assert guess["mean_per_class"] == guess["recall"] == pytest.approx(1 / 3)
        if kind in ("linear", "knn"):
            assert baselines["majority"]["top1"] == pytest.approx(1 / 3)
            assert result["chosen"].keys() == {"strength" if kind == "linear" else "k", "val_top1"}
            assert 0 <= baselines["raw"]["top1"] <= 1
    assert tiny.results["fewshot/image"]["metrics"].keys() >= {"top1_1shot", "spread_25shot"}
    assert "gain" in tiny.results["fusion/concat"]["metrics"]
    assert "gain" not in tiny.results["fusion/image_alone"]["metrics"]


def test_fusions_stand_beside_those_of_random_weights_and_of_the_inputs(tiny: Tiny) -> None:
    for task, result in tiny.results.items():
        if not task.startswith("fusion/"):
            continue
        assert result["baselines"]["random_init"].keys() == result["metrics"].keys(), task
        assert result["baselines"].keys() >= {"chance", "majority"}
        # Inputs have no joint pass, and no width in common.
        ways = ("concat", "probability_mean", "vote", "image_alone", "text_alone", "audio_alone")
        assert ("raw" in result["baselines"]) == task.removeprefix("fusion/").startswith(ways), task
    for name in ("image", "text", "audio"):  # all samples have everything: the probes are those of the linear task
        assert (
            tiny.results[f"fusion/{name}_alone"]["baselines"]["raw"]["top1"]
            == tiny.results[f"linear/{name}"]["baselines"]["raw"]["top1"]
        )


def test_separable_inputs_are_separated(tiny: Tiny) -> None:
    # Brightness, pitch and the class's own name: a probe of the input itself has to find them.
    for modality in ("image", "text", "audio"):
        assert tiny.results[f"linear/{modality}"]["baselines"]["raw"]["top1"] == 1.0


def test_the_random_encoder_is_scored_as_itself(tiny: Tiny) -> None:
    random = Pretrained("tiny", tiny.encoder, tiny.tokenizer).random()
    again = evaluate(random.encoder, tiny.tokenizer, tiny.splits, CONFIG).results
    for task, result in again.items():
        if "random_init" in result["baselines"]:
            own = {name: metric["value"] for name, metric in result["metrics"].items()}
            assert result["baselines"]["random_init"] == own, task
            assert tiny.results[task]["baselines"]["random_init"] == own, task


def test_results_are_numbers_that_json_has(tiny: Tiny) -> None:
    assert json.loads(json.dumps(tiny.results, allow_nan=False)) == tiny.results


def test_what_cannot_be_done_is_said(tiny: Tiny) -> None:
    found = evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig("name", ["linear", "zeroshot"]))
    assert {task.partition("/")[0] for task in found.results} == {"linear"}
    assert found.skipped == {"zeroshot": "it needs class names, and an encoder that embeds text"}


def test_without_labels_there_is_retrieval_by_pairs(tiny: Tiny) -> None:
    found = evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig())
    assert {task.partition("/")[0] for task in found.results} == {"retrieval", "labelfree"}
    assert found.skipped == dict.fromkeys(("linear", "knn", "fewshot", "zeroshot", "fusion"), "there are no labels")
    chance = found.results["retrieval/image_to_audio"]["baselines"]["chance"]
    assert chance["r1"] == pytest.approx(1 / COUNTS["test"])


def test_a_label_that_samples_lack_is_named(tiny: Tiny) -> None:
    with pytest.raises(SampleError, match=r"train-000, no 'species'.*label, name"):
        evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig("species"))


def test_of_several_layers_validation_chooses(tiny: Tiny) -> None:
    scored = Pretrained("tiny", tiny.encoder, tiny.tokenizer)
    layers, poolings = (0, -1), ("cls", "mean")
    config = EvalConfig("label", ["linear"])
    found = evaluate_scored(scored, tiny.splits, config, CPU, 0, layers=layers, poolings=poolings).results
    labels = {name: source.labels("label") for name, source in tiny.splits.items()}
    swept = {
        name: sweep([scored], source, labels[name], None, CPU, 99, 0, layers, poolings)[0]
        for name, source in tiny.splits.items()
    }
    for modality in ("image", "text", "audio"):
        scores = {}
        for key in swept["train"]:
            train, val = (swept[split][key][modality] for split in ("train", "val"))
            scores[key] = ridge_probe(Split(train.features, train.labels), Split(val.features, val.labels)).top1
        chosen = found[f"linear/{modality}"]["chosen"]
        assert scores[chosen["layer"], chosen["pooling"]] == max(scores.values())


def test_the_joint_pass_is_that_of_the_encoder(tiny: Tiny, tmp_path: Path) -> None:
    source = mixed(tmp_path, ["ita", "it", "ita", "ta", "ita"])
    names = ["image", "text", "audio"]
    other = tiny_encoder(tiny.tokenizer, seed=1)
    sets = [names, ["image", "audio"]]
    (whole, without), others = joint_features([tiny.encoder, other], tiny.tokenizer, source, sets, CPU, 2, 0)
    for mine, alone in zip(others, joint_features([other], tiny.tokenizer, source, sets, CPU, 2, 0)[0], strict=True):
        assert torch.equal(mine.features, alone.features)
    assert whole.rows.tolist() == without.rows.tolist() == [0, 2, 4]
    width = tiny.encoder.config.width
    for number, row in enumerate([0, 2, 4]):
        shard, sample = list(source.places())[row]
        values = source.values(shard, sample, VIEWS.used, training=False)
        fields = {}
        for name, view in VIEWS.used.items():
            fields[name] = view.on_device()(make_field(view, [values[name]], tiny.tokenizer))
        for part_of, found in ((names, whole), (["image", "audio"], without)):
            with torch.inference_mode():
                states = tiny.encoder.trunk({name: tiny.encoder.tokens(name, fields[name]) for name in part_of})
                pooled = {name: tiny.encoder.pool(name, each)[0] for name, each in states.items()}
            for place, name in enumerate(names):
                own = found.features[number, place * width : (place + 1) * width]
                expected = pooled.get(name, torch.zeros(width))
                assert (own - expected).abs().max() < 1e-5


def test_an_attentive_probe_reads_the_tokens_of_the_encoder(tiny: Tiny, tmp_path: Path) -> None:
    source = mixed(tmp_path, ["ita", "t", "ia", "a", "ti"])
    scored, labels = Pretrained("tiny", tiny.encoder, tiny.tokenizer), torch.arange(5) * 10
    found = token_splits(scored, source, labels, CPU, 2, 0)
    for name, members in (("image", [0, 2, 4]), ("text", [0, 1, 4]), ("audio", [0, 2, 3])):
        split, rows = found[name]
        assert rows.tolist() == members
        assert split.y.tolist() == [10 * row for row in members]
        for number, row in enumerate(members):
            view = VIEWS.used[name]
            shard, sample = list(source.places())[row]
            values = source.values(shard, sample, {name: view}, training=False)
            field = view.on_device()(make_field(view, [values[name]], tiny.tokenizer))
            with torch.inference_mode():
                states = tiny.encoder.encode(name, field)[0, {"image": 1, "text": 0, "audio": 2}[name] :]
            own = split.x[number] if split.valid is None else split.x[number][split.valid[number]]
            assert (own.float() - states).abs().max() < 1e-2

    splits = {name: tiny.splits[name] for name in ("train", "test")}
    results = evaluate(tiny.encoder, tiny.tokenizer, splits, EvalConfig("label", ["attentive"])).results
    assert results.keys() == {"attentive/image", "attentive/text", "attentive/audio"}
    assert results["attentive/text"]["metrics"]["top1"]["value"] > 0.5
    assert results["attentive/text"]["baselines"].keys() == {"random_init", "chance", "majority"}


def test_the_table_has_a_line_for_what_matters(tiny: Tiny) -> None:
    lines = table(tiny.results).splitlines()
    header = re.split(r"  +", lines[0].strip())
    assert header == ["task", "metric", "score", "95 % interval", "random encoder", "raw input", "chance"]
    got = [tuple(line.split()[:3]) for line in lines[2:]]
    assert got == [
        (task, metric, f"{100 * result['metrics'][metric]['value']:.1f}")
        for task, result in tiny.results.items()
        for metric in HEADLINES.get(task.partition("/")[0], ())
        if metric in result["metrics"] and "_without_" not in task
    ]
    image = next(line for line in lines if line.startswith("linear/image"))
    result = tiny.results["linear/image"]
    baselines = (result["baselines"][name]["top1"] for name in ("random_init", "raw", "chance"))
    numbers = [*result["metrics"]["top1"]["interval"], *baselines]
    assert image.replace("..", " ").split()[3:] == [f"{100 * number:.1f}" for number in numbers]


def test_results_are_written_whole_with_their_schema(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, {}, {})
    write_results(path, tiny.results, {"checkpoint": "step-00000001"})
    document = json.loads(path.read_text())
    assert document == {"schema": 2, "about": {"checkpoint": "step-00000001"}, "results": tiny.results}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


# The command line


def arguments(tiny: Tiny, **changes: str) -> list[str]:
    """The command line for the tiny splits."""
    paths = {split: str(tiny.folder / f"{split}-*.tar") for split in COUNTS} | changes
    splits = (part for name in COUNTS for part in (f"--{name}", paths[name]))
    return ["run", str(tiny.folder / "last"), *splits, "--label", "label"]


def test_the_command_line_gives_the_same_results_and_a_report(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    names = ["--classes", *CLASSES, "--templates", *CAPTIONS]
    assert main([*arguments(tiny), *names, "--out", str(out)]) == 0
    document = json.loads((out / "results.json").read_text())
    assert document["schema"] == 2
    assert {name: split["samples"] for name, split in document["about"]["splits"].items()} == COUNTS
    assert document["results"].keys() == tiny.results.keys()
    for task, result in tiny.results.items():
        for name, metric in result["metrics"].items():
            assert document["results"][task]["metrics"][name]["value"] == pytest.approx(
                metric["value"], rel=1e-4, abs=1e-6
            )
    printed = capsys.readouterr().out
    assert f"report      {out / 'report.html'}" in printed
    predictions = load_file(out / "predictions.safetensors")
    for task in ("linear/image", "retrieval/image_to_text", "fusion/concat", "zeroshot/audio"):
        correct = predictions[f"{task}.correct"]
        first = "r1" if task.startswith("retrieval") else "top1"
        assert correct.mean().item() == pytest.approx(document["results"][task]["metrics"][first]["value"])
        assert len(predictions[f"{task}.rows"]) == len(predictions[f"{task}.content"]) == len(correct)

    for name in ("report.html", "report.md"):
        assert "linear" in (out / name).read_text()
        (out / name).unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()

    other = tmp_path / "random"
    again = arguments(tiny)
    again[1] = f"random:{again[1]}"
    assert main([*again, "--tasks", "linear,labelfree", "--out", str(other)]) == 0
    capsys.readouterr()
    assert main(["compare", str(out), str(other)]) == 0
    compared = capsys.readouterr().out
    assert "linear/image" in compared
    assert "knn/image: only in scores" in compared


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_command_line_names_a_missing_shard(tiny: Tiny, capsys: pytest.CaptureFixture[str], split: str) -> None:
    missing = str(tiny.folder / f"missing-{split}.tar")
    assert main(arguments(tiny, **{split: missing})) == 2
    captured = capsys.readouterr()
    assert missing in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--label", "species"], "no 'species'"),
        (["--classes", "a", "b"], "outside the 2 names"),
        (["--templates", "a tone"], r"must hold \{\} once"),
        (["--tasks", "linear,knnn"], "eval.tasks: got knnn, allowed are linear, knn,"),
        (["--poolings", "cls", "--layers", "99"], "99"),
        (["--workers", "-1"], "--workers -1: 0 or more"),
        (["--classes", "a", "b", "b"], "eval.classes: names must differ"),
        (["--classes", "a", " ", "b"], "eval.classes: names must .* not be empty"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_its_settings(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], extra: list[str], words: str
) -> None:
    assert main([*arguments(tiny), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(words, error)


def test_the_command_line_names_what_it_cannot_score(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(tiny)
    assert main([command[0], str(tiny.folder / "none"), *command[2:]]) == 2
    assert str(tiny.folder / "none") in capsys.readouterr().err
    assert main([*command[:-2], "--tasks", "linear"]) == 2
    assert "--tasks linear needs --label" in capsys.readouterr().err
    assert main(["report", str(tiny.folder)]) == 2
    assert "no results.json" in capsys.readouterr().err


def test_rare_classes_stay_in_train() -> None:
    labels = torch.cat([torch.arange(200) % 4, torch.arange(100, 120)])
    assert not hold_out(labels)[200:].any()
    groups = [number // 5 for number in range(220)]
    held = hold_out(labels, groups)
    assert held.any()
    assert set(labels.tolist()) == set(labels[~held].tolist())
    assert not {groups[row] for row in held.nonzero()[:, 0].tolist()} & {
        groups[row] for row in (~held).nonzero()[:, 0].tolist()
    }


@pytest.mark.parametrize(
    ("labels", "words"),
    [([[[1]], [[2]]], "lists within lists"), ([[10**9], [3]], "below 100000"), ([2**70, 1], "64 bits")],
)
def test_labels_that_no_tensor_holds_are_refused(labels: list[Any], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        label_ids({"train": labels, "test": labels}, [])


def test_a_test_split_that_was_trained_on_is_refused_or_counted(tiny: Tiny) -> None:
    config = EvalConfig("label", ["linear"])
    with pytest.raises(EvaluationError, match="train split holds the same shards as the test split"):
        evaluate(tiny.encoder, tiny.tokenizer, {**tiny.splits, "train": tiny.splits["test"]}, config)
    some = Source(tiny.splits["test"].shards[:1] + tiny.splits["train"].shards, "train")
    results = evaluate(tiny.encoder, tiny.tokenizer, {**tiny.splits, "train": some}, config).results
    known = tiny.splits["test"].shards[0].samples
    assert results["linear/image"]["counts"]["samples_whose_input_train_has"] == known
    assert "samples_whose_input_train_has" not in tiny.results["linear/image"]["counts"]


def test_several_layers_need_something_to_choose_by(tiny: Tiny) -> None:
    scored = Pretrained("tiny", tiny.encoder, tiny.tokenizer)
    with pytest.raises(EvaluationError, match="need labels to choose by"):
        evaluate_scored(scored, tiny.splits, EvalConfig(), CPU, 0, layers=(0, -1), poolings=("mean",))


def test_label_free_measures_draw_their_rows() -> None:
    drawn = _drawn(20_000)
    assert len(drawn) == 5000
    assert torch.equal(drawn, _drawn(20_000))
    assert 9_000 < drawn.float().mean() < 11_000
    assert torch.equal(_drawn(7), torch.arange(7))


def results_of(entry: Any) -> str:
    return json.dumps({"schema": 2, "about": {}, "results": {"linear/image": entry}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "no JSON object"),
        ('{"schema": 2}', "no about"),
        ("{", "damaged"),
        ('{"schema": 1}', "schema 1; this version reads 2"),
        (results_of([]), "linear/image is not laid out"),
        (results_of({}), "linear/image is not laid out"),
        (results_of({"metrics": {"top1": 0.5}}), "linear/image is not laid out"),
        (results_of({"metrics": {"top1": {"value": "0.5"}}}), "linear/image is not laid out"),
        (results_of({"metrics": {"top1": {"value": 0.5, "interval": [1]}}}), "linear/image is not laid out"),
        (results_of({"metrics": {}, "baselines": {"raw": 1}}), "linear/image is not laid out"),
        (results_of({"metrics": {"top1": {"value": float("nan")}}}), "NaN is no number"),
    ],
)
def test_a_damaged_folder_of_results_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "page.json").write_text('{"schema": 1, "left_out": []}')
    assert main(["report", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert read_results(tmp_path / "results.json", {"encoder": "another"}) is None


def test_a_page_of_another_schema_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 2, "about": {}, "results": {}}))
    (tmp_path / "page.json").write_text('{"schema": 99, "left_out": []}')
    assert main(["report", str(tmp_path)]) == 2
    assert "page.json: schema 99; this version reads 1" in capsys.readouterr().err
    (tmp_path / "page.json").write_text('{"schema": 1, "left_out": []}')
    assert main(["report", str(tmp_path)]) == 0


# Data that can't be scored


def altered(folder: Path, split: str, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> str:
    """The shards of a split with ``change`` (number, members) of each sample."""
    made = [change(number, sample) for number, sample in enumerate(samples(split, COUNTS[split]))]
    return str(write_shards(made, folder / f"altered-{split}", max_samples=99)[0])


def labelled(label: Callable[[int], Any]) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    return lambda number, sample: {**sample, "json": json.dumps({"label": label(number)}).encode()}


@pytest.mark.parametrize(
    ("split", "change", "tasks", "words"),
    [
        ("train", labelled(lambda _: 1), "linear", "linear: train must have at least two classes, got only class 1"),
        ("train", labelled(lambda _: 1), "fusion", "fusion: train must have at least two classes, got only class 1"),
        ("train", labelled(lambda i: [1] if i % 2 else "b"), "knn", "all lists of them, got int, list, str"),
        (
            "test",
            labelled(lambda i: i % 5),
            "linear",
            r"test must hold only classes present in train, got unseen \[3, 4\]",
        ),
        ("test", labelled(lambda i: i % 5), "fewshot", r"fewshot: test must hold only classes present in train"),
        ("test", lambda _, s: {k: s[k] for k in ("__key__", "json")}, "linear", "no sample of the test split can be"),
        ("train", lambda _, s: {k: s[k] for k in s if k != "png"}, "knn", "test split has image, the train split has"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_the_data(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, change: Any, tasks: str, words: str
) -> None:
    assert main([*arguments(tiny, **{split: altered(tmp_path, split, change)}), "--tasks", tasks]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_the_command_line_names_a_place_where_nothing_can_be_written(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in ("--out", "--cache"):
        assert main([*arguments(tiny), place, str(tmp_path / "file" / "below")]) == 2
        assert str(tmp_path / "file" / "below") in capsys.readouterr().err


def test_without_a_sample_that_has_everything_there_is_no_fusion(tiny: Tiny, tmp_path: Path) -> None:
    test = mixed(tmp_path, ["it", "ta", "it", "ta"])
    labels = {"label": [0, 1, 2, 0]}
    test.labels = labels.__getitem__  # type: ignore[method-assign, assignment]
    config = EvalConfig("label", ["knn", "fusion"])
    found = evaluate(tiny.encoder, tiny.tokenizer, {**tiny.splits, "test": test}, config)
    assert found.skipped == {"fusion": "no sample of the test split has all of image, text, audio"}
    assert found.results.keys() == {"knn/image", "knn/text", "knn/audio"}


def test_embeddings_of_zeros_are_not_on_the_map(tiny: Tiny) -> None:
    encoder = copy.deepcopy(tiny.encoder)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "heads.image.projection" in name:
                parameter.zero_()
    found = evaluate(encoder, tiny.tokenizer, tiny.splits, EvalConfig("label", ["knn"]))
    assert {point[2] for point in found.page["map"]["points"]} == {"text", "audio"}
    assert f"image of {COUNTS['test']} samples: their embeddings are zero" in found.page["left_out"]


def test_raw_inputs_without_a_direction_are_left_out_of_the_baselines(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(eval.encoders.RAW_INPUTS, "text", lambda field, _: torch.zeros(len(field.x), 4))
    found = evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig("label", ["knn"]))
    assert "raw" not in found.results["knn/text"]["baselines"]
    assert "raw" in found.results["knn/image"]["baselines"]
    assert "non-zero rows" in found.skipped["raw input of knn/text"]


# Devices and ranks


def test_tasks_compute_where_the_encoder_is(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = torch.device("meta")
    seen: dict[str, set[torch.device]] = {}

    def watched(name: str, compute: Callable[..., Any], tensors: Callable[..., list[torch.Tensor]]) -> None:
        def found(*given: Any, **more: Any) -> Any:
            devices = {each.device for each in tensors(*given)}
            seen.setdefault(name, set()).update(devices)
            if elsewhere in devices:  # of a device that computes nothing all that can be said is that it was tried
                assert devices == {elsewhere}
                raise torch.OutOfMemoryError
            return compute(*given, **more)

        monkeypatch.setattr(eval.tasks, name, found)

    def of_fusion(*splits: FusionSplit) -> list[torch.Tensor]:
        parts = [part for each in splits for part in (*each.parts.values(), *each.joint_without.values(), each.joint)]
        return [each.labels for each in splits] + [tensor for part in parts if part is not None for tensor in part]

    for name in ("linear_probe", "knn_probe", "fewshot_probe"):
        watched(name, getattr(eval.tasks, name), lambda *splits: [each for split in splits for each in split])
    watched("fuse", eval.fusion.fuse, of_fusion)
    watched(
        "every_direction", eval.retrieval.every_direction, lambda sides, _: [x for side in sides.values() for x in side]
    )
    tasks = eval.run.run_tasks

    def moved(study: Any) -> Any:
        study.scored.device = elsewhere
        return tasks(study)

    monkeypatch.setattr(eval.run, "run_tasks", moved)
    config = EvalConfig("label", ["linear", "knn", "fewshot", "retrieval", "fusion"], batch_size=7)
    found = evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, config)
    assert seen.keys() == {"linear_probe", "knn_probe", "fewshot_probe", "fuse", "every_direction"}
    assert all(devices == {elsewhere, CPU} for devices in seen.values())
    assert found.results == {task: tiny.results[task] for task in found.results}


def test_what_a_device_has_no_memory_for_is_computed_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    def compute(device: torch.device) -> str:
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"on {device}"

    assert on_device(CPU, "knn/image", compute) == "on cpu"
    assert capsys.readouterr().out == ""
    assert on_device(torch.device("meta"), "knn/image", compute) == "on cpu"
    assert capsys.readouterr().out == "knn/image: too large for the memory of meta, computed on the CPU\n"


def evaluate_on_a_rank(rank: int, port: int, tiny: Tiny, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tasks = eval.run.run_tasks

    def counted(study: Any) -> Any:
        (folder / f"tasks-{rank}").touch()
        time.sleep(1)  # the other one has ended by then
        return tasks(study)

    eval.run.run_tasks = counted
    code = main([*arguments(tiny), "--tasks", "linear,fusion,labelfree", "--out", str(folder / "two")])
    (folder / f"code-{rank}").write_text(str(code))


def test_of_two_ranks_the_first_does_the_tasks(tiny: Tiny, tmp_path: Path) -> None:
    start_processes(evaluate_on_a_rank, (free_port(), tiny, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert (tmp_path / "tasks-0").exists()
    assert not (tmp_path / "tasks-1").exists()
    assert main([*arguments(tiny), "--tasks", "linear,fusion,labelfree", "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == two
