"""Tiny samples, views, vocabulary, models and batches that tests share."""

import io
import json
import socket
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.batch import Batch, Field
from data.index import load_shard
from data.shards import write_shards
from data.source import Source
from data.text import train_tokenizer
from data.transforms import AudioView, ImageView, TextView, Views
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import ModelConfig, Vocabulary

CAPTIONS = ["a cat", "the dog barks at a cat", "größe", "a dog", "one two three", "rain on a tin roof"]

# Images have 4x4 = 16 patches, spectrograms (2 of mels) x (4 of frames) = 8.
VIEWS = Views(image=ImageView(size=16), text=TextView(max_tokens=12), audio=AudioView(frames=32, mels=16))
MODEL = ModelConfig(width=32, depth=2, heads=4, mlp_ratio=2.0, embed_dim=16, image_patch=4, audio_patch=8)
VOCABULARY = Vocabulary(size=40, pad_id=1, mask_id=4, special_ids=(0, 1, 2, 3, 4))


def encode_image(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode_sound(samples: npt.NDArray[Any], format_: str = "WAV", rate: int = 16_000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format_, **options)
    return file.getvalue()


def noise(length: int, seed: int = 0, level: float = 0.1) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(length) * level).astype(np.float32)


def members(number: int, modalities: str = "ita") -> dict[str, bytes]:
    """Members of sample ``number``: i image, t text, a audio; and its number as metadata."""
    made = {"json": json.dumps({"number": number, "label": number % 3}).encode()}
    if "i" in modalities:
        made["png"] = encode_image(noise_image(20, 12, number))
    if "t" in modalities:
        made["txt"] = f"{CAPTIONS[number % len(CAPTIONS)]} {number}".encode()
    if "a" in modalities:
        made["wav"] = encode_sound(noise(1000 + 100 * number, number))
    return made


def write_source(folder: Path, samples: list[dict[str, bytes]], per_shard: int = 3, **settings: Any) -> Source:
    """The samples as shards in ``folder``; sample i has the key ``k<i>``."""
    keyed: list[dict[str, bytes | str]] = [{"__key__": f"k{i}", **sample} for i, sample in enumerate(samples)]
    shards = write_shards(keyed, folder / "train", max_samples=per_shard)
    return Source([load_shard(path) for path in shards], **settings)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(CAPTIONS, 280)


def encoder(views: Views = VIEWS, model: ModelConfig = MODEL, seed: int = 0) -> Encoder:
    """An encoder whose biases and norms are random too, so that leaving one out is seen."""
    torch.manual_seed(seed)
    made = Encoder(model, views, VOCABULARY)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def spectrograms(n: int, seed: int = 0) -> Tensor:
    """(n, frames, mels)."""
    return torch.randn(n, 32, 16, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, L) ids ``<s> ... </s> <pad> ...`` of the given lengths, special tokens included, and their validity."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY.size, (len(lengths), max(lengths)), generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[:, 0] = 0
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return ids.masked_fill(~valid, VOCABULARY.pad_id), valid


def batch(presence: list[str], seed: int = 0) -> Batch:
    """A batch as the encoder reads it; ``presence`` has a string such as ``"it"`` per row (see `members`)."""
    rows = {letter: [row for row, letters in enumerate(presence) if letter in letters] for letter in "ita"}
    fields = {}
    if rows["i"]:
        fields["image"] = Field(images(len(rows["i"]), seed), torch.tensor(rows["i"]))
    if rows["t"]:
        ids, valid = texts([5 + row % 4 for row in rows["t"]], seed)
        fields["text"] = Field(ids, torch.tensor(rows["t"]), valid)
    if rows["a"]:
        fields["audio"] = Field(spectrograms(len(rows["a"]), seed), torch.tensor(rows["a"]))
    return Batch(fields, len(presence), [f"k{row}" for row in range(len(presence))])


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
