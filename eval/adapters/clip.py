"""An encoder of pictures and captions as CLIP_benchmark's loaders give one, so that CLIP_benchmark scores it.

    pip install clip-benchmark "numpy<2.4"
    python -m eval.adapters.clip eval --model_type triptych --model mine --pretrained exported \\
        --dataset cifar10 --task zeroshot_classification --no_amp --output 'mine_{dataset}_{task}.json'

Its release 1.6.2 makes numbers of arrays of one number, which NumPy 2.4 refuses.
All that follows ``eval.adapters.clip`` are options of ``clip_benchmark``. ``--pretrained`` is whatever evaluation takes
and has embeddings of both, see eval/encoders.py; ``--model`` is only the name in the results. In scripts `load` gives
what `open_clip.create_model_and_transforms` and `get_tokenizer` give.

Source: Cherti & Beaumont 2022, CLIP benchmark; for the interface Ilharco et al. 2021, OpenCLIP.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data.batch import Batch, Field
from data.errors import UserError
from data.transforms import ImageView, TextView, make_field
from eval.adapters.inputs import embedded, outside
from eval.encoders import load_scored
from eval.scored import EncoderError, Scored

MODEL_TYPE = "triptych"


class ClipModel(nn.Module):
    """Pictures and captions in one space; it has no parameters of its own."""

    def __init__(self, scored: Scored) -> None:
        super().__init__()
        self.scored = scored

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(n, 3, size, size) float32 of the transform -> (n, E) float32, of length 1 if ``normalize``."""
        field = Field(image.to(self.scored.device), torch.arange(len(image)))
        embeddings = embedded(self.scored, "image", field)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def encode_text(self, text: Batch, normalize: bool = False) -> Tensor:
        """n captions of the tokenizer -> (n, E) float32, likewise."""
        embeddings = embedded(self.scored, "text", text.to(self.scored.device).fields["text"])
        return F.normalize(embeddings, dim=-1) if normalize else embeddings


class Transform:
    """A picture as the encoder reads it; on the CPU, and small enough to be sent to a loader's workers."""

    def __init__(self, view: ImageView) -> None:
        self.view, self.on_device = view, view.on_device()

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size) float32, resized without regard to the aspect ratio."""
        tokenizer: Any = None  # pixels need none
        made: Field = self.on_device(make_field(self.view, [np.array(image.convert("RGB"))], tokenizer))
        return made.x[0]


class Captions:
    """Captions as tokens: what it gives goes to ``encode_text``, and has ``to`` for a device."""

    def __init__(self, view: TextView, tokenizer: PreTrainedTokenizerBase) -> None:
        self.view, self.tokenizer = view, tokenizer

    def __call__(self, texts: str | Sequence[str]) -> Batch:
        """A caption, or n of them."""
        several = [texts] if isinstance(texts, str) else list(texts)
        return Batch({"text": make_field(self.view, several, self.tokenizer)}, len(several), [])


def load(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[ClipModel, Transform, Captions]:
    """Model, transform and tokenizer, as a loader of CLIP_benchmark.

    Args:
        model_name: the name that results get; changes nothing.
        pretrained: the encoder: a run, a checkpoint, an export, CLIP, SigLIP or a dual encoder, by path or hub id.
        cache_dir: not used: `transformers` has its own.
        device: where the model runs.

    Raises:
        EncoderError: nothing that can be scored, or no embeddings of pictures or of captions.
    """
    scored = load_scored(pretrained).to(torch.device(device))
    image, text, tokenizer = scored.views.image, scored.views.text, scored.tokenizer
    if image is None or text is None or tokenizer is None:
        raise EncoderError(f"{pretrained}: reads {', '.join(scored.modalities)}; image and text are needed")
    model, transform, captions = ClipModel(scored), Transform(image), Captions(text, tokenizer)
    model.encode_image(transform(Image.new("RGB", (image.size, image.size)))[None])
    model.encode_text(captions(""))  # what can't be embedded is refused before any data set is read
    return model, transform, captions


def register() -> Any:
    """Make CLIP_benchmark know ``--model_type triptych``; returns its command line's module.

    Raises:
        UserError: it is not installed.
    """
    models = outside("clip_benchmark.models", "clip-benchmark")
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    return outside("clip_benchmark.cli", "clip-benchmark")


def main() -> int:
    """CLIP_benchmark's command line; returns the exit code, 2 for users' mistakes."""
    try:
        register().main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
