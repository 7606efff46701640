"""Fine-tune the image stream of an export on a few labels, beside the same architecture from scratch.

    python examples/finetune_image.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --label label

Plain `transformers`, with its `Trainer`; one to two minutes on a single CPU core. ``--save FOLDER`` keeps the
model, for ``pipeline("image-classification", FOLDER)``.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from few_labels import PICTURES, Sample, Start, another_view, compare, part, pretrained, run, scratch, trainer
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


def as_pretrained(picture: Image.Image, margin: int, coarse: int | None) -> Image.Image:
    """A picture more like those that the encoder was trained on; `--margin` and `--coarse` say how.

    Raises:
        ValueError: nothing would be left of it.
    """
    if not 0 <= 2 * margin < min(picture.size) or (coarse is not None and coarse < 1):
        raise ValueError(f"--margin {margin}, --coarse {coarse}: nothing is left of a picture of {picture.size} pixels")
    part = picture.crop((margin, margin, picture.width - margin, picture.height - margin))
    if coarse is None:
        return part
    return part.resize((coarse, coarse), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


def fine_tune(given: argparse.Namespace) -> None:
    """Both starts, on the same pictures."""
    folder = part(given.export, "image")
    processor = AutoImageProcessor.from_pretrained(folder)

    def encode(sample: Sample, rng: random.Random | None) -> dict[str, Any]:
        picture = as_pretrained(sample.picture(), given.margin, given.coarse)
        if rng is not None:
            picture = another_view(picture, rng)
        return {"pixel_values": processor(picture, return_tensors="pt")["pixel_values"][0]}

    def starts(classes: Sequence[str]) -> Mapping[str, Start]:
        auto, rate = AutoModelForImageClassification, given.learning_rate
        return {
            "export": Start(lambda: pretrained(auto, folder, classes), rate),
            "scratch": Start(lambda: scratch(auto, folder, classes), rate),
        }

    compare(given, PICTURES, encode, starts, processor)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    made = trainer(__doc__)
    made.add_argument("--margin", type=int, default=0, help="pixels to cut off all around")
    made.add_argument("--coarse", type=int, metavar="SIZE", help="average to SIZE x SIZE pixels, then enlarge again")
    return run(fine_tune, made, argv)


if __name__ == "__main__":
    sys.exit(main())
