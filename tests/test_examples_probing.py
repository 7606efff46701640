"""The probing scripts of examples/ on tiny data, by their command lines."""

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

from eval.adapters.inputs import Inputs
from eval.encoders import load_scored
from eval.features import extract_features
from eval.linear import Split, linear_probe
from eval.splits import hold_out
from pretrain.export import export
from tests.exported import learned
from tests.tiny import open_shards, picture, tiny_encoder, tiny_tokenizer, write_split

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ["b.png", "below/a.png", "c.webp", "d.png"]


def main(name: str) -> Callable[[list[str]], int]:
    """The command line of a script, in this process, which has loaded all libraries already."""
    function: Callable[[list[str]], int] = runpy.run_path(str(EXAMPLES / name))["main"]
    return function


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read by tests."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    encoder = tiny_encoder(tokenizer)
    out = tmp_path_factory.mktemp("examples") / "exported"
    export(encoder, tokenizer, out, learned(encoder), fresh=False)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read by tests."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for i, name in enumerate(NAMES):
        picture(i % 3, np.random.default_rng(i)).save(folder / name, lossless=True)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def cosines(exported: Path, photos: Path, texts: list[str]) -> Tensor:
    """(4, len(texts)) by the models of the export alone."""
    model: Any = AutoModel.from_pretrained(exported / "image_text").eval()
    processor = AutoImageProcessor.from_pretrained(exported / "image_text")
    tokenizer = AutoTokenizer.from_pretrained(exported / "image_text")
    pixels = processor([Image.open(photos / name) for name in NAMES], return_tensors="pt")
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    found: Tensor = outputs.image_embeds @ outputs.text_embeds.T
    return found


