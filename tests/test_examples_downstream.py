"""The examples that use an export in plain `transformers`, on tiny data, by their command lines."""

import importlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from data.shards import write_shards
from pretrain.export import export
from tests.exported import learned
from tests.tiny import CLASSES, samples, tiny_encoder, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = [f"{i}={name}" for i, name in enumerate(CLASSES)]
TRAINING = ["--labels=24", "--views=2", "--steps=25", "--batch-size=8", "--seeds=0", "--learning-rate=5e-3"]


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a script finds `few_labels`; and what scripts tell `transformers` to print is set back."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read by tests."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    encoder = tiny_encoder(tokenizer)
    out = tmp_path_factory.mktemp("downstream") / "exported"
    export(encoder, tokenizer, out, learned(encoder), fresh=False)
    return out


def relabelled(split: str, count: int, shift: int) -> Iterator[dict[str, bytes | str]]:
    """Tiny samples, with captions that are all different and labels turned by ``shift``."""
    for i, sample in enumerate(samples(split, count)):
        label = (json.loads(sample["json"])["label"] + shift) % len(CLASSES)
        yield {
            **sample,
            "txt": f"{CLASSES[label]} tone {split[1]}{i}".encode(),
            "json": json.dumps({"label": label}).encode(),
        }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train``, ``test``, and ``turned``: test with every label another one. Only read by tests."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(relabelled("train", 48, 0), folder / "train", max_samples=30)
    write_shards(relabelled("test", 15, 0), folder / "test", max_samples=30)
    write_shards(relabelled("test", 15, 1), folder / "turned", max_samples=30)
    return folder


def main(name: str) -> Callable[[list[str]], int]:
    """The command line of a script, in this process, which has loaded all libraries already."""
    function: Callable[[list[str]], int] = importlib.import_module(name).main
    return function


def command(exported: Path, shards: Path, test: str = "test") -> list[str]:
    """The arguments of all scripts that train."""
    return [str(exported), "--train", str(shards / "train-*.tar"), "--test", str(shards / f"{test}-*.tar")]


def row(text: str, name: str) -> list[float]:
    """The numbers of a line of a printed table."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}  "))
    return [float(number) for number in line.removeprefix(name).split()]


def members(shards: Path, extension: str, split: str = "test") -> list[bytes]:
    """The files of a split, read without webdataset."""
    found = []
    for path in sorted(shards.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(extension) and file is not None:
                    found.append(file.read())
    return found


AUTO = {
    "image": (AutoModelForImageClassification, "png"),
    "audio": (AutoModelForAudioClassification, "flac"),
    "text": (AutoModelForSequenceClassification, "txt"),
}


def encoded(modality: str, folder: Path, files: list[bytes]) -> dict[str, Tensor]:
    """What a saved folder's own processor makes of files."""
    few_labels = importlib.import_module("few_labels")
    loaded = [few_labels.Sample(file, "") for file in files]
    if modality == "image":
        found = AutoImageProcessor.from_pretrained(folder)([each.picture() for each in loaded], return_tensors="pt")
    elif modality == "audio":
        sounds = [each.sound(16000) for each in loaded]
        found = AutoFeatureExtractor.from_pretrained(folder)(sounds, sampling_rate=16000, return_tensors="pt")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer([each.text() for each in loaded], padding=True, truncation=True, return_tensors="pt")
    return dict(found)


