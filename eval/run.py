"""Score an encoder: linear probe, zero-shot and retrieval by class, each beside its baselines.

    python -m eval.run runs/digits/checkpoints/last --train 'shards/digits/train-*.tar' \
        --val 'shards/digits/val-*.tar' --test 'shards/digits/test-*.tar' --label label
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.index import find_shards, load_shards
from data.source import Source
from data.text import load_tokenizer
from data.transforms import make_field
from eval.features import Features, extract
from eval.linear import Split, linear_probe
from eval.metrics import bootstrap_interval, chance, majority
from eval.monitor import MonitorConfig
from eval.report import Results, table, write_results
from eval.retrieval import retrieval, retrieval_chance
from eval.zeroshot import class_embeddings, zero_shot
from pretrain.model.encoder import Encoder

RETRIEVED = (1, 5, 10)


class EvaluationError(UserError):
    """Data that can't be scored; says which task and why."""


@dataclass
class EvalConfig:
    """The evaluation of the finished encoder; it needs `data.val` and `data.test`."""

    label: str | None = None
    """Field of each sample's .json that holds its class, a number or a name; null skips the evaluation."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes for zero-shot, in the order of the numbers; empty skips zero-shot."""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    """Prompts for zero-shot; {} is replaced by the class's name."""
    batch_size: int = 256
    """Samples per pass."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Looks at the encoder during training."""

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise EvaluationError(f"eval.templates: {template!r} must hold {{}} once, for the class's name")
        if self.classes and not self.templates:
            raise EvaluationError("eval.templates is empty: zero-shot needs at least one")
        if self.batch_size < 1:
            raise EvaluationError(f"eval.batch_size={self.batch_size}: allowed is 1 or more")


def evaluate(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Source],
    config: EvalConfig,
    device: torch.device,
    workers: int,
) -> Results:
    """All tasks that the encoder's modalities allow.

    Args:
        encoder: left in evaluation mode on ``device``.
        tokenizer: the one that it was trained with.
        splits: ``train``, ``val`` and ``test``.
        config: names the label, the classes and the templates.
        device: where the encoder runs.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        ``linear/M`` with top1, interval, majority, and beside it random_init, raw and chance; ``zeroshot/M``
        likewise without raw; ``retrieval/A_to_B`` with r1, r5, r10.

    Raises:
        SampleError: a sample that can't be read or has no label.
        EvaluationError: labels that don't fit ``config.classes``, or that a probe refuses.
    """
    labels = read_labels(splits, config)
    encoders = [encoder, random_encoder(encoder)]
    trained, random_init = {}, {}
    for name, source in splits.items():
        trained[name], random_init[name] = extract(
            encoders, tokenizer, source, labels[name], device, config.batch_size, workers
        )
    results: Results = {}
    for modality in trained["test"]:
        for split in ("train", "val"):
            if modality not in trained[split]:
                raise EvaluationError(f"linear/{modality}: the test split has {modality}, the {split} split has none")
        with _task(f"linear/{modality}"):
            results[f"linear/{modality}"] = _linear(modality, trained, random_init)
    if config.classes and encoder.views.text is not None:
        targets, random_targets = (class_prompts(model, tokenizer, config, device) for model in encoders)
        for modality in (name for name in trained["test"] if name != "text"):
            with _task(f"zeroshot/{modality}"):
                zero = _zero_shot(trained["test"][modality], targets)
                zero["random_init"] = {"top1": _zero_shot(random_init["test"][modality], random_targets)["top1"]}
                results[f"zeroshot/{modality}"] = zero
    for a, b in permutations(trained["test"], 2):
        with _task(f"retrieval/{a}_to_{b}"):
            found = _retrieval(trained["test"][a], trained["test"][b])
            untrained = _retrieval(random_init["test"][a], random_init["test"][b])
            found["random_init"] = {key: value for key, value in untrained.items() if key in found["chance"]}
            results[f"retrieval/{a}_to_{b}"] = found
    return results


def read_labels(splits: Mapping[str, Source], config: EvalConfig) -> dict[str, list[int]]:
    """The labels of every split as integers, in the order of the shards.

    Raises:
        SampleError: a sample without a label.
        EvaluationError: labels that are neither numbers nor names, or outside ``config.classes``.
    """
    if config.label is None:
        raise EvaluationError("eval.label is null: there is nothing to score against")
    return label_ids({name: source.labels(config.label) for name, source in splits.items()}, config.classes)


def label_ids(labels: Mapping[str, list[Any]], classes: Sequence[str]) -> dict[str, list[int]]:
    """Labels as integers: numbers stay, names become their place in ``classes`` or, without, in sorted order.

    Raises:
        EvaluationError: labels that are neither, or outside ``classes``.
    """
    everything = [label for split in labels.values() for label in split]
    if all(type(label) is int for label in everything):  # a bool is an int, too
        outside = sorted({label for label in everything if classes and not 0 <= label < len(classes)})
        if outside:
            raise EvaluationError(f"labels {outside[:5]} are outside the {len(classes)} names of eval.classes")
        return dict(labels)
    if not all(isinstance(label, str) for label in everything):
        kinds = sorted({type(label).__name__ for label in everything})
        raise EvaluationError(f"labels must be all whole numbers or all names, got {', '.join(kinds)}")
    names = list(classes) or sorted(set(everything))
    unknown = sorted(set(everything) - set(names))
    if unknown:
        raise EvaluationError(f"labels {unknown[:5]} are not among eval.classes: {', '.join(names)}")
    return {split: [names.index(label) for label in values] for split, values in labels.items()}