def test_a_linear_probe_of_a_stock_model(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(tmp_path, split)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    shards: list[str | Path] = ["--train", tmp_path / "train-*.tar", "--test", tmp_path / "test-*.tar"]
    command: list[str | Path] = [
        sys.executable,
        EXAMPLES / "linear_probe.py",
        tmp_path / "vit",
        *shards,
        "--label",
        "name",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "image: 48 train and 15 test samples" in done.stdout

    scored, parts = load_scored(str(tmp_path / "vit")), {}
    for split in ("train", "test"):
        source = open_shards([tmp_path / f"{split}-*.tar"])
        labels = torch.tensor([("high", "low", "middle").index(name) for name in source.labels("name")])
        parts[split] = extract_features(scored, source, labels, None, torch.device("cpu"), 64, 0)["image"]
    train, test = parts["train"], parts["test"]
    held = hold_out(train.labels)
    for what in ("features", "raw"):
        x, y = getattr(train, what), train.labels
        splits = Split(x[~held], y[~held]), Split(x[held], y[held]), Split(getattr(test, what), test.labels)
        expected = linear_probe(*splits, samples=0).top1
        assert re.search(rf"^{what} +top1 {expected:.3f}  \(95 %: ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--label", "species"], "species"),
        (["--label", "name", "--train", "nowhere-*.tar"], "nowhere-"),
        (["--label", "name", "model"], "neither a run"),
    ],
)
def test_what_can_not_be_probed(
    change: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for split in ("train", "test"):
        write_split(tmp_path, split)
    given = ["--train", "train-*.tar", "--test", "test-*.tar", *change]
    given = given if "model" in given else ["model", *given]
    assert main("linear_probe.py")(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_zero_shot_on_classes_of_ones_own(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    templates = ["a {} tone", "one {} tone"]
    given = [str(exported), str(photos), "low", "high", *[f"--template={each}" for each in templates]]
    assert main("zero_shot.py")(given) == 0
    done = capsys.readouterr()
    assert "broken.jpg: left out" in done.err
    texts = [each.format(name) for name in ("low", "high") for each in templates]
    similar = cosines(exported, photos, texts)
    lines = done.out.splitlines()
    chosen = {}
    for i, name in enumerate(NAMES):
        line = next(line for line in lines if line.endswith(str(photos / name)))
        chosen[name] = line.split()[0]
        # The mean of unit vectors, of length 1 again: its cosine is the mean of theirs, but for that length.
        margin = prompt_mean(exported, texts, similar[i])
        assert chosen[name] == ("low" if margin > 0 else "high") or abs(margin) < 1e-5
    assert lines[-1] == ", ".join(f"{name}: {list(chosen.values()).count(name)}" for name in ("low", "high"))


def prompt_mean(exported: Path, texts: list[str], similar: Tensor) -> float:
    """How much nearer to the first class's two prompts, (4,) cosines, than to the second's."""
    prompts = Inputs(load_scored(str(exported))).embeddings("text", texts)
    units = prompts / prompts.norm(dim=1, keepdim=True)
    lengths = [units[:2].mean(0).norm(), units[2:].mean(0).norm()]
    return float(similar[:2].mean() / lengths[0] - similar[2:].mean() / lengths[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["low"], "CLASS: two different names are needed at least, got ['low']"),
        (["low", "low"], "CLASS: two different names"),
        (["low", "high", "--template", "a tone"], "--template: 'a tone' must hold {} once"),
    ],
)
def test_classes_that_are_none(
    change: list[str], words: str, exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("zero_shot.py")([str(exported), str(photos), *change]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def index(exported: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read by tests."""
    path = tmp_path_factory.mktemp("index") / "photos.index"
    assert main("search.py")(["build", str(exported), str(photos), str(path)]) == 0
    return path


@pytest.mark.parametrize("faiss", [False, True])
def test_search_by_text_and_by_picture(
    faiss: bool,
    index: Path,
    exported: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    if faiss and find("faiss") is None:
        pytest.skip("faiss is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if faiss or name != "faiss" else None)
    search = main("search.py")
    similar = cosines(exported, photos, ["a low tone"])[:, 0]
    assert search(["query", str(index), "a low tone", "--top", "9"]) == 0
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if str(photos) in line]
    assert [path for _, path in found] == [str(photos / NAMES[i]) for i in similar.argsort(descending=True)]
    assert [float(score) for score, _ in found] == pytest.approx(
        similar.sort(descending=True).values.tolist(), abs=1e-4
    )
    assert search(["query", str(index), "--picture", str(photos / NAMES[1]), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"1.0000  {photos / NAMES[1]}"


def test_an_index_of_another_encoder_is_refused(
    index: Path, exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = main("search.py")
    with safe_open(index, framework="pt") as file:
        about, vectors = file.metadata(), file.get_tensor("vectors")
    save_file({"vectors": vectors}, tmp_path / "other.index", metadata={**about, "encoder": f"random:{exported}"})
    (tmp_path / "notes.txt").write_text("no index")
    save_file({"weights": vectors}, tmp_path / "weights.safetensors")
    cases = {
        ("query", tmp_path / "other.index", "low"): "has changed since: build it again",
        ("query", tmp_path / "notes.txt", "low"): "notes.txt: no index that `build` made",
        ("query", tmp_path / "weights.safetensors", "low"): "weights.safetensors: no index that `build` made",
        ("query", tmp_path / "nowhere", "low"): "nowhere",
        ("query", index): "give either TEXT or --picture",
        ("query", index, "low", "--top", 0): "--top 0: 1 or more",
        ("query", index, "--picture", photos / "broken.jpg"): "broken.jpg: image of 10 bytes",
        ("build", exported, tmp_path, tmp_path / "new.index"): "no picture below it that can be read",
        ("build", exported, photos, tmp_path / "nowhere" / "new.index"): "there is no folder",
        ("build", exported / "image", photos, tmp_path / "new.index"): "has no embeddings of image",
    }
    for arguments, words in cases.items():
        assert search([str(each) for each in arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert "error: " in error
        assert words in error
