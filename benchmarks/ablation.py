"""Which objectives, targets and shared weights pay: every variant for the same time on the same data, several seeds.

    python benchmarks/ablation.py --data ../shared/data                      # hours on 2 CPU cores
    python benchmarks/ablation.py --data ../shared/data --seconds 20 --seeds 0 --only contrastive all   # a quick look

Data: folders `digits` (real-train-*.tar, real-val-*.tar: image, text and sound, paired by class) and `clipart`
(clipart-train-*.tar, clipart-val-*.tar: image and text). First the time of a step is measured, all variants in turn,
on a machine that should do nothing else. Then each variant trains for as many of its steps as fit into --seconds; the
learning rate falls to 0 over them. That part may share the machine, since what a run gets is counted in steps: with
--results, what is in that file is not done again, and several processes with different --seeds share the work.

Of the validation shards, every other sample serves to choose the probes' regularisation, the rest is what they are
scored on, by encoders that never saw either. Mean and spread (standard deviation) over seeds. The last line is one JSON
object: task -> variant -> score -> [mean, spread].
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from data.index import find_shards, load_shards
from data.shards import write_shards
from data.source import Source
from data.stream import open_split
from eval.encoders import Pretrained
from eval.features import extract_features
from eval.linear import Split, linear_probe
from eval.splits import read_labels
from eval.tasks import class_prompts
from eval.zeroshot import zero_shot
from pretrain.checkpoint import load_encoder
from pretrain.config import Config, load_config
from pretrain.engine import pretrain

# Variant -> settings that differ from the task's recipe.
ONLY_CONTRASTIVE = ["objectives.masked_language.weight=0", "objectives.masked_region.weight=0"]
FADING = ["objectives.masked_language.weight_end=0", "objectives.masked_region.weight_end=0"]
VARIANTS: dict[str, list[str]] = {
    "contrastive": ONLY_CONTRASTIVE,
    "contrastive + language": ["objectives.masked_region.weight=0"],
    "contrastive + region": ["objectives.masked_language.weight=0"],
    "all": [],
    "all, latent targets": ["objectives.masked_region.target=latent"],
    "all, kl targets": ["objectives.masked_region.target=kl"],
    "all, sharing ffn": ["model.sharing=ffn"],
    "all, sharing none": ["model.sharing=none"],
    "all, more joint passes": ["objectives.joint_share=0.25"],
    "all, fading": FADING,
    "all, region x10": ["objectives.masked_region.weight=10"],
    "all, region x10, fading": ["objectives.masked_region.weight=10", *FADING],
    "all, sharing ffn, fading": ["model.sharing=ffn", *FADING],
    "contrastive, sharing ffn": [*ONLY_CONTRASTIVE, "model.sharing=ffn"],
    "contrastive, sharing none": [*ONLY_CONTRASTIVE, "model.sharing=none"],
}
ALONE = "all + unpaired"  # a variant of tasks with few pairs: half of each batch are samples of one modality
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
train: {batch_size: 128, learning_rate: 1.0e-3, warmup: 0.1}
eval: {label: label}
"""


class Task(NamedTuple):
    """What variants are compared on.

    Attributes:
        recipe: YAML.
        folder: of the shards.
        train: pattern of the shards to train on.
        val: of those to judge by.
        scores: which of the results count.
        pairs: how many samples stay whole, the others are taken apart into modalities; None: all.
    """

    recipe: str
    folder: str
    train: str
    val: str
    scores: tuple[str, ...]
    pairs: int | None = None


DIGIT_SCORES = ("linear/image", "linear/audio", "zeroshot/image", "zeroshot/audio")
TASKS = {
    "digits": Task(DIGITS, "digits", "real-train-*.tar", "real-val-*.tar", DIGIT_SCORES),
    "digits, 100 pairs": Task(DIGITS, "digits", "real-train-*.tar", "real-val-*.tar", DIGIT_SCORES, 100),
    "digits, 400 pairs": Task(DIGITS, "digits", "real-train-*.tar", "real-val-*.tar", DIGIT_SCORES, 400),
    "clipart": Task(CLIPART, "clipart", "clipart-train-*.tar", "clipart-val-*.tar", ("linear/image",)),
}
MODALITY = {"png": "image", "jpg": "image", "txt": "text", "flac": "audio"}
CALIBRATION = 24  # steps, of which the second half counts


