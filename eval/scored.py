"""An encoder as evaluation sees it, whatever its kind; the kinds are in eval/encoders.py."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.errors import UserError
from data.transforms import Views

CODE = 1
"""Of the code that makes features, here, in encoders.py, stock.py and features.py, in data/ and in pretrain/model/:
raise it where features change, and none that were kept are used again."""
LAST = -1
POOLINGS = ("default", "cls", "mean")
_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "soundfile", "soxr")


class EncoderError(UserError):
    """What can't be scored; names it, what is wrong and what is allowed."""


class Encoded(NamedTuple):
    """What an encoder makes of n inputs.

    Attributes:
        features: (layer, pooling) -> (n, D) float32.
        embeddings: (n, E) float32 in the space that modalities share, or None where there is none.
    """

    features: dict[tuple[int, str], Tensor]
    embeddings: Tensor | None


class Scored(ABC):
    """An encoder as evaluation sees it.

    Attributes:
        name: as it was asked for.
        views: how its inputs are read; a modality that it has none for is None.
        tokenizer: of its captions; None without text.
        listens: modalities that ``encode`` takes as the loader's worker ships them, without `OnDevice`.
        device: where it runs.
    """

    name: str
    views: Views
    tokenizer: PreTrainedTokenizerBase | None
    listens: frozenset[str] = frozenset()
    device = torch.device("cpu")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it reads."""
        return tuple(self.views.used)

    @property
    def reading(self) -> dict[str, Any]:
        """All that decides how a sample is read: views, tokenizer and the versions of the code, for JSON."""
        tokenizer = None if self.tokenizer is None else tokenizer_digest(self.tokenizer)
        versions = {name: version(name) for name in _LIBRARIES}
        return {"code": CODE, "versions": versions, "views": asdict(self.views), "tokenizer": tokenizer}

    @property
    def fingerprint(self) -> str:
        """Changes with any weight, with the architecture, with how inputs are read, and with the code's version."""
        return digest({"class": type(self).__name__, "reading": self.reading, "identity": self._identity()})

    def to(self, device: torch.device) -> Self:
        """Itself, moved to ``device``."""
        self.device = device
        for module in self._modules():
            module.to(device)
        return self

    @torch.inference_mode()
    def encode(
        self, modality: str, field: Field, layers: Sequence[int] = (LAST,), poolings: Sequence[str] = ("default",)
    ) -> Encoded:
        """Features of all wanted layers and poolings from one pass, in evaluation mode and without gradients.

        Args:
            modality: one of ``modalities``.
            field: of n samples on ``device``, as `OnDevice` gives it, or as it is shipped, see ``listens``.
            layers: 0 is the input of the first block, i the output of the i-th; negative ones count from the end, of
                which -1 is the model's output, after its last norm if it has one.
            poolings: ``default`` is the model's own, of the last layer only; ``cls`` the first token; ``mean`` that of
                the patches, the frames or the tokens that are no padding.

        Raises:
            EncoderError: a layer, pooling or modality that it does not have.
        """
        if modality not in self.modalities:
            raise EncoderError(f"{self.name}: reads no {modality}; allowed are {', '.join(self.modalities)}")
        for pooling in poolings:
            if pooling not in POOLINGS:
                raise EncoderError(f"pooling={pooling}: allowed are {', '.join(POOLINGS)}")
        for module in self._modules():
            module.eval()
        found = self._encode(modality, field, layers, poolings)
        features = {key: x.float() for key, x in found.features.items()}
        return Encoded(features, None if found.embeddings is None else found.embeddings.float())

    def embed(self, modality: str, field: Field) -> Tensor | None:
        """(n, E) float32 in the space that modalities share; None where there is none."""
        return self.encode(modality, field).embeddings

    @abstractmethod
    def random(self) -> "Scored":
        """The same architecture with random weights, always the same ones; on the CPU."""

    @abstractmethod
    def _identity(self) -> Any:
        """What it is beyond its class and how it reads, for JSON."""

    @abstractmethod
    def _modules(self) -> Sequence[nn.Module]:
        """All that has weights."""

    @abstractmethod
    def _encode(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        """``encode`` of what was checked."""

    def _pool(
        self,
        states: Sequence[Tensor],
        pooled: Tensor | None,
        layers: Sequence[int],
        poolings: Sequence[str],
        prefix: int,
        valid: Tensor | None,
    ) -> dict[tuple[int, str], Tensor]:
        """(layer, pooling) -> (n, D), from the states (n, N, D) of all layers, or of the last one alone.

        Args:
            states: of layer 0 first.
            pooled: the model's own pooling of the last layer.
            layers: which.
            poolings: which.
            prefix: how many first tokens are no patches; text has none.
            valid: (n, N) bool, False for padding; None: nothing is padded.
        """
        features = {}
        for layer in layers:
            if not -len(states) <= layer < len(states):
                allowed = f"0 to {len(states) - 1}, or {-len(states)} to -1"
                raise EncoderError(f"{self.name}: has no layer {layer}; allowed is {allowed}")
            x = states[layer]
            for pooling in poolings:
                if pooling == "default":
                    if layer % len(states) != len(states) - 1 or pooled is None:
                        raise EncoderError(
                            f"{self.name}: pooling=default is that of the last layer; of layer {layer} cls and mean "
                            "can be had"
                        )
                    features[layer, pooling] = pooled
                elif pooling == "cls":
                    if prefix == 0 and valid is None:
                        raise EncoderError(f"{self.name}: has no class token; allowed poolings are default and mean")
                    features[layer, pooling] = x[:, 0]
                else:
                    features[layer, pooling] = x[:, prefix:].mean(1) if valid is None else masked_mean(x, valid)
        return features


def masked_mean(states: Tensor, valid: Tensor) -> Tensor:
    """(n, N, D) -> (n, D), over the tokens that are valid (n, N) bool."""
    return (states * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def digest(what: Any) -> str:
    """Hex sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of the names, types, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of a fast tokenizer, whatever it was asked to pad or cut last."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = {key: value for key, value in settings.items() if key not in ("padding", "truncation")}
    return digest([settings, tokenizer.pad_token_id, len(tokenizer)])


@contextmanager
def always_the_same() -> Iterator[None]:
    """Random weights of always the same seed; the generator goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def read_config(folder: Path) -> dict[str, Any]:
    """A model's ``config.json``; empty without one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise EncoderError(f"{path}: no JSON: {error}") from error
    return config if isinstance(config, dict) else {}
