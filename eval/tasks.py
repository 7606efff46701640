"""The tasks: from the features of all splits to numbers, each beside its baselines. A task is a function and a line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data.errors import UserError
from data.transforms import make_field
from eval.attentive import TokenSplit, attentive_probe
from eval.features import Features
from eval.fewshot import fewshot_probe
from eval.fusion import Fused, Fusion, FusionSplit, Part, fuse
from eval.knn import knn_probe
from eval.labelfree import alignment, dimension_spread, modality_gap, rankme, uniformity
from eval.linear import Split, linear_probe
from eval.metrics import Metric, ProbeResult, chance, majority
from eval.monitor import MonitorConfig
from eval.page import confusion
from eval.retrieval import Direction, Side, every_direction
from eval.scored import Scored
from eval.zeroshot import check_templates, class_embeddings, score_zero_shot

Found = TypeVar("Found")
SPLITS = ("train", "val", "test")
MOST_ROWS = 5000
"""Of the test split, drawn at random, for measures that compare every two samples, or all dimensions."""


class EvaluationError(UserError):
    """Data that can't be scored; says which task and why."""


@dataclass
class EvalConfig:
    """The evaluation of the finished encoder; it needs `data.val` and `data.test`."""

    label: str | None = None
    """Field of each sample's .json that holds its class, a number or a name, or a list of names; null skips the
    evaluation."""
    tasks: list[str] = field(
        default_factory=lambda: ["linear", "knn", "fewshot", "zeroshot", "retrieval", "fusion", "labelfree"]
    )
    """What to score. Allowed: linear, knn, fewshot, zeroshot, retrieval, fusion, labelfree; and attentive, which takes
    its time and holds the states of all tokens in memory."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes for zero-shot, in the order of the numbers; empty skips zero-shot."""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    """Prompts for zero-shot; {} is replaced by the class's name."""
    batch_size: int = 256
    """Samples per pass."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Looks at the encoder during training."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - TASKS.keys())
        if unknown or not self.tasks:
            got = unknown[0] if unknown else "none"
            raise EvaluationError(f"eval.tasks: got {got}, allowed are {', '.join(TASKS)}")
        if len(set(self.classes)) < len(self.classes) or not all(name.strip() for name in self.classes):
            raise EvaluationError(f"eval.classes: names must differ and not be empty, got {', '.join(self.classes)}")
        if self.classes or self.templates:
            check_templates(self.templates, "eval.templates")
        if self.batch_size < 1:
            raise EvaluationError(f"eval.batch_size={self.batch_size}: allowed is 1 or more")


class JointPass(NamedTuple):
    """Features of an encoder's pass over all modalities of a sample together.

    Attributes:
        whole: split -> of the samples that have all modalities.
        without: modality -> of the test split, the same where it is missing.
    """

    whole: Mapping[str, Part]
    without: Mapping[str, Part]


class Study(NamedTuple):
    """What the tasks look at.

    Attributes:
        config: its label, classes and templates.
        scored: the encoder, on the device that the tasks use, too.
        random: the same architecture with random weights; None where there are no weights.
        trained: split -> modality -> features of ``scored``.
        untrained: the same of ``random``; empty without one.
        labels: split -> of every sample, (N,) int64 or (N, C) bool; all 0 without labels.
        names: of the classes; empty where they are numbers.
        joint: of ``scored``, then of ``random``: their passes over all modalities, if they have them.
        tokens: of ``scored``, then of ``random``: split -> modality -> token states and rows, if they are wanted.
    """

    config: EvalConfig
    scored: Scored
    random: Scored | None
    trained: Mapping[str, Mapping[str, Features]]
    untrained: Mapping[str, Mapping[str, Features]]
    labels: Mapping[str, Tensor]
    names: Sequence[str]
    joint: Sequence[JointPass] = ()
    tokens: Sequence[Mapping[str, Mapping[str, tuple[TokenSplit, Tensor]]]] = ()

    @property
    def several(self) -> bool:
        """Whether a sample may have several labels."""
        return self.labels["test"].ndim == 2


class Outcome(NamedTuple):
    """One or more tasks.

    Attributes:
        results: task and modality, such as ``linear/image`` -> entry, see ``entry``.
        predictions: ``linear/image.correct`` and so on, (n,), of test samples.
        confusions: as `eval.page.confusion` makes them.
        left_out: what of it could not be done -> why.
    """

    results: dict[str, dict[str, Any]]
    predictions: dict[str, Tensor]
    confusions: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def entry(
    metrics: Mapping[str, Metric],
    baselines: Mapping[str, Mapping[str, float]],
    chosen: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A task's part of results.json: metrics with intervals, baselines that have them too, choices and counts."""
    found: dict[str, Any] = {
        "metrics": {
            name: {"value": metric.value, "interval": None if metric.interval is None else list(metric.interval)}
            for name, metric in metrics.items()
        },
        "baselines": {
            baseline: {name: value for name, value in values.items() if name in metrics}
            for baseline, values in baselines.items()
            if values
        },
    }
    return found | ({"chosen": dict(chosen)} if chosen else {}) | ({"counts": dict(counts)} if counts else {})


