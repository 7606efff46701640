"""Fine-tune the audio stream of an export on a few labels, beside the same architecture from scratch.

    python examples/finetune_audio.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --label label

Plain `transformers`, with its `Trainer`; one to two minutes on a single CPU core. Sounds of any rate are
resampled to the extractor's. ``--save FOLDER`` keeps the model, for ``pipeline("audio-classification", FOLDER)``.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from few_labels import SOUNDS, Sample, Start, compare, part, pretrained, run, scratch, trainer
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification


def another_take(sample: Sample, rate: int, rng: random.Random) -> npt.NDArray[np.float32]:
    """A sound up to a seventh faster or slower, and up to a tenth of a second later."""
    sound = sample.sound(round(rate * rng.uniform(0.87, 1.15)))
    return np.pad(sound, (rng.randint(0, rate // 10), 0))


def fine_tune(given: argparse.Namespace) -> None:
    """Both starts, on the same sounds."""
    folder = part(given.export, "audio")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate

    def encode(sample: Sample, rng: random.Random | None) -> dict[str, Any]:
        sound = sample.sound(rate) if rng is None else another_take(sample, rate, rng)
        inputs = extractor(sound, sampling_rate=rate, return_tensors="pt")
        return {"input_values": inputs["input_values"][0]}

    def starts(classes: Sequence[str]) -> Mapping[str, Start]:
        auto, learning_rate = AutoModelForAudioClassification, given.learning_rate
        return {
            "export": Start(lambda: pretrained(auto, folder, classes), learning_rate),
            "scratch": Start(lambda: scratch(auto, folder, classes), learning_rate),
        }

    compare(given, SOUNDS, encode, starts, extractor)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    return run(fine_tune, trainer(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
