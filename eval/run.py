"""Score an encoder, each number beside its baselines; see eval/__main__.py for the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.source import Chosen, Source
from eval.encoders import Pretrained, Raw
from eval.features import Features, World, sweep
from eval.fusion import Part
from eval.joint import joint_features
from eval.linear import Split, linear_probe
from eval.page import Joint, class_names, make
from eval.report import Results
from eval.ridge import ridge_probe
from eval.scored import LAST, Scored
from eval.splits import hold_out, label_ids
from eval.tasks import SPLITS, TASKS, EvalConfig, EvaluationError, JointPass, Outcome, Study, on_device
from eval.tokens import token_splits
from pretrain.model.encoder import Encoder

MANY = 20_000
"""Training samples from which on a task takes so long that it should be known which one it is."""
PROBES = ("linear", "knn", "fewshot")


class Evaluation(NamedTuple):
    """All that is found out about an encoder.

    Attributes:
        results: task -> entry, as in results.json.
        predictions: of test samples, as in predictions.safetensors.
        page: what the report draws, as in page.json.
        skipped: task -> why it was not done.
    """

    results: Results
    predictions: dict[str, Tensor]
    page: dict[str, Any]
    skipped: dict[str, str]


def evaluate(
    scored: Scored,
    splits: Mapping[str, Source],
    config: EvalConfig,
    device: torch.device,
    workers: int,
    *,
    cache: Path | None = None,
    layers: tuple[int, ...] = (LAST,),
    poolings: tuple[str, ...] = ("default",),
    group: str | None = None,
    run: Path | None = None,
    world: World | None = None,
) -> Evaluation:
    """All tasks of ``config`` that the encoder's modalities and the labels allow.

    Args:
        scored: the encoder; left in evaluation mode on ``device``.
        splits: ``train``, ``test`` and ``val``; without the latter a tenth of train serves for it.
        config: names the label, the classes, the templates and the tasks.
        device: where the encoder runs.
        workers: processes that read ahead; 0 reads in this one.
        cache: folder that keeps features; None keeps none.
        layers: see `Scored.encode`; of several layers and poolings validation chooses, for each modality.
        poolings: likewise.
        group: field of each sample's .json; samples of one group stay together where validation is cut from train.
        run: the run's folder, whose curves and pictures the report shows.
        world: ranks that share the passes; the first one then does the tasks alone, and the others return an
            evaluation without results. None: this process alone.

    Raises:
        SampleError: a sample that can't be read or has no label.
        EncoderError, FeatureError, FetchError, ShardError: as `sweep`.
        TokenError: more token states than memory is for, with the attentive probe.
        EvaluationError: labels that don't fit ``config.classes``, or that a task refuses; two equal splits.
    """
    world = world or World()
    for a, b, what in (("train", "test", "tested"), ("val", "test", "tested"), ("train", "val", "held out")):
        if a in splits and b in splits and splits[a].fingerprint == splits[b].fingerprint:
            raise EvaluationError(f"the {a} split holds the same shards as the {b} split: nothing would be {what}")
    labels, names = _labels(splits, config)
    if "val" not in splits:
        held = hold_out(labels["train"], None if group is None else splits["train"].labels(group))
        parts = {"train": ~held, "val": held}
        places_of_train = list(splits["train"].places())
        cut = {
            name: Chosen(splits["train"], [place for place, mine in zip(places_of_train, chosen, strict=True) if mine])
            for name, chosen in parts.items()
        }
        splits = {**cut, "test": splits["test"]}
        labels = {name: labels["train"][chosen] for name, chosen in parts.items()} | {"test": labels["test"]}

    random = None if isinstance(scored, Raw) else scored.random()
    several = [scored] if random is None else [scored, random]
    found: list[dict[tuple[int, str], dict[str, dict[str, Features]]]] = [{} for _ in several]
    for split, source in splits.items():
        swept = sweep(
            several, source, labels[split], cache, device, config.batch_size, workers, layers, poolings, world=world
        )
        for features, by_key in zip(found, swept, strict=True):
            for key, of_split in by_key.items():
                features.setdefault(key, {})[split] = of_split
    if world.rank > 0:
        return Evaluation({}, {}, {}, {})
    for each in several:  # of what was in the cache nothing was computed there
        each.to(device)
    trained, places = chosen_places(found[0], config, device)
    if not trained["test"]:
        raise EvaluationError(
            f"no sample of the test split can be scored: {', '.join(scored.modalities)} would be read"
        )
    untrained = {} if random is None else _at(found[1], places)

    joint: list[JointPass] = []
    all_there = len(trained["test"]) == len(scored.modalities) > 1
    single = config.label is not None and labels["test"].ndim == 1
    if "fusion" in config.tasks and single and all_there and isinstance(scored, Pretrained):
        encoders = [each.encoder for each in several if isinstance(each, Pretrained)]
        joint = _joint(encoders, scored.tokenizer, splits, config, device, workers)
    tokens = []
    if "attentive" in config.tasks and single:
        tokens = [
            {
                split: token_splits(each, source, labels[split], device, config.batch_size, workers)
                for split, source in splits.items()
            }
            for each in several
            if isinstance(each, Pretrained)
        ]
    study = Study(config, scored, random, trained, untrained, labels, names, joint, tokens)
    outcome, skipped = run_tasks(study)
    if len(found[0]) > 1:
        for task, result in outcome.results.items():
            kind, _, modality = task.partition("/")
            if kind in PROBES:
                layer, pooling = places[modality]
                result["chosen"] = {"layer": layer, "pooling": pooling, **result.get("chosen", {})}
    for name in scored.modalities:
        if name not in trained["test"]:
            skipped[name] = "the test split has none"
    page = _page(study, splits["test"], outcome, run)
    page["left_out"] += [f"{name}: {why}" for name, why in skipped.items()]
    return Evaluation(outcome.results, outcome.predictions, page, skipped)


def run_tasks(study: Study) -> tuple[Outcome, dict[str, str]]:
    """What the tasks of the configuration find, and of those that can't be done why; see ``evaluate``."""
    outcome, skipped = Outcome({}, {}, {}, {}), dict[str, str]()
    for name in study.config.tasks:
        task = TASKS[name]
        if task.labels and study.config.label is None:
            skipped[name] = "there are no labels"
        elif study.several and not task.several:
            skipped[name] = "samples have several labels"
        else:
            if len(study.labels["train"]) > MANY:
                print(f"evaluating: {name}", flush=True)
            try:
                done = task.run(study)
            except EvaluationError:
                raise
            except ValueError as error:
                raise EvaluationError(f"{name}: {error}") from error
            if not done.results:
                skipped[name] = task.needs
            outcome.results.update(done.results)
            outcome.predictions.update(done.predictions)
            outcome.confusions.update(done.confusions)
            skipped |= done.left_out
    return outcome, skipped