def linear(study: Study) -> Outcome:
    """Logistic regression on the features of each modality."""
    return _probes(study, "linear", linear_probe, needs_val=True)


def nearest(study: Study) -> Outcome:
    """The vote of the nearest training samples."""
    return _probes(study, "knn", knn_probe, needs_val=True)


def few(study: Study) -> Outcome:
    """Ridge regression on a handful of samples per class."""
    return _probes(study, "fewshot", fewshot_probe, needs_val=False)


def on_device(device: torch.device, what: str, compute: Callable[[torch.device], Found]) -> Found:
    """``compute`` on ``device``, or on the CPU where that has too little memory, which is printed with ``what``."""
    try:
        return compute(device)
    except torch.OutOfMemoryError:
        print(f"{what}: too large for the memory of {device}, computed on the CPU", flush=True)
    return compute(torch.device("cpu"))


def _probes(study: Study, task: str, probe: Callable[..., ProbeResult], needs_val: bool) -> Outcome:
    outcome = Outcome({}, {}, {}, {})
    needed = [split for split in SPLITS if needs_val or split != "val"]
    for modality, test in study.trained["test"].items():
        name = f"{task}/{modality}"
        for split in needed:
            if modality not in study.trained[split]:
                raise EvaluationError(f"{name}: the test split has {modality}, the {split} split has none")

        def run(features: Mapping[str, Mapping[str, Features]], raw: bool, samples: int) -> ProbeResult:
            parts = [features[split][modality] for split in needed]  # noqa: B023

            def probed(device: torch.device) -> ProbeResult:
                splits = [Split((p.raw if raw else p.features).to(device), p.labels.to(device)) for p in parts]
                return probe(*splits, content=parts[-1].content, samples=samples)

            found = on_device(study.scored.device, name, probed)  # noqa: B023
            return found._replace(predicted=found.predicted.cpu(), correct=found.correct.cpu())

        result = run(study.trained, raw=False, samples=1000)
        baselines: dict[str, Mapping[str, float]] = {}
        if study.untrained:
            baselines["random_init"] = _values(run(study.untrained, raw=False, samples=0).metrics)
        try:
            baselines["raw"] = _values(run(study.trained, raw=True, samples=0).metrics)
        except ValueError as error:  # an empty caption has no direction, which is no fault of the encoder
            outcome.left_out[f"raw input of {name}"] = str(error)
        guessed = _guessed(study.trained["train"][modality].labels, test.labels, result.metrics)
        counts = _counts(test)
        if known := int(torch.isin(test.content, study.trained["train"][modality].content).sum()):
            counts["samples_whose_input_train_has"] = known
        outcome.results[name] = entry(result.metrics, baselines | guessed, result.chosen, counts)
        _predictions(outcome, name, result.correct, test)
        if not study.several and task == "linear":
            outcome.confusions[name] = confusion(result.predicted, test.labels, study.names)
    return outcome


