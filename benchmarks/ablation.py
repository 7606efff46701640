"""Which objectives, targets and shared weights pay: every variant for the same time on the same data, several seeds.

    python benchmarks/ablation.py --data ../shared/data                      # hours on 2 CPU cores
    python benchmarks/ablation.py --data ../shared/data --seconds 20 --seeds 1 --only contrastive all   # a quick look

Data: folders `digits` (real-train-*.tar, real-val-*.tar: image, text and sound, paired by class) and `clipart`
(clipart-train-*.tar, clipart-val-*.tar: image and text). A variant's steps are as many as fit into --seconds, measured
on its own first steps; the learning rate falls to 0 over them. Of the validation shards, every other sample serves to
choose the probes' regularisation, the rest is what they are scored on, by encoders that never saw either. Mean and
spread (standard deviation) over seeds. The last line is one JSON object: data -> variant -> score -> [mean, spread].
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from data.index import find_shards, load_shards
from data.shards import write_shards
from data.source import Source
from data.stream import open_split
from eval.report import Results
from eval.run import evaluate
from pretrain.checkpoint import load_encoder
from pretrain.config import Config, load_config
from pretrain.engine import pretrain

# Variant -> settings that differ from the base.
ONLY_CONTRASTIVE = ["objectives.masked_language.weight=0", "objectives.masked_region.weight=0"]
VARIANTS: dict[str, list[str]] = {
    "contrastive": ONLY_CONTRASTIVE,
    "contrastive + language": ["objectives.masked_region.weight=0"],
    "contrastive + region": ["objectives.masked_language.weight=0"],
    "all": [],
    "all, latent targets": ["objectives.masked_region.target=latent"],
    "all, kl targets": ["objectives.masked_region.target=kl"],
    "all, sharing ffn": ["model.sharing=ffn"],
    "all, sharing none": ["model.sharing=none"],
    "contrastive, sharing none": [*ONLY_CONTRASTIVE, "model.sharing=none"],
}
DIGITS = """
data:
  views:
    image: {size: 32, crop_scale: 0.7, load: 32}
    text: {max_tokens: 16}
    audio: {frames: 96, mels: 64, speed: 0.12, shift: 0.15, noise: 0.1, gain: 6}
tokenizer: {train: 300}
model: {preset: micro, embed_dim: 64}
objectives:
  masked_region: {decoder_width: 64, decoder_depth: 1}
  keep: {image: 0.75, audio: 0.5}
  joint_keep: {image: 0.5, audio: 0.5}
  joint_share: 0.25
train: {batch_size: 128, learning_rate: 2.0e-3, warmup: 0.1}
eval:
  label: label
  classes: [zero, one, two, three, four, five, six, seven, eight, nine]
  templates: ["the number {}", "digit: {}", "this is a {}"]
"""
CLIPART = """
data:
  views:
    image: {size: 64, crop_scale: 0.5, flip: true}
    text: {max_tokens: 32}
    audio: null
tokenizer: {train: 2000}
model: {preset: micro, embed_dim: 64}
objectives:
  masked_region: {decoder_width: 64, decoder_depth: 1}
  keep: {image: 0.5}
  joint_keep: {image: 0.25}
  joint_share: 0.25