def _labels(splits: Mapping[str, Source], config: EvalConfig) -> tuple[dict[str, Tensor], list[str]]:
    if config.label is None:
        return {name: torch.zeros(len(list(source.places())), dtype=torch.int64) for name, source in splits.items()}, []
    return label_ids({name: source.labels(config.label) for name, source in splits.items()}, config.classes)


def chosen_places(
    found: Mapping[tuple[int, str], Mapping[str, Mapping[str, Features]]], config: EvalConfig, device: torch.device
) -> tuple[dict[str, dict[str, Features]], dict[str, tuple[int, str]]]:
    """Of each modality the layer and pooling that a probe fitted on train reads best on val.

    It is a ridge probe; where samples have several labels, a linear probe of one strength, judged by mAP.

    Returns:
        split -> modality -> features, and modality -> (layer, pooling).

    Raises:
        EvaluationError: there is a choice, but no labels, or a split without the modality.
    """
    keys = list(found)
    if len(keys) > 1 and config.label is None:
        raise EvaluationError("several layers or poolings need labels to choose by: name one, or give eval.label")
    places: dict[str, tuple[int, str]] = {}
    for modality in found[keys[0]]["test"]:
        places[modality] = keys[0]
        if len(keys) > 1:
            scores = {}
            for key in keys:
                parts = [found[key][split].get(modality) for split in ("train", "val")]
                train, val = (None if part is None else Split(part.features, part.labels) for part in parts)
                if train is None or val is None:
                    raise EvaluationError(f"{modality}: the test split has it, the train or the val split has none")
                try:
                    scores[key] = on_device(device, f"choosing for {modality}", partial(_readable, train, val))
                except ValueError as error:
                    raise EvaluationError(f"{modality}, layer {key[0]}, {key[1]}: {error}") from error
            places[modality] = max(keys, key=scores.__getitem__)
    return _at(found, places), places


