"""Frozen features: what an encoder, or no encoder at all, makes of every sample of a split."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.batches import Pass
from data.skips import Skips
from data.source import Source
from data.transforms import OnDevice
from pretrain.model.encoder import Encoder


class Features(NamedTuple):
    """One modality of one split, for the n samples that have it.

    Attributes:
        features: (n, D) float32, the encoder's pooled output.
        embeddings: (n, E) float32, its projection, not normalised.
        raw: (n, R) float32, the input itself, at most some thousand values.
        labels: (n,) int64.
        content: (n,) int64, equal for samples with the same input: these are not independent observations.
    """

    features: Tensor
    embeddings: Tensor
    raw: Tensor
    labels: Tensor
    content: Tensor


def extract(
    encoders: Sequence[Encoder],
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    labels: list[int],
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[dict[str, Features]]:
    """Features of every sample, in the deterministic views, in float32; read once for all encoders.

    Samples that can't be used are left out, counted and printed.

    Args:
        encoders: of one architecture; moved to ``device`` and put into evaluation mode. Their views say what is read.
        tokenizer: the one that they were trained with.
        source: the split.
        labels: of every sample, in the order of the shards.
        device: where the encoders run.
        batch_size: samples per pass.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        per encoder: modality -> Features on the CPU, for the modalities that occur.
    """
    encoders = [encoder.to(device).eval() for encoder in encoders]
    views, vocabulary_size = encoders[0].views, encoders[0].vocabulary.size
    on_device = OnDevice(views).to(device)
    all_labels = torch.tensor(labels)
    parts: list[dict[str, list[Features]]] = [{} for _ in encoders]
    first, skips = 0, Skips()
    for batch in Pass(source, views, tokenizer, batch_size).batches(workers):
        for name, field in on_device(batch.to(device)).fields.items():
            raw = RAW_INPUTS[name](field, vocabulary_size).cpu()
            content = content_ids(batch.fields[name])
            for encoder, part in zip(encoders, parts, strict=True):
                with torch.inference_mode():
                    features, embeddings = encoder(name, field)
                part.setdefault(name, []).append(
                    Features(features.cpu(), embeddings.cpu(), raw, all_labels[field.rows + first], content)
                )
        first += batch.size
        skips.add(batch.skipped, batch.size)
    if skips.total:
        print(f"{source.name}: {skips.total} of {first} samples can't be scored:\n{skips.table()}", flush=True)
    return [
        {name: Features(*map(torch.cat, zip(*several, strict=True))) for name, several in part.items()}
        for part in parts
    ]


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


# Modality -> (n, R) float32 vectors of the input itself, a baseline that no encoder touched.
RAW_INPUTS: dict[str, Callable[[Field, int], Tensor]] = {"image": raw_image, "text": raw_text, "audio": raw_audio}


def content_ids(field: Field) -> Tensor:
    """(n,) int64, equal for rows whose input is equal, whatever the length that their batches were padded to."""
    rows = list(field.x.cpu())
    if field.valid is not None:
        rows = [row[valid] for row, valid in zip(rows, field.valid.cpu(), strict=True)]
    digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests])  # 63 bits fit an int64
