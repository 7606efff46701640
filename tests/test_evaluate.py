import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.shards import write_shards
from data.source import SampleError, Source
from data.transforms import make_field
from eval.features import Features, content_ids, extract
from eval.report import Results, table, write_results
from eval.run import EvalConfig, EvaluationError, evaluate, label_ids, main, random_encoder
from pretrain.model.encoder import Encoder
from tests.tiny import (
    CAPTIONS,
    CLASSES,
    COUNTS,
    RATE,
    VIEWS,
    open_shards,
    picture,
    tiny_encoder,
    tiny_tokenizer,
    tone,
    write_split,
)

CPU = torch.device("cpu")
CONFIG = EvalConfig("label", list(CLASSES), list(CAPTIONS), batch_size=7)


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
    return Tiny(folder, encoder, tokenizer, splits, evaluate(encoder, tokenizer, splits, CONFIG, CPU, 0))


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
        assert (features.embeddings - embeddings).abs().max() < 1e-5
        assert features.features.dtype == features.embeddings.dtype == features.raw.dtype == torch.float32
        assert [len(part) for part in features] == [COUNTS["train"]] * 5
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
    assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


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
    ("labels", "classes", "expected"),
    [
        ({"train": [2, 0], "test": [1]}, [], {"train": [2, 0], "test": [1]}),
        ({"train": [7, -3], "test": [900]}, [], {"train": [7, -3], "test": [900]}),
        ({"train": [2, 0], "test": [1]}, ["a", "b", "c"], {"train": [2, 0], "test": [1]}),
        ({"train": ["b", "a"], "test": ["c"]}, [], {"train": [1, 0], "test": [2]}),
        ({"train": ["b", "a"], "test": ["c"]}, ["c", "b", "a"], {"train": [1, 2], "test": [0]}),
        ({"train": ["b"], "test": ["b"]}, ["a", "b"], {"train": [1], "test": [1]}),
    ],
)
def test_labels_become_integers(labels: dict[str, list[Any]], classes: list[str], expected: dict[str, Any]) -> None:
    assert label_ids(labels, classes) == expected


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([0, 3], ["a", "b", "c"], r"\[3\] are outside the 3 names of eval.classes"),
        ([-1], ["a"], r"\[-1\] are outside"),
        ([0, "a"], [], "all whole numbers or all names, got int, str"),
        ([0.5], [], "got float"),
        ([None], [], "got NoneType"),
        ([["a"]], [], "got list"),
        ([True, False], [], "got bool"),
        (["a", "d"], ["a", "b"], r"\['d'\] are not among eval.classes: a, b"),
    ],
)
def test_labels_that_fit_nothing_are_refused(labels: list[Any], classes: list[str], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        label_ids({"train": ["a"] if isinstance(labels[0], str) else [], "test": labels}, classes)


def test_every_task_has_its_numbers_and_baselines(tiny: Tiny) -> None:
    assert set(tiny.results) == {
        *(f"linear/{name}" for name in ("image", "text", "audio")),
        *(f"zeroshot/{name}" for name in ("image", "audio")),
        *(f"retrieval/{a}_to_{b}" for a in ("image", "text", "audio") for b in ("image", "text", "audio") if a != b),
    }
    for task, result in tiny.results.items():
        if task.startswith("retrieval"):
            assert result.keys() == {"r1", "r5", "r10", "queries", "queries_without_match", "chance", "random_init"}
            assert result["chance"].keys() == result["random_init"].keys() == {"r1", "r5", "r10"}
            assert 0 <= result["r1"] <= result["r5"] <= result["r10"] <= 1
            assert result["chance"]["r1"] == pytest.approx(1 / 3)
            continue
        assert 0 <= result["interval"][0] <= result["top1"] <= result["interval"][1] <= 1
        assert result["chance"] == {"top1": pytest.approx(1 / 3)}
        assert 0 <= result["random_init"]["top1"] <= 1
        assert result["distinct_test_inputs"] == (9 if task == "linear/text" else COUNTS["test"])
        if task.startswith("linear"):
            assert result["majority"] == {"top1": pytest.approx(1 / 3)}
            assert result.keys() >= {"strength", "val_top1", "raw"}


def test_separable_inputs_are_separated(tiny: Tiny) -> None:
    # Brightness, pitch and the class's own name: a probe of the input itself has to find them.
    for modality in ("image", "text", "audio"):
        assert tiny.results[f"linear/{modality}"]["raw"]["top1"] == 1.0


def test_the_random_encoder_is_scored_as_itself(tiny: Tiny) -> None:
    again = evaluate(random_encoder(tiny.encoder), tiny.tokenizer, tiny.splits, CONFIG, CPU, 0)
    for task, result in again.items():
        scores = {name: result[name] for name in ("top1", "r1", "r5", "r10") if name in result}
        assert {name: result["random_init"][name] for name in scores} == scores
        assert {name: tiny.results[task]["random_init"][name] for name in scores} == scores


def test_results_are_numbers_that_json_has(tiny: Tiny) -> None:
    assert json.loads(json.dumps(tiny.results, allow_nan=False)) == tiny.results


def test_without_classes_there_is_no_zero_shot(tiny: Tiny) -> None:
    results = evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig("name"), CPU, 0)
    assert not any(task.startswith("zeroshot") for task in results)
    assert results["linear/image"]["raw"]["top1"] == 1.0


