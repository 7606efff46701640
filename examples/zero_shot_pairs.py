"""Zero-shot classification by an export's image-text pair in plain `transformers`: classes are known by name alone.

    python examples/zero_shot_pairs.py runs/digits/export --test 'shards/digits/test-*.tar' --label label \\
        --classes 0=zero 1=one 2=two 3=three 4=four 5=five 6=six 7=seven 8=eight 9=nine --template "a handwritten {}"

Seconds on a single CPU core. For pictures without labels in a folder there is examples/zero_shot.py.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from few_labels import PICTURES, class_names, part, print_scores, random_weights, read, reader, run, templates_of
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


@torch.inference_mode()
def top1(model: Any, pixels: torch.Tensor, prompts: Sequence[Any], wanted: torch.Tensor) -> float:
    """Share of pictures (n, 3, H, W) whose class ``wanted`` (n,) is nearest; ``prompts`` are tokens per class."""
    model.eval()
    units = [F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(0) for tokens in prompts]
    classes = F.normalize(torch.stack(units), dim=-1)
    features = torch.cat([model.get_image_features(some).pooler_output for some in torch.split(pixels, 256)])
    return float(((features @ classes.T).argmax(1) == wanted).float().mean())


def score(given: argparse.Namespace) -> None:
    """The export, and random weights."""
    folder = part(given.export, "image_text")
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    templates = templates_of(given.template, "a photo of a {}")
    samples = read(given.test, PICTURES, given.label)
    names = class_names(given.classes, samples)
    wanted = torch.tensor([list(names).index(sample.label) for sample in samples])
    pixels = processor([sample.picture() for sample in samples], return_tensors="pt")["pixel_values"]
    prompts = [
        tokenizer([each.replace("{}", name) for each in templates], padding=True, truncation=True, return_tensors="pt")
        for name in names.values()
    ]
    pretrained = AutoModel.from_pretrained(folder, dtype=torch.float32)
    scores = {
        "export": [top1(pretrained, pixels, prompts, wanted)],
        "random weights": [top1(random_weights(AutoModel, folder), pixels, prompts, wanted)],
    }
    print(f"{len(samples)} test pictures of {len(names)} classes\n")
    print_scores(scores, ["top-1"], 1 / len(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    made = reader(__doc__, train=False)
    made.add_argument("--label", default="label", help="field of each sample's .json that holds the class")
    made.add_argument("--classes", nargs="+", required=True, metavar="LABEL=NAME")
    made.add_argument("--template", action="append", help="prompt with {} for the class; may be given several times")
    return run(score, made, argv)


if __name__ == "__main__":
    sys.exit(main())