def attentive(study: Study) -> Outcome:
    """A learned query attends to the tokens of each modality."""
    outcome = Outcome({}, {}, {}, {})
    if not study.tokens:
        return outcome
    for modality, (scored, _) in study.tokens[0]["test"].items():
        name = f"attentive/{modality}"
        found: list[ProbeResult] = []
        test = study.trained["test"][modality]
        for tokens, samples in zip(study.tokens, (1000, 0), strict=False):
            parts = [tokens[split][modality][0] for split in SPLITS if modality in tokens[split]]
            if len(parts) < len(SPLITS):
                raise EvaluationError(f"{name}: the test split has {modality}, another one has none")
            probed = partial(attentive_probe, *parts, content=test.content, samples=samples)
            found.append(on_device(study.scored.device, name, lambda device: probed(device=device)))  # noqa: B023
        result = found[0]
        baselines: dict[str, Mapping[str, float]] = {"random_init": _values(found[1].metrics)} if found[1:] else {}
        train_labels = study.tokens[0]["train"][modality][0].y
        guessed = _guessed(train_labels, scored.y, result.metrics)
        outcome.results[name] = entry(result.metrics, baselines | guessed, result.chosen, _counts(test))
        _predictions(outcome, name, result.correct, test)
    return outcome


def _guessed(train: Tensor, test: Tensor, metrics: Mapping[str, Metric]) -> dict[str, Mapping[str, float]]:
    """What one gets without looking: by chance, and by always naming the commonest class."""
    if test.ndim == 2:  # a random order has the prevalence for its average precision
        seen = test.any(0)
        return {"chance": {"map": test[:, seen].double().mean().item(), "auc": 0.5}}
    found = {"chance": chance(len(torch.unique(train))), "majority": majority(train, test)}
    # Guessing knows neither neighbours nor shots: for top1_k20 and top1_5shot it has its top1.
    kinds = {name: "top1" if name.startswith("top1_") else name for name in metrics}
    return {
        guess: {name: values[kind] for name, kind in kinds.items() if kind in values} for guess, values in found.items()
    }


def zeroshot(study: Study) -> Outcome:
    """The class whose prompts are nearest."""
    outcome = Outcome({}, {}, {}, {})
    if not study.config.classes or "text" not in study.scored.modalities:
        return outcome
    targets = class_prompts(study.scored, study.config)
    if targets is None:
        return outcome
    random_targets = None if study.random is None else class_prompts(study.random, study.config)
    for modality, test in study.trained["test"].items():
        if modality == "text" or test.embeddings is None:
            continue
        result = score_zero_shot(test.embeddings, targets, test.labels, content=test.content)
        baselines: dict[str, Mapping[str, float]] = {}
        if random_targets is not None and (embeddings := study.untrained["test"][modality].embeddings) is not None:
            untrained = score_zero_shot(embeddings, random_targets, test.labels, samples=0)
            baselines["random_init"] = _values(untrained.metrics)
        baselines["chance"] = chance(len(targets))  # every class competes, also one that test lacks
        baselines["majority"] = majority(study.labels["train"], test.labels)
        name = f"zeroshot/{modality}"
        outcome.results[name] = entry(result.metrics, baselines, counts=_counts(test))
        _predictions(outcome, name, result.correct, test)
        outcome.confusions[name] = confusion(result.predicted, test.labels, study.names)
    return outcome


def class_prompts(scored: Scored, config: EvalConfig) -> Tensor | None:
    """One embedding per class from all templates, (C, E); None where the encoder has no shared space."""
    view, prompts = scored.views.text, []
    if view is None or scored.tokenizer is None:
        raise EvaluationError("zero-shot needs an encoder with text")
    for name in config.classes:
        texts = make_field(view, [template.replace("{}", name) for template in config.templates], scored.tokenizer)
        valid = None if texts.valid is None else texts.valid.to(scored.device)
        embeddings = scored.embed("text", texts._replace(x=texts.x.to(scored.device), valid=valid))
        if embeddings is None:
            return None
        prompts.append(embeddings.cpu())
    return class_embeddings(prompts)