def test_no_label_is_refused(tiny: Tiny) -> None:
    with pytest.raises(EvaluationError, match=r"eval\.label"):
        evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig(), CPU, 0)


def test_a_label_that_samples_lack_is_named(tiny: Tiny) -> None:
    with pytest.raises(SampleError, match=r"train-000, no 'species'.*label, name"):
        evaluate(tiny.encoder, tiny.tokenizer, tiny.splits, EvalConfig("species"), CPU, 0)


def test_the_random_encoder_is_always_the_same_and_disturbs_nothing(tiny: Tiny) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = random_encoder(tiny.encoder).state_dict()
    assert torch.equal(torch.rand(3), expected)
    b = random_encoder(tiny.encoder).state_dict()
    trained = tiny.encoder.state_dict()
    assert a.keys() == trained.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], trained[name]) for name in a)


def test_the_table_has_a_line_for_every_number(tiny: Tiny) -> None:
    lines = table(tiny.results).splitlines()
    header = re.split(r"  +", lines[0].strip())
    assert header == ["task", "metric", "score", "95 % interval", "random encoder", "raw input", "chance"]
    got = [tuple(line.split()[:3]) for line in lines[2:]]
    assert got == [
        (task, metric, f"{100 * result[metric]:.1f}")
        for task, result in tiny.results.items()
        for metric in ("top1", "r1", "r5", "r10")
        if metric in result
    ]
    assert len({len(line) for line in lines}) == 1
    image = next(line for line in lines if line.startswith("linear/image"))
    result = tiny.results["linear/image"]
    numbers = [*result["interval"], *(result[name]["top1"] for name in ("random_init", "raw", "chance"))]
    assert image.replace("..", " ").split()[3:] == [f"{100 * number:.1f}" for number in numbers]


def test_results_are_written_whole_with_their_schema(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, {"linear/image": {"top1": 0.0}}, {})
    write_results(path, tiny.results, {"checkpoint": "step-00000001"})
    document = json.loads(path.read_text())
    assert document == {"schema": 1, "about": {"checkpoint": "step-00000001"}, "results": tiny.results}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def arguments(tiny: Tiny, **changes: str) -> list[str]:
    """The command line for the tiny splits."""
    paths = {split: str(tiny.folder / f"{split}-*.tar") for split in COUNTS} | changes
    return [str(tiny.folder / "last"), *(part for name in COUNTS for part in (f"--{name}", paths[name]))]


def test_the_command_line_gives_the_same_results(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    names = ["--classes", *CLASSES, "--templates", *CAPTIONS]
    assert main([*arguments(tiny), *names, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == 1
    assert {name: split["samples"] for name, split in document["about"]["splits"].items()} == COUNTS
    assert document["results"].keys() == tiny.results.keys()
    for task, result in tiny.results.items():
        for name in {"top1", "r1"} & result.keys():
            assert document["results"][task][name] == pytest.approx(result[name])
    assert capsys.readouterr().out.splitlines()[0].startswith("task")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_command_line_names_a_missing_shard(tiny: Tiny, capsys: pytest.CaptureFixture[str], split: str) -> None:
    missing = str(tiny.folder / f"missing-{split}.tar")
    assert main(arguments(tiny, **{split: missing})) == 2
    captured = capsys.readouterr()
    assert missing in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""


@pytest.mark.parametrize("extra", [["--label", "species"], ["--classes", "a", "b"], ["--templates", "a tone"]])
def test_the_command_line_says_what_is_wrong_with_its_settings(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    assert main([*arguments(tiny), *extra]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_line_names_a_missing_checkpoint(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny.folder / "none"), *arguments(tiny)[1:]]) == 2
    assert str(tiny.folder / "none") in capsys.readouterr().err
