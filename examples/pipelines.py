"""An export in the pipelines of `transformers`: image-feature-extraction, fill-mask and audio-classification.

    python examples/pipelines.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --label label \\
        --classes 0=zero 1=one 2=two 3=three 4=four 5=five 6=six 7=seven 8=eight 9=nine --template "a voice says {}"

Ten seconds on a single CPU core; each score stands beside that of random weights. Features classify by the nearest
mean of a few labelled pictures. Nothing is trained: the audio classifier's head is made of the classes' names.
"""

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from few_labels import (
    PICTURES,
    SOUNDS,
    TEXTS,
    Sample,
    class_names,
    draw,
    part,
    print_scores,
    random_weights,
    read,
    reader,
    run,
    templates_of,
)
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

# How an `Auto` class makes the model of a folder: from its weights, or from its config alone.
Load = Callable[[Any, Path], Any]
LOADS: dict[str, Load] = {
    "export": lambda auto, folder: auto.from_pretrained(folder, dtype=torch.float32),
    "random": random_weights,
}


def image_features(load: Load, export: Path, labelled: Sequence[Sample], test: Sequence[Sample]) -> float:
    """Accuracy of the class whose labelled pictures have the nearest mean feature."""
    folder = part(export, "image")
    processor = AutoImageProcessor.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=load(AutoModel, folder), image_processor=processor)
    by_class: dict[str, list[torch.Tensor]] = {}
    for sample in labelled:
        by_class.setdefault(sample.label, []).append(torch.tensor(extract(sample.picture(), pool=True)[0]))
    means = F.normalize(torch.stack([torch.stack(features).mean(0) for features in by_class.values()]), dim=1)
    found = [int((means @ torch.tensor(extract(sample.picture(), pool=True)[0])).argmax()) for sample in test]
    return sum(list(by_class)[i] == sample.label for i, sample in zip(found, test, strict=True)) / len(test)


def fill_mask(load: Load, export: Path, test: Sequence[Sample]) -> float:
    """Share of captions of which a hidden word is guessed."""
    folder = part(export, "text/masked_lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fill = pipeline("fill-mask", model=load(AutoModelForMaskedLM, folder), tokenizer=tokenizer)
    rng, right, total = random.Random(0), 0, 0
    for sample in test:
        words = sample.text().split()
        places = [i for i, word in enumerate(words) if i and len(tokenizer.tokenize(f" {word}")) == 1]
        if places:
            place = rng.choice(places)
            masked = " ".join([*words[:place], tokenizer.mask_token, *words[place + 1 :]])
            right += fill(masked, top_k=1)[0]["token_str"].strip() == words[place]
            total += 1
    if not total:
        raise ValueError("--test: no caption has a second word that is one token")
    return right / total


def named_classifier(load: Load, export: Path, names: Sequence[str], templates: Sequence[str]) -> Any:
    """A stock audio classifier of classes that are known by name alone.

    The logits of ``embed_audio`` are an embedding, W x + b. Its products with the classes' embeddings T from
    ``embed_text`` are another linear layer, (T W) x + T b, which takes the place of the first. They rank classes as
    cosines do; as probabilities they are not calibrated.
    """
    tokenizer = AutoTokenizer.from_pretrained(part(export, "embed_text"))
    embed = load(AutoModelForSequenceClassification, part(export, "embed_text")).eval()
    model = load(AutoModelForAudioClassification, part(export, "embed_audio")).eval()
    before = model.classifier.dense
    head = torch.nn.Linear(before.in_features, len(names))
    with torch.no_grad():
        prompts = [template.replace("{}", name) for name in names for template in templates]
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        units = F.normalize(embed(**tokens).logits, dim=1).view(len(names), len(templates), -1).mean(1)
        classes = F.normalize(units, dim=1)
        head.weight.copy_(classes @ before.weight)
        head.bias.copy_(classes @ before.bias)
    model.classifier.dense = head
    model.config.id2label = dict(enumerate(names))
    return model


def audio_classes(
    load: Load, export: Path, names: Mapping[str, str], templates: Sequence[str], test: Sequence[Sample]
) -> float:
    """Accuracy of the first class that the pipeline gives; ``names`` are those of labels."""
    extractor = AutoFeatureExtractor.from_pretrained(part(export, "embed_audio"))
    model = named_classifier(load, export, list(names.values()), templates)
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    rate = extractor.sampling_rate  # the pipeline resamples nothing without torchaudio
    right = 0
    for sample in test:
        first = classify({"raw": sample.sound(rate), "sampling_rate": rate}, top_k=1)[0]
        right += first["label"] == names[sample.label]
    return right / len(test)


def score(given: argparse.Namespace) -> None:
    """All three, by the export and by random weights."""
    if given.samples < 1:
        raise ValueError(f"--samples {given.samples}: 1 or more is allowed")
    templates = templates_of(given.template, "a sound of {}")

    def few(extensions: Sequence[str], label: str | None) -> list[Sample]:
        found = read(given.test, extensions, label)
        return random.Random(0).sample(found, min(len(found), given.samples))

    pictures, captions, sounds = few(PICTURES, given.label), few(TEXTS, None), few(SOUNDS, given.label)
    labelled = draw(read(given.train, PICTURES, given.label), given.labels, 0)
    names = class_names(given.classes, [*labelled, *sounds])
    scores = {
        "image-feature-extraction": [image_features(load, given.export, labelled, pictures) for load in LOADS.values()],
        "fill-mask": [fill_mask(load, given.export, captions) for load in LOADS.values()],
        "audio-classification": [
            audio_classes(load, given.export, names, templates, sounds) for load in LOADS.values()
        ],
    }
    print(f"{len(pictures)} pictures, {len(captions)} captions, {len(sounds)} sounds of {len(names)} classes\n")
    print_scores(scores, list(LOADS))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    made = reader(__doc__)
    made.add_argument("--label", default="label", help="field of each sample's .json that holds the class")
    made.add_argument("--labels", type=int, default=100, help="how many labelled pictures (%(default)s)")
    made.add_argument("--classes", nargs="+", required=True, metavar="LABEL=NAME")
    made.add_argument("--template", action="append", help="prompt with {} for the class; may be given several times")
    made.add_argument("--samples", type=int, default=200, help="how many of the test samples, at most (%(default)s)")
    return run(score, made, argv)


if __name__ == "__main__":
    sys.exit(main())