def random_encoder(encoder: Encoder) -> Encoder:
    """The same architecture with random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(encoder.config, encoder.views, encoder.vocabulary)


def about(encoder_folder: Path, splits: Mapping[str, Source], config: EvalConfig) -> dict[str, Any]:
    """All that results depend on: the weights, the shards and the settings."""
    with (encoder_folder / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "encoder": {"folder": str(encoder_folder), "sha256": weights},
        "splits": {name: {"samples": len(source), "sha256": source.fingerprint} for name, source in splits.items()},
        "eval": {name: value for name, value in asdict(config).items() if name != "monitor"},
    }


def class_prompts(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, config: EvalConfig, device: torch.device
) -> Tensor:
    """One embedding per class from all templates: (C, E)."""
    view = encoder.views.text
    if view is None:
        raise EvaluationError("zero-shot needs an encoder with text")
    encoder = encoder.to(device).eval()
    prompts = []
    for name in config.classes:
        texts = make_field(view, [template.replace("{}", name) for template in config.templates], tokenizer)
        valid = None if texts.valid is None else texts.valid.to(device)
        with torch.inference_mode():
            _, embeddings = encoder("text", texts._replace(x=texts.x.to(device), valid=valid))
        prompts.append(embeddings.cpu())
    return class_embeddings(prompts)


def _linear(
    modality: str, trained: dict[str, dict[str, Features]], random_init: dict[str, dict[str, Features]]
) -> dict[str, Any]:
    def probe(features: dict[str, dict[str, Features]], raw: bool) -> tuple[dict[str, Any], Tensor]:
        parts = [features[split][modality] for split in ("train", "val", "test")]
        splits = [Split(part.raw if raw else part.features, part.labels) for part in parts]
        result = linear_probe(*splits)
        return {"top1": result.top1, "strength": result.strength, "val_top1": result.val_top1}, result.predicted

    test = trained["test"][modality]
    ours, predicted = probe(trained, raw=False)
    return {
        **ours,
        "interval": _interval(predicted == test.labels, test.content),
        "distinct_test_inputs": len(torch.unique(test.content)),
        "random_init": probe(random_init, raw=False)[0],
        "raw": probe(trained, raw=True)[0],
        "chance": {"top1": chance(test.labels)},
        "majority": {"top1": majority(trained["train"][modality].labels, test.labels)},
    }


def _zero_shot(test: Features, targets: Tensor) -> dict[str, Any]:
    correct = (zero_shot(test.embeddings, targets) == test.labels).float()
    return {
        "top1": correct.mean().item(),
        "interval": _interval(correct, test.content),
        "distinct_test_inputs": len(torch.unique(test.content)),
        "chance": {"top1": 1 / len(targets)},  # every class competes, also one that test lacks
    }


def _retrieval(queries: Features, gallery: Features) -> dict[str, Any]:
    # Where modalities are missing, a class may have queries and nothing to be found.
    answerable = torch.isin(queries.labels, gallery.labels)
    embeddings, labels = queries.embeddings[answerable], queries.labels[answerable]
    ks = tuple(k for k in RETRIEVED if k <= len(gallery.labels))
    found = retrieval(embeddings, gallery.embeddings, labels, gallery.labels, ks)
    expected = retrieval_chance(labels, gallery.labels, ks)
    return {
        **{f"r{k}": found[k] for k in ks},
        "queries": len(labels),
        "queries_without_match": int((~answerable).sum()),
        "chance": {f"r{k}": expected[k] for k in ks},
    }


@contextmanager
def _task(name: str) -> Iterator[None]:
    """Say which task refused its data."""
    try:
        yield
    except ValueError as error:
        raise EvaluationError(f"{name}: {error}") from error


def _interval(correct: Tensor, content: Tensor) -> list[float] | None:
    """95 % interval over distinct inputs; samples with the same image or clip are one observation."""
    if len(torch.unique(content)) < 2:
        return None
    return list(bootstrap_interval(correct.float(), groups=content))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Score a pretrained encoder.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, such as runs/digits/checkpoints/last")
    for name in ("train", "val", "test"):
        parser.add_argument(f"--{name}", nargs="+", required=True, metavar="SHARDS", help=f"{name} shards")
    parser.add_argument("--label", default="label", help="field of the .json that holds the class")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="class names, for zero-shot")
    parser.add_argument("--templates", nargs="+", default=["a photo of a {}."], help="prompts, for zero-shot")
    parser.add_argument("--out", type=Path, default=None, help="file for the results, as JSON")
    arguments = parser.parse_args(argv)
    try:
        config = EvalConfig(arguments.label, arguments.classes, arguments.templates)
        folder = arguments.checkpoint / "encoder"
        splits = {
            name: Source(load_shards(find_shards(getattr(arguments, name))), name) for name in ("train", "val", "test")
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder, tokenizer = Encoder.load(folder), load_tokenizer(folder / "tokenizer")
        results = evaluate(encoder, tokenizer, splits, config, device, workers=0)
        if arguments.out is not None:
            write_results(arguments.out, results, about(folder, splits, config))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