def source(name: str, pattern: str) -> str:
    """The setting that adds a training source; all have the same weight."""
    return f"data.train.{name}={{shards: ['{pattern}'], weight: 1}}"


def make_shards(task: Task, data: Path, scratch: Path) -> list[str]:
    """Write ``val-*.tar`` and ``test-*.tar`` and, of a task with few pairs, those; returns the settings that name them.

    Validation samples go to val and test in turn. ``alone-*.tar`` has each modality of what is not paired as a sample
    of its own; the variant that uses it names it.
    """

    def samples(pattern: str) -> list[dict[str, bytes | str]]:
        source = Source(load_shards(find_shards([str(data / task.folder / pattern)])))
        places = (
            (source.sample(shard, number).key, source.contents(shard, number)) for shard, number in source.places()
        )
        return [{"__key__": key, **contents} for key, contents in places]

    def write(name: str, chosen: Iterable[dict[str, bytes | str]]) -> str:
        list(write_shards(chosen, scratch / name, max_samples=1000))
        return f"{scratch}/{name}-*.tar"

    judged = samples(task.val)
    settings = [f"data.val=['{write('val', judged[::2])}']", f"data.test=['{write('test', judged[1::2])}']"]
    if task.pairs is None:
        return [source("pairs", str((data / task.folder / task.train).resolve())), *settings]
    whole = samples(task.train)
    apart = len(whole) // task.pairs
    alone = (
        {"__key__": f"{number:06}_{modality}", extension: sample[extension]}
        for number, sample in enumerate(whole)
        if number % apart
        for extension, modality in MODALITY.items()
        if extension in sample
    )
    write("alone", alone)
    return [source("pairs", write("pairs", whole[::apart])), *settings]


def seconds_per_step(variants: dict[str, Config], rounds: int, scratch: Path) -> dict[str, float]:
    """Of each variant, by the medians of short runs, all variants in turn."""
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, config in variants.items():
            config.out = str(scratch / "calibration")
            config.train.steps, config.train.log_every = CALIBRATION, CALIBRATION // 2
            pretrain(config)
            lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
            shutil.rmtree(config.out)
            rates[variant].append(config.train.batch_size / json.loads(lines[-1])["samples_per_second"])
    return {variant: statistics.median(taken) for variant, taken in rates.items()}


def score(task: Task, config: Config, train: list[str]) -> dict[str, Any]:
    """Train and evaluate; probes learn from ``train``, whatever the encoder learned from. Scores, and the precision."""
    config.train.log_every = config.train.save_every = config.train.steps
    encoder, tokenizer = load_encoder(pretrain(config))
    scores: dict[str, Any] = {"precision": json.loads((Path(config.out) / "env.json").read_text())["precision"]}
    shutil.rmtree(config.out)
    patterns = {"train": train, "val": config.data.val, "test": config.data.test}
    splits = {name: open_split(config.data, shards) for name, shards in patterns.items()}
    labels, cpu = read_labels(splits, config.eval), torch.device("cpu")
    scored = Pretrained("encoder", encoder, tokenizer)
    features = {
        name: extract_features(scored, split, labels[name], None, cpu, config.eval.batch_size, workers=1)
        for name, split in splits.items()
    }
    for name in task.scores:
        kind, modality = name.split("/")
        parts = [features[split][modality] for split in ("train", "val", "test")]
        if kind == "linear":
            scores[name] = linear_probe(*(Split(part.features, part.labels) for part in parts)).top1
        else:
            embeddings, prompts = parts[-1].embeddings, class_prompts(scored, config.eval)
            if embeddings is None or prompts is None:
                raise SystemExit(f"{name}: the encoder has no shared space")
            scores[name] = float((zero_shot(embeddings, prompts) == parts[-1].labels).float().mean())
    return scores


