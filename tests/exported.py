"""What tests of exports share: what objectives learned, a checkpoint, and samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.decode import Waveform
from data.transforms import SAMPLE_RATE
from pretrain.exports.subject import Subject
from pretrain.exports.verify import Sample
from pretrain.model.encoder import Encoder
from tests.tiny import picture, tiny_encoder, tiny_tokenizer, tone

TEXTS = ["high", "one middle tone, played on an organ", "  a low tone ", "größer than\nthe vocabulary knows, and cut"]
ALL = [
    "image",
    "text",
    "audio",
    "text/masked_lm",
    "embed_image",
    "embed_text",
    "embed_audio",
    "image_text",
    "joint",
]


def learned(encoder: Encoder, sigmoid: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random objectives, as a checkpoint names them: contrastive, masked language, and one that no export reads."""
    generator = torch.Generator().manual_seed(seed)
    width, size = encoder.config.width, encoder.vocabulary.size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pairs = ("image_text", "image_audio", "text_audio")
    made = {f"contrastive.log_scale.{pair}": 2 + random(1) / 10 for pair in pairs}
    if sigmoid:
        made |= {f"contrastive.bias.{pair}": random(1) - 5 for pair in pairs}
    head = {"dense.weight": (width, width), "dense.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    made |= {f"masked_language.{name}": random(*shape) for name, shape in head.items()}
    return {**made, "masked_language.bias": random(size), "masked_region.decoders.image.mask": random(8)}


def subject(**settings: Any) -> Subject:
    """A random encoder with random objectives; ``settings`` of `tiny_encoder`."""
    tokenizer = tiny_tokenizer()
    encoder = tiny_encoder(tokenizer, **settings)
    return Subject(encoder, tokenizer, learned(encoder))


def samples() -> Sample:
    """Pictures that are not square, captions that are padded and cut, sounds that are padded and cut."""
    random = np.random.default_rng(0)
    # The view has 5360 samples.
    sounds = [tone(label % 3, random, SAMPLE_RATE, seconds) for label, seconds in enumerate((0.1, 0.25, 0.335, 0.6))]
    values: dict[str, list[Any]] = {
        "image": [np.asarray(picture(label % 3, random)) for label in range(4)],
        "text": [text.strip() for text in TEXTS],
        "audio": [Waveform(sound, SAMPLE_RATE) for sound in sounds],
    }
    return Sample(values, "a few samples")


def write_checkpoint(
    folder: Path,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    objectives: dict[str, Tensor],
    trained: Encoder | None = None,
) -> Path:
    """What an export reads of a checkpoint; with ``trained``, ``encoder`` is the average of its weights."""
    checkpoint = folder / "checkpoints" / "step-00000007"
    (checkpoint / "encoder").mkdir(parents=True)
    encoder.save(checkpoint / "encoder")
    tokenizer.save_pretrained(checkpoint / "encoder" / "tokenizer")
    save_file(objectives, checkpoint / "objectives.safetensors")
    if trained is not None:
        save_file(dict(trained.state_dict()), checkpoint / "trained.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"schema": 4, "step": 7}))
    fingerprint = {"seed": 5, "data.train.photos.samples": "48 in 2 shards, sha256 0123456789abcdef"}
    (checkpoint / "stream.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return checkpoint
