"""What can be scored: runs, checkpoints, exports, any `transformers` model, random weights, and no encoder at all.

ENCODER is one of
    runs/digits, runs/digits/checkpoints/last        a run's newest checkpoint, or one of them
    exported, exported/image                         an export: a stock model per modality, or one of them
    some/folder, or a hub id                         any vision, text or audio model of `transformers` in safetensors,
                                                     or two in one space (CLIP, SigLIP, CLAP, a dual encoder)
    random:ENCODER                                   the same architecture with random weights, always the same ones
    raw:ENCODER                                      the inputs that ENCODER reads, themselves
    raw:                                             the inputs in the default views, captions as bytes
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.errors import UserError
from data.text import load_tokenizer, train_tokenizer
from data.transforms import Views
from eval.scored import LAST, Encoded, EncoderError, Scored, always_the_same, read_config, tensors_digest
from eval.stock import Exported, Stock
from pretrain.model.encoder import Encoder


class Pretrained(Scored):
    """The encoder of a checkpoint."""

    def __init__(self, name: str, encoder: Encoder, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.name, self.encoder, self.tokenizer, self.views = name, encoder, tokenizer, encoder.views

    @classmethod
    def find(cls, name: str) -> "Pretrained | None":
        """From a run, a checkpoint or its ``encoder`` folder; None if ``name`` is none of these."""
        path = Path(name)
        newest = sorted(path.glob("checkpoints/step-????????"))[-1:]  # where links can't be made, there is no `last`
        places = [path, path / "encoder", *(each / "encoder" for each in (path / "checkpoints" / "last", *newest))]
        folder = next((each for each in places if "vocabulary" in read_config(each)), None)
        if folder is None:
            return None
        try:
            encoder, tokenizer = Encoder.load(folder), load_tokenizer(folder / "tokenizer")
        except (OSError, UserError) as error:
            raise EncoderError(f"{name}: {error}") from error
        tensors = len(encoder.state_dict())
        print(f"{name}: loaded {tensors}/{tensors} tensors", flush=True)
        return cls(name, encoder, tokenizer)

    def random(self) -> "Pretrained":
        """The same architecture."""
        with always_the_same():
            encoder = Encoder(self.encoder.config, self.encoder.views, self.encoder.vocabulary)
        return Pretrained(f"random:{self.name}", encoder, self.tokenizer)

    def _identity(self) -> Any:
        encoder = self.encoder
        return [asdict(encoder.config), encoder.vocabulary, tensors_digest(encoder.state_dict())]

    def _modules(self) -> Sequence[nn.Module]:
        return [self.encoder]

    def _encode(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        blocks = list(self.encoder.blocks)
        if set(layers) <= {LAST, len(blocks)} and set(poolings) <= {"default"}:
            features, embeddings = self.encoder(modality, field)  # computes no states that are not read
            return Encoded(dict.fromkeys(((layer, "default") for layer in layers), features), embeddings)
        states: list[Tensor] = []
        hooks = [blocks[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))]
        hooks += [block.register_forward_hook(lambda _, __, made: states.append(made)) for block in blocks]
        try:
            final = self.encoder.encode(modality, field)
        finally:
            for hook in hooks:
                hook.remove()
        pooled = self.encoder.pool(modality, final)
        tokenizer: Any = self.encoder.tokenizers[modality]
        valid = None
        if modality == "text":
            valid = torch.ones_like(field.x, dtype=torch.bool) if field.valid is None else field.valid
        features = self._pool([*states[:-1], final], pooled, layers, poolings, tokenizer.prefix_tokens, valid)
        return Encoded(features, self.encoder.project(modality, pooled))


class Raw(Scored):
    """The inputs themselves: a baseline that no encoder touched."""

    def __init__(self, name: str, views: Views, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.name, self.views, self.tokenizer = name, views, tokenizer

    @classmethod
    def of(cls, scored: Scored) -> "Raw":
        """What ``scored`` reads."""
        return cls(f"raw:{scored.name}", scored.views, scored.tokenizer)

    def random(self) -> Scored:
        """There is nothing to be drawn."""
        raise EncoderError(f"random:{self.name}: inputs have no weights")

    def _identity(self) -> Any:
        return None

    def _modules(self) -> Sequence[nn.Module]:
        return []

    def _encode(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        features = RAW_INPUTS[modality](field, 0 if self.tokenizer is None else len(self.tokenizer))
        return Encoded({(layer, pooling): features for layer in layers for pooling in poolings}, None)


def raw_image(field: Field, _: int) -> Tensor:
    """Pixels, averaged down to at most 16x16."""
    side = min(16, field.x.shape[-1])
    return F.adaptive_avg_pool2d(field.x, side).flatten(1)


def raw_text(field: Field, vocabulary_size: int) -> Tensor:
    """How often each token occurs, ids modulo 4,096."""
    buckets = min(vocabulary_size, 4096)
    counts = torch.zeros(len(field.x), buckets, device=field.x.device)
    ones = torch.ones_like(field.x, dtype=counts.dtype) if field.valid is None else field.valid.to(counts.dtype)
    return counts.scatter_add_(1, field.x % buckets, ones)


def raw_audio(field: Field, _: int) -> Tensor:
    """The log-mel spectrogram, averaged over 12 stretches of time."""
    return F.adaptive_avg_pool1d(field.x.transpose(1, 2), 12).flatten(1)


# Modality -> (n, R) float32 vectors of the input itself.
RAW_INPUTS: dict[str, Callable[[Field, int], Tensor]] = {"image": raw_image, "text": raw_text, "audio": raw_audio}


def load_scored(name: str) -> Scored:
    """What an ENCODER means, see the top of this file; on the CPU.

    Raises:
        EncoderError: nothing that can be scored, or not all of its tensors.
    """
    for prefix, make in PREFIXES.items():
        if name.startswith(prefix):
            return make(name.removeprefix(prefix))
    for kind in KINDS:
        if (found := kind.find(name)) is not None:
            return found
    raise EncoderError(
        f"{name}: neither a run (checkpoints/), a checkpoint (encoder/), an export (image/, text/ or audio/) nor a "
        f"model of transformers (config.json); before one of these {' or '.join(PREFIXES)} is allowed"
    )


def _raw(name: str) -> Raw:
    if name:
        return Raw.of(load_scored(name))
    return Raw("raw:", Views(), train_tokenizer([], 261))  # 256 bytes and the special tokens


# The first that knows a name takes it; the last takes hub ids, too.
KINDS: tuple[type[Pretrained | Stock], ...] = (Pretrained, Exported, Stock)
PREFIXES: dict[str, Callable[[str], Scored]] = {"random:": lambda name: load_scored(name).random(), "raw:": _raw}