def done(results: Path | None) -> list[dict[str, Any]]:
    """The lines of the file of results."""
    if results is None or not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def write_table(task: Task, rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Print variant -> runs as a table; returns variant -> score -> mean and spread over runs."""
    summary: dict[str, dict[str, list[float]]] = {}
    mean_of = [name for name in task.scores if name.startswith("linear")]
    columns = [*task.scores, "mean probe"]
    print(
        f"{'':28}"
        + "".join(f"{column:>18}" for column in columns)
        + f"{'steps':>8}{'ms/step':>9}{'seeds':>7}  precision"
    )
    for variant, runs in rows.items():
        for run in runs:
            run["mean probe"] = statistics.mean(run[name] for name in mean_of)
        summary[variant] = {
            column: [statistics.mean(v := [run[column] for run in runs]), statistics.stdev(v) if len(v) > 1 else 0.0]
            for column in columns
        }
        cells = "".join(f"{f'{mean:.3f} +- {spread:.3f}':>18}" for mean, spread in summary[variant].values())
        milliseconds = 1000 * runs[0]["seconds_per_step"]
        precisions = ", ".join(sorted({run.get("precision", "not noted") for run in runs}))
        print(f"{variant:28}{cells}{runs[0]['steps']:8}{milliseconds:9.0f}{len(runs):7}  {precisions}", flush=True)
    return summary


def main() -> None:
    """Print a table per task and the JSON line."""
    parser = argparse.ArgumentParser(description="Train variants for the same time and score them.")
    parser.add_argument("--data", type=Path, required=True, help="folder with digits/ and clipart/")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which of them")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each run")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="a run of each variant for each; none: only timing"
    )
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, ALONE], help="which variants; all if not given")
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant's steps are timed")
    parser.add_argument("--threads", type=int, help="of the runs, where they share the machine; not of the timing")
    parser.add_argument("--results", type=Path, help="file that keeps what is done, a JSON object per line")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all variants")
    arguments = parser.parse_intermixed_args()
    summary: dict[str, Any] = {}
    for name in arguments.tasks:
        task = TASKS[name]
        with tempfile.TemporaryDirectory() as made:
            scratch = Path(made)
            recipe = scratch / "recipe.yaml"
            recipe.write_text(task.recipe)
            shards = make_shards(task, arguments.data, scratch)
            settings = (
                VARIANTS if task.pairs is None else {**VARIANTS, ALONE: [source("alone", f"{scratch}/alone-*.tar")]}
            )
            settings = {variant: settings[variant] for variant in arguments.only or settings if variant in settings}
            common = [*shards, *arguments.overrides]
            configs = {v: load_config(recipe, [*common, *own]) for v, own in settings.items()}

            # What is comparable: the same task, time and settings for all.
            kept = {"task": name, "seconds": arguments.seconds, "overrides": arguments.overrides}
            earlier = [line for line in done(arguments.results) if line.items() >= kept.items()]
            taken = {line["variant"]: line["seconds_per_step"] for line in earlier}
            fresh = {variant: config for variant, config in configs.items() if variant not in taken}
            taken |= seconds_per_step(fresh, arguments.rounds, scratch)
            rows: dict[str, list[dict[str, Any]]] = {variant: [] for variant in configs}
            train = [str((arguments.data / task.folder / task.train).resolve())]
            for variant in fresh:
                keep(arguments.results, {**kept, "variant": variant, "seconds_per_step": taken[variant]})
            for seed in arguments.seeds:
                for variant, own in settings.items():
                    line = {**kept, "variant": variant, "seed": seed}
                    found = [each for each in earlier if each.items() >= line.items()]
                    if not found:
                        config = load_config(recipe, [*common, *own, f"seed={seed}", f"out={scratch / 'run'}"])
                        config.train.threads = arguments.threads
                        config.train.steps = max(1, round(arguments.seconds / taken[variant]))
                        line |= {"seconds_per_step": taken[variant], "steps": config.train.steps}
                        found = [{**line, **score(task, config, train)}]
                        keep(arguments.results, found[0])
                    rows[variant] += found
        print(f"\n{name}, {arguments.seconds:g} s")
        summary[name] = write_table(task, {variant: runs for variant, runs in rows.items() if runs})
    print(json.dumps(summary))


def keep(results: Path | None, line: dict[str, Any]) -> None:
    """Add a line to the file of results."""
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
