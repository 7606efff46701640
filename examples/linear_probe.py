"""Linear probe of a stock vision model on shards with labels: how much of the label do its frozen features tell?

    python examples/linear_probe.py facebook/dinov2-small \\
        --train 'shards/digits/train-*.tar' --test 'shards/digits/test-*.tar' --label label

The model is any vision model of `transformers` in safetensors, by path or hub id; or a run, a checkpoint or an export,
of which every modality is probed. Shards are those of `python -m data build`; shards/digits are the demo's, for whose
3,691 pictures a ViT-S/16 at 224 pixels takes 5 minutes on a single CPU core. The number to look at is the model's
beside that of the raw input: what it adds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.errors import UserError
from data.index import find_shards, load_shards
from data.source import Source
from eval.encoders import load_scored
from eval.features import Features, extract_features
from eval.linear import Split, linear_probe
from eval.splits import hold_out, label_ids


def probe(train: Features, test: Features, what: str, device: torch.device) -> str:
    """A line on ``features`` or ``raw``; a tenth of train chooses how strongly weights are held down."""
    x, y = getattr(train, what), train.labels
    held = hold_out(y)
    parts = Split(x[~held], y[~held]), Split(x[held], y[held]), Split(getattr(test, what), test.labels)
    found = linear_probe(*(Split(x.to(device), y.to(device)) for x, y in parts), content=test.content).metrics
    name = "top1" if "top1" in found else "map"  # the latter where a sample may have several labels
    value, interval = found[name]
    between = "" if interval is None else f"  (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    return f"{what:8}  {name} {value:.3f}{between}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or hub id")
    parser.add_argument("--train", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument("--test", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument("--label", required=True, help="field of each sample's .json that holds the class")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read ahead")
    parser.add_argument("--cache", type=Path, help="folder that keeps the features for the next time")
    given = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        splits = {name: Source(load_shards(find_shards(getattr(given, name))), name) for name in ("train", "test")}
        labels, _ = label_ids({name: source.labels(given.label) for name, source in splits.items()}, [])
        scored = load_scored(given.model)
        features = {
            name: extract_features(scored, source, labels[name], given.cache, device, given.batch_size, given.workers)
            for name, source in splits.items()
        }
        both = [name for name in features["train"] if name in features["test"]]
        if not both:
            needed = ", ".join(scored.modalities)
            raise UserError(f"--train and --test share no modality that {given.model} reads: {needed} is needed")
        for modality in both:
            train, test = features["train"][modality], features["test"][modality]
            print(f"\n{modality}: {len(train.rows)} train and {len(test.rows)} test samples")
            for what in ("features", "raw"):
                print(probe(train, test, what, device))
    except (ValueError, OSError) as error:  # a UserError is a ValueError; so are labels that can't be probed
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
