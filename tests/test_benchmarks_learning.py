"""The benchmark of learning: equal data and settings on all sides, and scores of what was left out of training."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import learning
from data.batch import Field
from data.shards import write_shards
from eval.features import Features
from pretrain.optimizer import learning_rate

SMALL = ["model.width=16", "model.depth=1", "model.heads=1", "model.embed_dim=8", "train.batch_size=8"]
SETTINGS = [*SMALL, "data.workers=0", "data.views.image.size=16", "train.threads=1", "train.precision=fp32"]
COLOURS = {"reds": (255, 0, 0), "blues": (0, 0, 255)}


def pictures(count: int) -> list[dict[str, bytes | str]]:
    """Red and blue ones, two by two, that say so; every other one of those to judge by is for validation."""
    random, made = np.random.default_rng(0), list[dict[str, bytes | str]]()
    for number in range(count):
        label, colour = list(COLOURS.items())[number // 2 % 2]
        file = io.BytesIO()
        noise = random.integers(0, 60, (16, 16, 3))
        Image.fromarray(np.clip(np.array(colour) - noise, 0, 255).astype(np.uint8)).save(file, "PNG")
        about = {
            "png": file.getvalue(),
            "txt": f"{label} {number}".encode(),
            "json": json.dumps({"label": label}).encode(),
        }
        made.append({"__key__": f"{number:04d}", **about})
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> learning.Study:
    data, scratch = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("scratch")
    (data / "clipart").mkdir()
    for part, count in (("train", 48), ("val", 24)):
        list(write_shards(pictures(count), data / "clipart" / f"clipart-{part}", max_samples=100))
    return learning.Study("clipart", data, scratch, SETTINGS)


class Tiny(nn.Module):
    """Stands for open_clip's CLIP."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual = Pixels()
        self.words = nn.Embedding(words, 8)
        self.logit_scale = nn.Parameter(torch.tensor(10.0))  # above the limit

    def encode_text(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] == 32
        return self.words(ids).mean(1)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.visual(images), dim=-1), F.normalize(self.encode_text(ids), dim=-1), self.logit_scale


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj: nn.Parameter | None = nn.Parameter(torch.randn(3, 8))

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean((2, 3))
        return pooled if self.proj is None else pooled @ self.proj


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * images @ texts.T, torch.arange(len(images)))

    parts: dict[str, Any] = {"model": None, "loss": SimpleNamespace(ClipLoss=lambda: loss)}
    monkeypatch.setattr(learning, "open_clip", parts.__getitem__)
    monkeypatch.setattr(learning, "open_clip_model", lambda _, size, words, **text: Tiny(words))


def test_both_sides_have_the_same_settings(study: learning.Study) -> None:
    every, alone = study.config("all", 3), study.config("contrastive", 3)
    assert every.eval.classes == sorted(COLOURS)
    assert every.data.views.audio is None
    assert every.seed == alone.seed == 3
    assert every.tokenizer == alone.tokenizer
    assert (every.model, every.train, every.data) == (alone.model, alone.train, alone.data)
    assert alone.objectives.masked_region.weight == alone.objectives.masked_language.weight == 0
    assert every.objectives.masked_region.weight > 0


@pytest.mark.usefixtures("_tiny")
def test_theirs_is_trained_on_our_schedule_and_judged_on_the_rest(
    study: learning.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = list[float]()

    def rate(settings: Any, step: int) -> float:
        rates.append(learning_rate(settings, step))
        return rates[-1]

    monkeypatch.setattr(learning, "learning_rate", rate)
    config = study.config("contrastive", 0)
    config.train.steps = 6
    theirs, seconds = learning.train_theirs(config, study.tokenizer)
    assert len(rates) == 6
    assert rates[-1] < max(rates) == config.train.learning_rate
    assert 0 < seconds < 60
    assert theirs.model.logit_scale.item() == pytest.approx(np.log(100))
    scores = learning.judge(theirs, config, study.train, by_class=False)
    assert set(scores) == {"probe", "zeroshot", "retrieval", "val"}
    assert scores["probe"] == 1  # red and blue differ in the mean of their pixels
    assert 0 <= scores["retrieval"] <= 1


@pytest.mark.usefixtures("_tiny")
def test_features_are_what_comes_before_the_projection(study: learning.Study) -> None:
    theirs = learning.OpenClip(study.config("contrastive", 0), study.tokenizer)
    images = torch.randn(4, 3, 16, 16)
    found = theirs.encode("image", Field(images, torch.arange(4)))
    (features,) = found.features.values()
    assert features.shape == (4, 3)
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, theirs.model.visual(images))
    short = Field(torch.full((2, 5), 7), torch.arange(2))
    assert theirs.ids(short).tolist() == [[7] * 5 + [study.tokenizer.pad_token_id] * 27] * 2


def features(embeddings: list[list[float]], labels: list[int]) -> Features:
    x, rows = torch.tensor(embeddings), torch.arange(len(labels))
    return Features(x, x, x, torch.tensor(labels), rows, rows)


def test_retrieval_is_the_mean_of_both_directions() -> None:
    image = features([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], [0, 0, 1])
    text = features([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]], [0, 1, 0])
    # Each image finds a text of its class. The third text, of class 0, finds the image of class 1.
    assert learning.recall(image, text, by_class=True) == pytest.approx((3 / 3 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="same samples"):
        learning.recall(image, text._replace(rows=torch.tensor([0, 1, 5])), by_class=True)


def test_ahead_is_the_difference_seed_by_seed() -> None:
    def runs(*probes: float) -> list[dict[str, float]]:
        return [{"probe": value, "zeroshot": 0.5, "retrieval": 0.25} for value in probes]

    rows = {"ours, all objectives": runs(0.6, 0.8), "ours, contrastive": runs(0, 0), learning.THEIRS: runs(0.5, 0.6)}
    assert learning.ahead(rows) == {"probe": [0.15, 0.0707], "zeroshot": [0, 0], "retrieval": [0, 0]}
    assert learning.ahead({"ours, all objectives": runs(0.6)}) == {}
    assert learning.mean_and_spread([0.5]) == [0.5, 0]


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        learning.main(["--data", str(tmp_path), "--tasks", "speech"])
