"""An encoder of text under MTEB's encoder protocol, so that `mteb` scores it; for releases of mteb from 2.0 on.

    pip install mteb
    python -c "import mteb; from eval.adapters.mteb import MtebEncoder
    mteb.evaluate(MtebEncoder('exported'), mteb.get_tasks(tasks=['STSBenchmark', 'Banking77Classification']))"

The encoder is whatever evaluation takes, see eval/encoders.py. ``exported`` gives the text's embedding, which is
compared with pictures and sounds, and ``exported/text`` the feature that probes read. MTEB keeps results by the name
and the revision of a model: the revision is the encoder's fingerprint, so that new weights are not taken for old ones.

Source: Muennighoff et al. 2023, MTEB: Massive Text Embedding Benchmark.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.adapters.inputs import Inputs, outside
from eval.encoders import load_scored
from eval.scored import LAST, EncoderError


class MtebEncoder:
    """`mteb.EncoderProtocol`: sentences to vectors, compared by cosine. Instructions and prompts are not used."""

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **_: Any) -> None:
        """The encoder ``model_name``, on a GPU if there is one and ``device`` names no other.

        Raises:
            EncoderError: nothing that can be scored, or that does not read text.
        """
        scored = load_scored(model_name).to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        self.inputs = Inputs(scored)
        self.revision = revision or scored.fingerprint[:16]
        self.embed_dim = self._vectors([""]).shape[1]

    def encode(self, inputs: Iterable[Mapping[str, Any]], **settings: Any) -> npt.NDArray[np.float32]:
        """(n, D) float32: embeddings, or features where the encoder has no space that modalities share.

        Args:
            inputs: mteb's loader, whose batches hold a list of sentences under ``text``.
            settings: ``task_metadata``, ``hf_split``, ``hf_subset``, ``prompt_type`` and so on, which change nothing.

        Raises:
            EncoderError: batches without text, or a ``precision`` other than float32.
        """
        if settings.get("precision") not in (None, "float32"):
            raise EncoderError(f"precision={settings['precision']}: allowed is float32")
        parts = []
        for batch in inputs:
            if "text" not in batch:
                raise EncoderError(f"{self.inputs.scored.name}: inputs of {', '.join(batch)}; allowed is text")
            parts.append(self._vectors(list(batch["text"])).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines (n, m) of (n, D) and (m, D), arrays or tensors; a single (D,) is one row."""
        rows, columns = (x if x.dim() > 1 else x[None] for x in (_units(embeddings1), _units(embeddings2)))
        return rows @ columns.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines (n,) of the rows of (n, D) and (n, D)."""
        return (_units(embeddings1) * _units(embeddings2)).sum(-1)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """`mteb.models.ModelMeta`: name, revision, width and how vectors are compared."""
        meta = outside("mteb.models.model_meta", "mteb")
        scored = self.inputs.scored
        return meta.ModelMeta.create_empty(
            {
                "name": "triptych/" + re.sub(r"[^\w.-]+", "-", scored.name).strip("-"),
                "revision": self.revision,
                "embed_dim": self.embed_dim,
                "max_tokens": None if scored.views.text is None else scored.views.text.max_tokens,
                "similarity_fn_name": meta.ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

    def _vectors(self, texts: list[str]) -> Tensor:
        encoded = self.inputs.scored.encode("text", self.inputs.field("text", texts))
        return encoded.features[LAST, "default"] if encoded.embeddings is None else encoded.embeddings


def _units(embeddings: Any) -> Tensor:
    return F.normalize(torch.as_tensor(embeddings).float(), dim=-1)
