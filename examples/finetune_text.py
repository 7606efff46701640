"""Fine-tune the text stream of an export on a few labels, beside the same architecture from scratch.

    python examples/finetune_text.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --label label

Plain `transformers`, with its `Trainer`; one to two minutes on a single CPU core. Captions that were trained on are
not scored. ``--save FOLDER`` keeps the model, for ``pipeline("text-classification", FOLDER)``.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from few_labels import TEXTS, Sample, Start, compare, part, pretrained, run, scratch, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def fine_tune(given: argparse.Namespace) -> None:
    """Both starts, on the same captions."""
    folder = part(given.export, "text")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(sample: Sample, _: random.Random | None) -> dict[str, Any]:
        tokens = tokenizer(sample.text(), padding="max_length", truncation=True)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def starts(classes: Sequence[str]) -> Mapping[str, Start]:
        auto, rate = AutoModelForSequenceClassification, given.learning_rate
        return {
            "export": Start(lambda: pretrained(auto, folder, classes), rate),
            "scratch": Start(lambda: scratch(auto, folder, classes), rate),
        }

    compare(given, TEXTS, encode, starts, tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    return run(fine_tune, trainer(__doc__, labels=20, views=1), argv)


if __name__ == "__main__":
    sys.exit(main())
