"""Features of the joint pass: what the encoder makes of all modalities of a sample together."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.batches import Pass
from data.source import Source
from data.transforms import OnDevice
from eval.fusion import Part
from pretrain.model.encoder import Encoder


def joint_features(
    encoders: Sequence[Encoder],
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source,
    sets: Sequence[Sequence[str]],
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[list[Part]]:
    """Of the samples that have all of the encoders' modalities; the split is read once.

    A modality's share in a joint pass is pooled as it is alone, and all are put side by side in its place; that of one
    which is left out is zeros.

    Args:
        encoders: of one architecture and with the same views; moved to ``device`` and put into evaluation mode.
        tokenizer: the one that they were trained with.
        source: the split.
        sets: of modalities; each makes a pass of its own.
        device: where the encoder runs.
        batch_size: samples per pass.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        per encoder, for each of ``sets``: features (n, M * D) float32 on the CPU, M the number of modalities, and rows.
    """
    for encoder in encoders:
        encoder.to(device).eval()
    views, width = encoders[0].views, encoders[0].config.width
    on_device, names = OnDevice(views).to(device), list(views.used)
    found: list[list[list[torch.Tensor]]] = [[[] for _ in sets] for _ in encoders]
    rows: list[torch.Tensor] = []
    first = 0
    reading: Any = tokenizer  # None only where no view is of text
    for batch in Pass(source, views, reading, batch_size).batches(workers):
        fields = on_device(batch.to(device)).fields
        has = torch.zeros(batch.size, dtype=torch.int64)
        for each in fields.values():
            has[each.rows] += 1
        complete = (has == len(names)).nonzero()[:, 0]
        if len(fields) == len(names) and len(complete):
            chosen = {
                name: each.select(torch.isin(each.rows, complete).nonzero()[:, 0]) for name, each in fields.items()
            }
            zeros = torch.zeros(len(complete), width)
            for encoder, of_encoder in zip(encoders, found, strict=True):
                for wanted, parts in zip(sets, of_encoder, strict=True):
                    with torch.inference_mode():
                        states = encoder.trunk({name: encoder.tokens(name, chosen[name]) for name in wanted})
                        pooled = {name: encoder.pool(name, each) for name, each in states.items()}
                    parts.append(torch.cat([pooled[n].float().cpu() if n in pooled else zeros for n in names], dim=1))
            rows.append(complete + first)
        first += batch.size
    places, nothing = torch.cat([torch.zeros(0, dtype=torch.int64), *rows]), torch.zeros(0, len(names) * width)
    return [[Part(torch.cat([nothing, *parts]), places) for parts in of_encoder] for of_encoder in found]
