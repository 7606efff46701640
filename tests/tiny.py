"""A data set, a recipe and an encoder that are small enough to train in a second."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.index import find_shards, load_shards
from data.shards import write_shards
from data.source import Source
from data.text import train_tokenizer
from data.transforms import AudioView, ImageView, TextView, Views
from eval.encoders import Pretrained
from eval.features import Features, World, sweep
from eval.scored import LAST
from pretrain.config import Config, load_config
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import ModelConfig, Vocabulary

CLASSES = ("low", "middle", "high")
CAPTIONS = ("{}", "a {} tone", "one {} tone, played on an organ")
COUNTS = {"train": 48, "val": 12, "test": 15}
STEPS, BATCH_SIZE = 12, 8
RATE = 8000
VIEWS = Views(ImageView(size=16, crop_scale=0.7), TextView(max_tokens=12), AudioView(frames=32, mels=32, noise=0.1))
MODEL = ModelConfig(width=16, depth=2, heads=2, embed_dim=8, image_patch=8, audio_patch=16)


def picture(label: int, random: np.random.Generator) -> Image.Image:
    """A grey level per class under noise, not square."""
    return Image.fromarray((60 * label + random.integers(100, size=(24, 20, 3))).astype(np.uint8))


def tone(label: int, random: np.random.Generator, rate: int = RATE, seconds: float = 0.25) -> npt.NDArray[np.int16]:
    """A pitch per class under noise."""
    time = np.arange(int(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * 300 * 3**label * time) + 0.1 * random.standard_normal(len(time))
    sound: npt.NDArray[np.int16] = np.rint(wave * 8000).astype(np.int16)
    return sound


def samples(split: str, count: int) -> Iterator[dict[str, bytes | str]]:
    """Labels in turn, each with image, caption, sound and metadata."""
    for i in range(count):
        random = np.random.default_rng([len(split), ord(split[0]), i])
        label = i % len(CLASSES)
        png, flac = io.BytesIO(), io.BytesIO()
        picture(label, random).save(png, format="png")
        soundfile.write(flac, tone(label, random), RATE, format="flac")
        yield {
            "__key__": f"{split}-{i:03d}",
            "png": png.getvalue(),
            "txt": CAPTIONS[i // len(CLASSES) % len(CAPTIONS)].format(CLASSES[label]).encode(),
            "flac": flac.getvalue(),
            "json": json.dumps({"label": label, "name": CLASSES[label]}).encode(),
        }


def write_split(folder: Path, split: str) -> list[Path]:
    """The shards of a split; train has two."""
    return write_shards(samples(split, COUNTS[split]), folder / split, max_samples=30)


def open_shards(patterns: Sequence[Path]) -> Source:
    """Shards by path."""
    return Source(load_shards(find_shards([str(pattern) for pattern in patterns])))


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Shards, and a recipe beside them whose run goes to ``folder/run``; ``changes`` are whole top-level settings."""
    for split in COUNTS:
        if not list(folder.glob(f"{split}-*.tar")):
            write_split(folder, split)
    recipe: dict[str, Any] = {
        "out": str(folder / "run"),
        "data": {
            "root": str(folder),
            **{split: [f"{split}-*.tar"] for split in COUNTS},
            "views": {
                "image": {"size": 16, "crop_scale": 0.7},
                "text": {"max_tokens": 12},
                "audio": {"frames": 32, "mels": 32, "noise": 0.1},
            },
            "workers": 0,
        },
        "tokenizer": {"train": 300},
        "model": {"width": 16, "depth": 2, "heads": 2, "embed_dim": 8, "image_patch": 8},
        "objectives": {
            "masked_region": {"decoder_width": 8, "decoder_heads": 2},
            "joint_keep": {"image": 0.5, "audio": 0.5},
            "final_whole": 0.25,
        },
        "train": {
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "learning_rate": 5e-3,
            "precision": "fp32",
            "threads": 1,
            "log_every": 2,
            "save_every": 4,
        },
        "eval": {"label": "label", "classes": list(CLASSES), "templates": list(CAPTIONS)},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def tiny_config(folder: Path, *overrides: str) -> Config:
    """The recipe of ``write_recipe``, read."""
    return load_config(write_recipe(folder), overrides)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Trained on all captions."""
    # Several times over: merges are learnt from pairs that come more than once.
    return train_tokenizer([caption.format(name) for caption in CAPTIONS for name in CLASSES] * 5, 300)


def tiny_encoder(tokenizer: PreTrainedTokenizerBase, seed: int = 0, model: ModelConfig = MODEL) -> Encoder:
    """Every parameter is random, biases and norms included, so that none can be forgotten unnoticed."""
    special = tuple(sorted(tokenizer.all_special_ids))
    vocabulary = Vocabulary(len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, special)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(model, VIEWS, vocabulary)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval()


def tiny_trained_state(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder's weights in a checkpoint's folder."""
    return dict(Encoder.load(folder / "encoder").state_dict())


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax takes no notice of keys' biases: their gradient is rounding, of which Adam makes whole steps."""
    queries_and_values = {
        name: torch.cat(each.chunk(3)[::2]) for name, each in weights.items() if name.endswith("qkv.bias")
    }
    assert queries_and_values
    return {**weights, **queries_and_values}


def extract(
    encoders: Sequence[Encoder],
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    labels: list[int],
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[dict[str, Features]]:
    """Features of encoders of one architecture by modality, in memory."""
    several = [Pretrained("encoder", encoder, tokenizer) for encoder in encoders]
    found = sweep(several, source, labels, None, device, batch_size, workers, world=World())
    return [each[LAST, "default"] for each in found]


def embeddings_of(features: Features) -> Tensor:
    """Those of an encoder that has a shared space."""
    assert features.embeddings is not None
    return features.embeddings