@pytest.mark.parametrize("modality", list(AUTO))
def test_the_score_is_that_of_the_saved_model(
    modality: str, exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = main(f"finetune_{modality}")
    assert script([*command(exported, shards), *TRAINING, "--save", str(tmp_path / "saved")]) == 0
    out = capsys.readouterr().out
    assert "24 labels of 3 classes, 15 test samples, 25 steps" in out
    auto, extension = AUTO[modality]
    model = auto.from_pretrained(tmp_path / "saved").eval()
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    with torch.inference_mode():
        logits = model(**encoded(modality, tmp_path / "saved", members(shards, extension))).logits
    wanted = torch.tensor([json.loads(each)["label"] for each in members(shards, "json")])
    accuracy = 100 * float((logits.argmax(1) == wanted).float().mean())
    assert row(out, "export") == pytest.approx([accuracy, accuracy], abs=0.06)  # the seed's, and the mean
    assert accuracy > 60
    assert row(out, "chance") == [33.3]
    before, after = AutoModel.from_pretrained(exported / modality).state_dict(), model.base_model.state_dict()
    assert not any(torch.equal(before[name], value) for name, value in after.items() if "attention" in name)


def test_the_score_hangs_on_the_labels(exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("finetune_image")([*command(exported, shards, "turned"), *TRAINING]) == 0
    assert row(capsys.readouterr().out, "export")[0] < 30


def test_one_start_has_the_export_s_weights_and_the_other_has_none_of_them(exported: Path) -> None:
    few_labels = importlib.import_module("few_labels")
    weights = AutoModel.from_pretrained(exported / "image").state_dict()
    for name in ("pretrained", "scratch"):
        model = getattr(few_labels, name)(AutoModelForImageClassification, exported / "image", ["a", "b"])
        same = {key: torch.equal(value, weights[key]) for key, value in model.base_model.state_dict().items()}
        assert len(same) == len(weights) - 2  # the pooler's
        assert set(same.values()) == {name == "pretrained"}
        assert model.classifier.out_features == 2


def test_an_export_in_bfloat16_is_used_in_float32(
    exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "text")
    torch.manual_seed(0)
    encoder = tiny_encoder(tokenizer)
    names = ["text/masked_lm", "image", "image_text"]
    export(encoder, tokenizer, tmp_path / "half", learned(encoder), dtype=torch.bfloat16, names=names, fresh=False)
    few_labels = importlib.import_module("few_labels")
    for name in ("pretrained", "scratch"):
        model = getattr(few_labels, name)(AutoModelForImageClassification, tmp_path / "half" / "image", ["a", "b"])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    given = command(tmp_path / "half", shards)
    assert main("fill_mask")([*given, "--captions", "24", "--steps", "1"]) == 0
    assert main("zero_shot_pairs")([given[0], *given[3:], "--classes", *NAMES]) == 0
    load = importlib.import_module("pipelines").LOADS["export"]
    assert load(AutoModel, tmp_path / "half" / "image").dtype is torch.float32


def test_missing_weights_are_no_new_head(exported: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(exported / "image", tmp_path / "image")
    weights = load_file(tmp_path / "image" / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "layer.1.intermediate" not in name}
    save_file(weights, tmp_path / "image" / "model.safetensors", metadata={"format": "pt"})
    assert main("finetune_image")([*command(tmp_path, shards), *TRAINING]) == 2
    error = capsys.readouterr().err
    assert "2 weights are missing, the first is vit." in error
    assert "layers.1.mlp.fc1" in error


def test_equal_inputs_count_once_and_classes_have_the_same_share(tmp_path: Path) -> None:
    few_labels = importlib.import_module("few_labels")
    twice = [
        {**each, "__key__": f"{copy}{i:03d}"} for copy in "ab" for i, each in enumerate(relabelled("train", 48, 0))
    ]
    for each in twice[48:]:
        each["txt"] = b"another caption"
    write_shards(iter(twice), tmp_path / "train", max_samples=100)
    read = few_labels.read([str(tmp_path / "train-*.tar")], few_labels.PICTURES, "label")
    assert len(read) == 48
    assert len(few_labels.read([str(tmp_path / "train-*.tar")], few_labels.TEXTS, None)) == 49
    drawn = [few_labels.draw(read, 12, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for each in drawn:
        assert len(set(each)) == 12
        assert sorted(sample.label for sample in each) == ["0"] * 4 + ["1"] * 4 + ["2"] * 4


def test_nothing_is_scored_that_was_trained_on(
    exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*command(exported, shards, "train"), *TRAINING, "--steps", "1"]
    assert main("finetune_image")(again) == 0
    assert "24 labels of 3 classes, 24 test samples" in capsys.readouterr().out
    assert main("finetune_image")([*again, "--labels", "48"]) == 2
    assert "nothing is left that is not among the labelled" in capsys.readouterr().err


def test_a_margin_is_cut_off_and_coarse_pictures_have_few_pixels(shards: Path) -> None:
    as_pretrained = importlib.import_module("finetune_image").as_pretrained
    picture = importlib.import_module("few_labels").Sample(members(shards, "png")[0], "").picture()
    assert as_pretrained(picture, 0, None).tobytes() == picture.tobytes()
    assert as_pretrained(picture, 4, None).tobytes() == picture.crop((4, 4, 16, 20)).tobytes()
    assert as_pretrained(picture, 4, 2).size == picture.size
    flat = as_pretrained(picture, 4, 1)  # one mean in each colour, of what the margin leaves
    assert flat.getextrema() == tuple((value, value) for value in flat.getpixel((0, 0)))
    left = torch.tensor(list(picture.crop((4, 4, 16, 20)).split()[0].tobytes())).float().mean()
    assert flat.getpixel((0, 0))[0] == pytest.approx(float(left), abs=1)


def test_lora_learns_little_and_leaves_the_export_as_it_is(
    exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*command(exported, shards), *TRAINING]
    assert main("lora")([*given, "--rank", "2", "--lora-rate", "2e-2", "--save", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    # Per block four of 16 x 16 and two of 16 x 64, at rank 2; two blocks; the head of two classes.
    assert f"LoRA: {2 * 2 * (4 * 32 + 2 * 80) + 2 * 17:,} numbers to learn, for two classes" in out
    base = AutoModelForImageClassification.from_pretrained(exported / "image", num_labels=3)
    before = {name: value.clone() for name, value in base.vit.state_dict().items()}
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.inference_mode():
        logits = model(**encoded("image", tmp_path / "adapter", members(shards, "png"))).logits
    wanted = torch.tensor([json.loads(each)["label"] for each in members(shards, "json")])
    accuracy = 100 * float((logits.argmax(1) == wanted).float().mean())
    assert row(out, "LoRA")[0] == pytest.approx(accuracy, abs=0.06)
    assert accuracy > 60
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("lora_" not in name and "classifier" not in name for name in saved)
    assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)  # they begin as zeros
    lora = importlib.import_module("lora")
    few_labels = importlib.import_module("few_labels")
    trained = lora.adapted(few_labels.pretrained(AutoModelForImageClassification, exported / "image", CLASSES), 2)
    rows = [
        {"pixel_values": pixels, "labels": int(label)}
        for pixels, label in zip(
            encoded("image", exported / "image", members(shards, "png"))["pixel_values"], wanted, strict=True
        )
    ]
    few_labels.fit(trained, rows, few_labels.trainer("").parse_args([*given, "--steps", "3"]), 2e-2, 0)
    after = trained.unload().vit.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_zero_shot_is_that_of_the_pair_s_logits(
    exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(exported), "--test", str(shards / "test-*.tar"), "--classes", *NAMES, "--template", "a {} tone"]
    assert main("zero_shot_pairs")(given) == 0
    out = capsys.readouterr().out
    texts = AutoTokenizer.from_pretrained(exported / "image_text")([f"a {name} tone" for name in CLASSES], padding=True)
    model: Any = AutoModel.from_pretrained(exported / "image_text").eval()
    pixels = encoded("image", exported / "image_text", members(shards, "png"))
    with torch.inference_mode():
        tokens = {name: torch.tensor(texts[name]) for name in ("input_ids", "attention_mask")}
        found = model(**pixels, **tokens).logits_per_image.argmax(1)
    wanted = torch.tensor([json.loads(each)["label"] for each in members(shards, "json")])
    assert row(out, "export") == pytest.approx([100 * float((found == wanted).float().mean())], abs=0.06)
    assert "15 test pictures of 3 classes" in out


class LeftNeighbour(torch.nn.Module):
    """Says what it sees, and where that is a mask, what stands to its left."""

    def __init__(self, mask: int, size: int) -> None:
        super().__init__()
        self.mask, self.size = mask, size

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        seen = torch.where(input_ids == self.mask, input_ids.roll(1, dims=1), input_ids)
        return SimpleNamespace(logits=F.one_hot(seen, self.size).float())


def test_each_token_is_guessed_while_it_is_hidden(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "text" / "masked_lm")
    model = LeftNeighbour(tokenizer.mask_token_id, len(tokenizer))
    assert [len(tokenizer(caption)["input_ids"]) for caption in ("tone tone low", "low low")] == [5, 4]
    # Right are the second tone and the second low; special tokens are not asked for.
    guessed = importlib.import_module("fill_mask").guessed
    assert guessed(model, tokenizer, ["tone tone low", "low low"]) == pytest.approx(2 / 5)


def test_a_hidden_word_is_guessed_as_by_the_pipeline(
    exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported / "text" / "masked_lm"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    script = importlib.import_module("fill_mask")
    given = [*command(exported, shards), "--captions", "24", "--steps", "60", "--learning-rate", "3e-2"]
    assert script.main([*given, "--text", "a <mask> tone"]) == 0
    out = capsys.readouterr().out
    first = fill("a <mask> tone", top_k=1)[0]
    assert out.startswith(f"a <mask> tone: {first['token_str'].strip()} {100 * first['score']:.0f} %, ")
    assert "guessed tokens of 15 other captions" in out
    assert row(out, "export")[0] > row(out, "export as it is")[0] + 10  # random weights, and trained ones


def test_pipelines_score_an_export_beside_random_weights(
    exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*command(exported, shards), "--labels", "12", "--classes", *NAMES, "--template", "a {} tone"]
    assert main("pipelines")([*given, "--samples", "9"]) == 0
    out = capsys.readouterr().out
    assert "9 pictures, 9 captions, 9 sounds of 3 classes" in out
    for task in ("image-feature-extraction", "fill-mask", "audio-classification"):
        assert all(0 <= value <= 100 for value in row(out, task))
    script = importlib.import_module("pipelines")
    templates = ["a {} tone", "one {} tone"]
    model = script.named_classifier(script.LOADS["export"], exported, CLASSES, templates)
    sounds = encoded("audio", exported / "embed_audio", members(shards, "flac"))
    prompts = [template.format(name).encode() for name in CLASSES for template in templates]
    texts = encoded("text", exported / "embed_text", prompts)
    embed: dict[str, Any] = {
        "audio": AutoModelForAudioClassification.from_pretrained(exported / "embed_audio").eval(),
        "text": AutoModelForSequenceClassification.from_pretrained(exported / "embed_text").eval(),
    }
    with torch.inference_mode():
        logits = model(**sounds).logits
        units = F.normalize(embed["text"](**texts).logits, dim=1)
        classes = F.normalize((units[::2] + units[1::2]) / 2, dim=1)
        expected = embed["audio"](**sounds).logits @ classes.T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    ("script", "change", "words"),
    [
        ("finetune_image", ["--train", "nowhere-*.tar"], "nowhere-*.tar: no such shard"),
        ("finetune_image", ["--label", "species"], "has no text or whole number as 'species'; it has label"),
        ("finetune_image", ["--labels", "10"], "10 labels: a multiple of the 3 classes is needed"),
        ("finetune_image", ["--labels", "300"], "class '0' has 16 distinct samples, not 100"),
        ("finetune_image", ["--steps", "0"], "--steps 0: 1 or more is allowed"),
        ("finetune_image", ["--margin", "12"], "--margin 12, --coarse None: nothing is left of a picture"),
        ("lora", ["--rank", "0"], "--rank 0: 1 or more"),
        ("fill_mask", ["--text", "a tone"], "--text 'a tone': <mask> is needed"),
        ("fill_mask", ["--captions", "50"], "class '' has 48 distinct samples"),
        ("zero_shot_pairs", ["--classes", "0=low"], "--classes: no name for 1, 2"),
        ("zero_shot_pairs", ["--classes", *NAMES, "--template", "a tone"], "--template 'a tone': {} is needed"),
        ("pipelines", ["--classes", *NAMES, "--samples", "0"], "--samples 0: 1 or more"),
    ],
)
def test_mistakes_are_one_clear_error(
    script: str, change: list[str], words: str, exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(exported, shards)
    given = given[:1] + given[3:] if script == "zero_shot_pairs" else given
    labels = ["--labels", "12"] if script in ("finetune_image", "lora", "pipelines") else []
    assert main(script)([*given, *labels, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_what_is_not_there_or_damaged_is_named(exported: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    assert main("finetune_audio")([*command(exported / "text", shards), *TRAINING]) == 2
    assert "no model in its folder audio; it has ., 1_Pooling, 2_Dense, 3_Dense, masked_lm" in capsys.readouterr().err
    damaged = [dict(each, flac=b"no sound") for each in relabelled("test", 3, 0)]
    write_shards(iter(damaged), tmp_path / "test", max_samples=9)
    shutil.copy(next(shards.glob("train-*.tar")), tmp_path / "train-0.tar")
    assert main("finetune_audio")([*command(exported, tmp_path), *TRAINING]) == 2
    assert "error: Error opening" in capsys.readouterr().err


def test_lora_without_peft_says_what_to_install(
    exported: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main("lora")([*command(exported, shards), *TRAINING]) == 2
    assert "LoRA needs peft: pip install -e '.[lora]'" in capsys.readouterr().err


def test_no_script_imports_this_project() -> None:
    scripts = [path for path in EXAMPLES.glob("*.py") if "few_labels" in path.read_text() or path.stem == "few_labels"]
    assert len(scripts) == 8
    for path in scripts:
        for line in io.StringIO(path.read_text()):
            assert not line.startswith(tuple(f"{how} {name}" for how in ("import", "from") for name in OURS)), path


OURS = ("pretrain", "objectives", "data.", "data ", "eval.", "eval ", "tests", "benchmarks")
