"""Adapt the image stream of an export with LoRA: small matrices are trained beside its weights, which stay as they are.

    pip install -e '.[lora]'
    python examples/lora.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --label label --save adapter

LoRA: Hu et al., 2021, by `peft`. Beside it the same architecture from scratch, with all weights trained. ``--save``
keeps the adapter alone: the export is read again with ``PeftModel.from_pretrained(model, "adapter")``.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from few_labels import PICTURES, Sample, Start, another_view, compare, part, pretrained, run, scratch, trainer
from transformers import AutoImageProcessor, AutoModelForImageClassification

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # of each block of ViTModel


def adapted(model: Any, rank: int) -> Any:
    """A model of which only the new head and matrices of ``rank`` beside each linear layer learn.

    Raises:
        ValueError: `peft` is not installed, or no such rank.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install -e '.[lora]'") from error
    if rank < 1:
        raise ValueError(f"--rank {rank}: 1 or more is allowed")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, modules_to_save=["classifier"])
    return get_peft_model(model, config)


def learning(model: Any) -> int:
    """How many numbers of a model are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fine_tune(given: argparse.Namespace) -> None:
    """Both starts, on the same pictures."""
    folder = part(given.export, "image")
    processor = AutoImageProcessor.from_pretrained(folder)
    auto = AutoModelForImageClassification

    def encode(sample: Sample, rng: random.Random | None) -> dict[str, Any]:
        picture = sample.picture() if rng is None else another_view(sample.picture(), rng)
        return {"pixel_values": processor(picture, return_tensors="pt")["pixel_values"][0]}

    def starts(classes: Sequence[str]) -> Mapping[str, Start]:
        return {
            "LoRA": Start(lambda: adapted(pretrained(auto, folder, classes), given.rank), given.lora_rate),
            "scratch": Start(lambda: scratch(auto, folder, classes), given.learning_rate),
        }

    for name, start in starts(["one", "another"]).items():
        print(f"{name}: {learning(start.build()):,} numbers to learn, for two classes")
    compare(given, PICTURES, encode, starts, processor)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    made = trainer(__doc__)
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--lora-rate", type=float, default=5e-3, help="learning rate with LoRA")
    return run(fine_tune, made, argv)


if __name__ == "__main__":
    sys.exit(main())
