"""What programs of others hand over, as an encoder reads it; and these programs, where they are installed."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.batch import Batch, Field
from data.decode import MODALITIES, DecodeError, decode_image
from data.errors import UserError
from data.transforms import make_field
from eval.scored import EncoderError, Scored


class Inputs:
    """Decoded values in an encoder's deterministic views, and what it makes of them, on its device."""

    def __init__(self, scored: Scored) -> None:
        self.scored = scored
        views = scored.views.used.items()
        self._on_device = {name: view.on_device() for name, view in views if name not in scored.listens}

    def field(self, modality: str, values: Sequence[Any]) -> Field:
        """What `Scored.encode` takes.

        Args:
            modality: of all values.
            values: n of them, as a view decodes them: pixels (H, W, 3) uint8, texts, or `Waveform`.

        Raises:
            EncoderError: a modality that the encoder does not read.
        """
        view = self.scored.views.used.get(modality)
        if view is None:
            allowed = ", ".join(self.scored.modalities)
            raise EncoderError(f"{self.scored.name}: reads no {modality}; allowed are {allowed}")
        tokenizer: Any = self.scored.tokenizer  # None only where no view is of text
        shipped = Batch({modality: make_field(view, values, tokenizer)}, len(values), []).to(self.scored.device)
        if modality not in self._on_device:
            return shipped.fields[modality]
        made: Field = self._on_device[modality].to(self.scored.device)(shipped.fields[modality])
        return made

    def embeddings(self, modality: str, values: Sequence[Any]) -> Tensor:
        """(n, E) float32 in the space that modalities share, not normalised.

        Raises:
            EncoderError: a modality that the encoder does not read, or has no embeddings of.
        """
        return embedded(self.scored, modality, self.field(modality, values))


def embedded(scored: Scored, modality: str, field: Field) -> Tensor:
    """`Scored.embed`, (n, E) float32; raises an EncoderError where the encoder has no space that modalities share."""
    embeddings = scored.embed(modality, field)
    if embeddings is None:
        raise EncoderError(
            f"{scored.name}: has no embeddings of {modality}; allowed are a run, an export with a folder "
            f"embed_{modality}, and models of two modalities in one space"
        )
    return embeddings


def embed_pictures(inputs: Inputs, folder: Path, batch_size: int = 64) -> tuple[list[Path], Tensor]:
    """All pictures below a folder, decoded as training decodes them.

    Those that can't be read are left out, each with a line on stderr.

    Returns:
        their n paths in order, and (n, E) float32 on the CPU.

    Raises:
        UserError: there is no picture that can be read.
        EncoderError: the encoder has no embeddings of images.
    """
    paths, parts, waiting = list[Path](), list[Tensor](), list[npt.NDArray[np.uint8]]()
    for path, pixels in _pictures(folder):
        paths.append(path)
        waiting.append(pixels)
        if len(waiting) == batch_size:
            parts.append(inputs.embeddings("image", waiting).cpu())
            waiting.clear()
    if waiting:
        parts.append(inputs.embeddings("image", waiting).cpu())
    if not paths:
        allowed = ", ".join(f".{extension}" for extension, kind in MODALITIES.items() if kind == "image")
        raise UserError(f"{folder}: no picture below it that can be read; allowed are {allowed}")
    return paths, torch.cat(parts)


def _pictures(folder: Path) -> Iterator[tuple[Path, npt.NDArray[np.uint8]]]:
    for path in sorted(folder.rglob("*")):
        if MODALITIES.get(path.suffix.lower().removeprefix(".")) == "image" and path.is_file():
            try:
                yield path, decode_image(path.read_bytes())
            except DecodeError as error:
                print(f"{path}: left out: {error}", file=sys.stderr)


def outside(module: str, package: str) -> Any:
    """A module of a package that this project does not depend on.

    Raises:
        UserError: it is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{module} needs {error.name}, which is not installed: pip install {package}") from error
