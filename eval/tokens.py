"""States of every token, for probes that pool them on their own."""

import torch
from torch import Tensor

from data.batches import Pass
from data.errors import UserError
from data.source import Source
from data.transforms import OnDevice
from eval.attentive import TokenSplit
from eval.encoders import Pretrained

MOST_BYTES = 8_000_000_000
"""Of a split's states of one modality, which are held in memory."""


class TokenError(UserError):
    """More token states than there should be room for."""


def token_splits(
    scored: Pretrained, source: Source, labels: Tensor, device: torch.device, batch_size: int, workers: int
) -> dict[str, tuple[TokenSplit, Tensor]]:
    """The last layer's states of all tokens but the prefix ones, in float16 on the CPU, of every sample of a split.

    Args:
        scored: the encoder, moved to ``device``.
        source: the split.
        labels: (N,) of every sample, in the order of the shards.
        device: where the encoder runs.
        batch_size: samples per pass.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        modality -> states (n, T, D) with labels, texts padded to the longest that the view allows, and rows (n,).

    Raises:
        TokenError: they would take more than ``MOST_BYTES``.
    """
    encoder = scored.to(device).encoder.eval()
    on_device = OnDevice(encoder.views).to(device)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    first = 0
    reading = scored.tokenizer
    for batch in Pass(source, encoder.views, reading, batch_size).batches(workers):  # type: ignore[arg-type]
        for name, field in on_device(batch.to(device)).fields.items():
            with torch.inference_mode():
                states = encoder.encode(name, field)
            prefix = encoder.get_submodule(f"tokenizers.{name}").prefix_tokens
            if not isinstance(prefix, int):
                raise TypeError(f"tokenizers.{name}.prefix_tokens is {prefix!r}")
            states, valid = states[:, prefix:].half().cpu(), None
            if (view := encoder.views.text) is not None and name == "text":
                valid = torch.zeros(len(states), view.max_tokens, dtype=torch.bool)
                valid[:, : states.shape[1]] = True if field.valid is None else field.valid.cpu()
                states = torch.nn.functional.pad(states, (0, 0, 0, view.max_tokens - states.shape[1]))
            needed = states[0].numel() * states.element_size() * len(list(source.places()))
            if first == 0 and needed > MOST_BYTES:
                raise TokenError(
                    f"attentive/{name}: the token states of {source.name} would take {needed / 1e9:.0f} GB of memory, "
                    f"at most {MOST_BYTES / 1e9:.0f} are allowed: use fewer samples"
                )
            parts.setdefault(name, []).append((states, field.rows + first, valid))
        first += batch.size
    found = {}
    for name, several in parts.items():
        states, rows = (torch.cat([part[i] for part in several]) for i in (0, 1))  # type: ignore[misc]
        valid = None if name != "text" else torch.cat([part[2] for part in several if part[2] is not None])
        found[name] = TokenSplit(states, labels[rows], valid), rows
    return found