train: {batch_size: 128, learning_rate: 1.0e-3, warmup: 0.1}
eval: {label: label}
"""
# Data -> recipe, folder, shards to train on and to judge by, scores.
SETS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "digits": (
        DIGITS,
        "digits",
        "real-train-*.tar",
        "real-val-*.tar",
        ("linear/image", "linear/audio", "zeroshot/image", "zeroshot/audio"),
    ),
    "clipart": (CLIPART, "clipart", "clipart-train-*.tar", "clipart-val-*.tar", ("linear/image",)),
}
CALIBRATION = 12


def halves(shards: list[str], folder: Path) -> None:
    """Write the even samples as ``val-*.tar`` and the odd ones as ``test-*.tar``."""
    source = Source(load_shards(find_shards(shards)))

    def every_other(first: int) -> Iterator[dict[str, bytes | str]]:
        for shard, number in list(source.places())[first::2]:
            yield {"__key__": source.sample(shard, number).key, **source.contents(shard, number)}

    for name, first in (("val", 0), ("test", 1)):
        list(write_shards(every_other(first), folder / name, max_samples=1000))


def steps_for(config: Config, seconds: float, scratch: Path) -> int:
    """How many steps fit into so much time, by the rate of the first ones, their beginning left out."""
    config.out, config.train.steps = str(scratch / "calibration"), CALIBRATION
    config.train.log_every = CALIBRATION // 2
    pretrain(config)
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(config.out)
    return max(CALIBRATION, int(seconds * lines[-1]["samples_per_second"] / config.train.batch_size))


def run(recipe: Path, overrides: list[str], seconds: float, scratch: Path) -> tuple[Results, int, float]:
    """Train for about so long and score; returns the steps and seconds that it took, too."""
    steps = steps_for(load_config(recipe, overrides), seconds, scratch)
    config = load_config(recipe, [*overrides, f"out={scratch / 'run'}", f"train.steps={steps}"])
    config.train.log_every = config.train.save_every = steps
    before = time.perf_counter()
    checkpoint = pretrain(config)
    taken = time.perf_counter() - before
    encoder, tokenizer = load_encoder(checkpoint)
    shutil.rmtree(config.out)
    splits = {name: open_split(config.data, patterns) for name, patterns in patterns_of(config).items()}
    return evaluate(encoder, tokenizer, splits, config.eval, torch.device("cpu"), workers=1), steps, taken


def patterns_of(config: Config) -> dict[str, list[str]]:
    """Split -> shards."""
    train = [pattern for source in config.data.train.values() for pattern in source.shards]
    return {"train": train, "val": config.data.val, "test": config.data.test}


def main() -> None:
    """Print a table per data set and the JSON line."""
    parser = argparse.ArgumentParser(description="Train variants for the same time and score them.")
    parser.add_argument("--data", type=Path, required=True, help="folder with digits/ and clipart/")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which of them")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which variants")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all variants")
    arguments = parser.parse_intermixed_args()
    summary: dict[str, Any] = {}
    for name in arguments.sets:
        text, folder, train, val, scores = SETS[name]
        with tempfile.TemporaryDirectory() as made:
            scratch = Path(made)
            halves([str(arguments.data / folder / val)], scratch)
            recipe = scratch / "recipe.yaml"
            recipe.write_text(text)
            shards = [
                f"data.train=['{(arguments.data / folder / train).resolve()}']",
                f"data.val=['{scratch}/val-*.tar']",
                f"data.test=['{scratch}/test-*.tar']",
            ]
            found: dict[str, dict[str, list[float]]] = {}
            for seed in range(arguments.seeds):  # in turn, so that a slow hour of the machine strikes all
                for variant in arguments.only:
                    settings = [*shards, *arguments.overrides, *VARIANTS[variant], f"seed={seed}"]
                    results, steps, taken = run(recipe, settings, arguments.seconds, scratch)
                    row = found.setdefault(variant, {})
                    for score in scores:
                        row.setdefault(score, []).append(float(results[score]["top1"]))
                    row.setdefault("steps", []).append(steps)
                    row.setdefault("seconds", []).append(taken)
        summary[name] = {
            variant: {
                score: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for score, v in row.items()
            }
            for variant, row in found.items()
        }
        columns = [*scores, "steps", "seconds"]
        print(f"\n{name:28}" + "".join(f"{column:>18}" for column in columns))
        for variant, row in summary[name].items():
            cells = [
                f"{mean:.3f} +- {spread:.3f}" if column in scores else f"{mean:.0f}"
                for column, (mean, spread) in ((column, row[column]) for column in columns)
            ]
            print(f"{variant:28}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