def _at(
    found: Mapping[tuple[int, str], Mapping[str, Mapping[str, Features]]], places: Mapping[str, tuple[int, str]]
) -> dict[str, dict[str, Features]]:
    return {
        split: {name: found[key][split][name] for name, key in places.items() if name in found[key][split]}
        for split in SPLITS
    }


def _readable(train: Split, val: Split, device: torch.device) -> float:
    """How well a probe fitted on ``train`` reads ``val``."""
    train, val = (Split(split.x.to(device), split.y.to(device)) for split in (train, val))
    if train.y.ndim == 2:
        return linear_probe(train, val, val, strengths=[1e-2], samples=0).metrics["map"].value
    return ridge_probe(train, val).top1


def _joint(
    encoders: Sequence[Encoder],
    tokenizer: PreTrainedTokenizerBase | None,
    splits: Mapping[str, Source],
    config: EvalConfig,
    device: torch.device,
    workers: int,
) -> list[JointPass]:
    """Per encoder: features of the joint pass of every split, and of the test split with each modality left out."""
    names, width = list(encoders[0].views.used), encoders[0].config.width
    whole: list[dict[str, Part]] = [{} for _ in encoders]
    without: list[dict[str, Part]] = [{} for _ in encoders]
    for split, source in splits.items():
        sets = [names]
        if split == "test":
            sets += [[name for name in names if name != missing] for missing in names]
        found = joint_features(encoders, tokenizer, source, sets, device, config.batch_size, workers)
        for (all_of_them, *fewer), at, there in zip(found, whole, without, strict=True):
            at[split] = all_of_them
            there |= dict(zip(names, fewer, strict=False))
    for at, there in zip(whole, without, strict=True):
        for place, features in enumerate(each.features for each in there.values()):
            # In the place of what is missing stands its mean, as in other fusions.
            own = slice(place * width, (place + 1) * width)
            features[:, own] = at["train"].features[:, own].mean(0)
    return [JointPass(at, there) for at, there in zip(whole, without, strict=True)]


def _page(study: Study, test: Source, outcome: Outcome, run: Path | None) -> dict[str, Any]:
    joint, undirected = {}, []
    for name, features in study.trained["test"].items():
        if features.embeddings is not None:
            directed = features.embeddings.ne(0).any(1)  # an embedding of zeros is nowhere on the map
            if not directed.all():
                undirected.append(f"{name} of {int((~directed).sum())} samples: their embeddings are zero")
            labels, rows = features.labels[directed], features.rows[directed]
            by_label = study.config.label is not None and not study.several
            joint[name] = Joint(
                features.embeddings[directed],
                rows,
                class_names(labels, study.names),
                labels if by_label else rows,
                features.content[directed],
            )
    page = make(test, {name: part for name, part in joint.items() if len(part.rows)}, outcome.confusions, run)
    page["left_out"] += undirected
    return page


def about(
    encoder: Mapping[str, str], splits: Mapping[str, Source], config: EvalConfig, **settings: Any
) -> dict[str, Any]:
    """All that results depend on: the ``encoder``, by name and sha256, the shards and the settings."""
    return {
        "encoder": dict(encoder),
        "splits": {name: {"samples": len(source), "sha256": source.fingerprint} for name, source in splits.items()},
        "eval": {name: value for name, value in asdict(config).items() if name != "monitor"} | settings,
    }