def retrieval(study: Study) -> Outcome:
    """From every modality to every other: by label where there is one, else by pairs."""
    outcome = Outcome({}, {}, {}, {})
    by_label = study.config.label is not None and not study.several

    def directions(features: Mapping[str, Features], samples: int) -> dict[str, Direction]:
        def found(device: torch.device) -> dict[str, Direction]:
            sides = {
                name: Side(*(each.to(device) for each in (part.embeddings, part.rows, part.content, part.labels)))
                for name, part in features.items()
                if part.embeddings is not None
            }
            return every_direction(sides, "labels" if by_label else "pairs", samples=samples)

        return on_device(study.scored.device, "retrieval", found)

    untrained = directions(study.untrained["test"], samples=0) if study.untrained else {}
    for direction, found in directions(study.trained["test"], samples=1000).items():
        baselines: dict[str, Mapping[str, float]] = {}
        if direction in untrained:
            baselines["random_init"] = _values(untrained[direction].metrics)
        baselines["chance"] = found.chance
        counts = {"queries": len(found.rows), "queries_without_match": found.left_out, "gallery": found.gallery}
        name = f"retrieval/{direction}"
        outcome.results[name] = entry(found.metrics, baselines, counts=counts)
        _predictions(outcome, name, (found.ranks <= 1).double(), found)
    return outcome


def fusion(study: Study) -> Outcome:
    """Do several modalities together say more than the best alone, and with one of them missing?"""
    outcome = Outcome({}, {}, {}, {})
    names = list(study.trained["test"])
    if len(names) < 2:
        return outcome
    for split in SPLITS:
        having = [
            set(study.trained[split][name].rows.tolist() if name in study.trained[split] else ()) for name in names
        ]
        if not set.intersection(*having):
            outcome.left_out["fusion"] = f"no sample of the {split} split has all of {', '.join(names)}"
            return outcome

    def fused(
        features: Mapping[str, Mapping[str, Features]], joint: JointPass | None, raw: bool, samples: int
    ) -> Fusion:
        def split(name: str, device: torch.device) -> FusionSplit:
            def moved(part: Part | Features) -> Part:
                x = part.raw if raw and isinstance(part, Features) else part.features
                return Part(x.to(device), part.rows.to(device))

            labels = study.labels[name]
            groups = _independent(study.trained[name], len(labels))
            return FusionSplit(
                {modality: moved(part) for modality, part in features[name].items()},
                labels.to(device),
                None if groups is None else groups.to(device),
                None if joint is None else moved(joint.whole[name]),
                {missing: moved(part) for missing, part in joint.without.items()} if joint and name == "test" else {},
            )

        def compute(device: torch.device) -> Fusion:
            return fuse(*(split(name, device) for name in SPLITS), samples=samples)

        return on_device(study.scored.device, "fusion", compute)

    joint = [*study.joint, None, None]
    found = fused(study.trained, joint[0], raw=False, samples=1000)
    beside = {"random_init": fused(study.untrained, joint[1], raw=False, samples=0)} if study.untrained else {}
    beside["raw"] = fused(study.trained, None, raw=True, samples=0)
    counts = {"samples": len(found.rows), "left_out": found.left_out["test"]}
    guessed = _guessed(study.labels["train"], found.labels, {"top1": Metric(0)})
    outcome.left_out.update({f"fusion/{name}": why for name, why in found.skipped.items()})
    # No modality is told from a fusion by its name: they come as image_alone.
    for missing, methods in [(None, found.methods), *found.missing.items()]:
        at_test = "" if missing is None else f"_without_{missing}"
        for method, each in methods.items():
            alone = "_alone" if each.gain is None else ""
            name = f"fusion/{method}{alone}{at_test}"
            baselines: dict[str, Mapping[str, float]] = {}
            for baseline, fusion_of in beside.items():
                its = fusion_of.methods if missing is None else fusion_of.missing[missing]
                baselines[baseline] = _values(_fused(its[method])) if method in its else {}
            outcome.results[name] = entry(_fused(each), baselines | guessed, each.chosen, counts)
            correct = (each.predicted == found.labels).double()
            _predictions(outcome, name, correct, _Observed(found.rows, found.groups))
    return outcome


def _fused(fused: Fused) -> dict[str, Metric]:
    metrics = {"top1": Metric(fused.top1, fused.interval)}
    if fused.gain is not None:
        metrics["gain"] = Metric(fused.gain.value, fused.gain.interval)
    return metrics


def _independent(parts: Mapping[str, Features], samples: int) -> Tensor | None:
    """(N,) ids, equal for samples that share an input of the modality that has fewest distinct ones.

    Of text only if there is nothing else: a caption that many have would make one observation of them all.
    """
    distinct = {name: len(torch.unique(part.content)) for name, part in parts.items() if name != "text"}
    if not distinct:
        return None
    part = parts[min(distinct, key=distinct.__getitem__)]
    groups = torch.arange(samples)
    groups[part.rows] = part.content  # ids of 63 random bits meet no row number
    return groups


def labelfree(study: Study) -> Outcome:
    """What features look like, whatever they mean."""
    outcome = Outcome({}, {}, {}, {})

    device = study.scored.device  # its memory holds what is drawn

    def measured(features: Mapping[str, Features]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, part in features.items():
            drawn = _drawn(len(part.rows))
            x = part.features[drawn].to(device)
            if len(x) < 2:
                continue
            found[name] = {
                "rankme": rankme(x),
                "rankme_uncentred": rankme(x, centred=False),
                "dimension_spread": dimension_spread(x),
                "uniformity": uniformity(x if part.embeddings is None else part.embeddings[drawn].to(device)),
            }
        for (a, first), (b, second) in combinations(features.items(), 2):
            in_a, in_b = torch.isin(first.rows, second.rows), torch.isin(second.rows, first.rows)
            if first.embeddings is not None and second.embeddings is not None and int(in_a.sum()) > 1:
                drawn = _drawn(int(in_a.sum()))
                x, y = first.embeddings[in_a][drawn].to(device), second.embeddings[in_b][drawn].to(device)
                found[f"{a}_{b}"] = {"alignment": alignment(x, y), "modality_gap": modality_gap(x, y)}
        return found

    untrained = measured(study.untrained["test"]) if study.untrained else {}
    for name, values in measured(study.trained["test"]).items():
        metrics = {metric: Metric(value) for metric, value in values.items()}
        outcome.results[f"labelfree/{name}"] = entry(metrics, {"random_init": untrained.get(name, {})})
    return outcome


def _drawn(rows: int) -> Tensor:
    """At most ``MOST_ROWS`` of so many, always the same ones, ascending: shards may be in the order of classes."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:MOST_ROWS].sort().values


def _values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}


def _counts(test: Features) -> dict[str, int]:
    return {"samples": len(test.rows), "distinct_inputs": len(torch.unique(test.content))}


class _Observed(NamedTuple):
    rows: Tensor
    content: Tensor


def _predictions(outcome: Outcome, name: str, correct: Tensor, test: Features | Direction | _Observed) -> None:
    outcome.predictions[f"{name}.correct"] = correct.cpu()
    outcome.predictions[f"{name}.rows"] = test.rows.cpu()
    outcome.predictions[f"{name}.content"] = test.content.cpu()


class Task(NamedTuple):
    """A line of ``TASKS``.

    Attributes:
        run: what it does.
        labels: whether it needs them.
        several: whether a sample may have several.
        needs: what is missing where there is nothing to be done.
    """

    run: Callable[[Study], Outcome]
    labels: bool = True
    several: bool = False
    needs: str = "no modality can be scored"


TASKS: dict[str, Task] = {
    "linear": Task(linear, several=True),
    "knn": Task(nearest),
    "fewshot": Task(few),
    "attentive": Task(attentive, needs="it needs the token states of an encoder of this project"),
    "zeroshot": Task(zeroshot, needs="it needs class names, and an encoder that embeds text"),
    "retrieval": Task(retrieval, labels=False, several=True, needs="it needs two modalities in one space"),
    "fusion": Task(fusion, needs="it needs two modalities"),
    "labelfree": Task(labelfree, labels=False, several=True),
}
