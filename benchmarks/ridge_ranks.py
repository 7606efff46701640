"""Does the ridge probe, which looks take during training, rank the checkpoints of a run as the linear probe does?

    accelerate launch pretrain/run.py train.save_every=40 train.keep=20 out=runs/many      # the embedded digits
    python benchmarks/ridge_ranks.py runs/many                                             # a minute on 2 CPU cores

Both are fitted on train and scored on test, for every checkpoint and modality; the linear probe's penalty is chosen on
val, the ridge probe's by leaving out rows of train. The last line is
one JSON object: modality -> Spearman's rank correlation over the checkpoints (Spearman 1904), or null.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from data.stream import open_split, open_train
from eval.encoders import load_scored
from eval.features import extract_features
from eval.linear import Split, linear_probe
from eval.ridge import ridge_probe
from eval.splits import read_labels
from pretrain.config import load_config


def main() -> None:
    """Print a line per checkpoint and the JSON line."""
    parser = argparse.ArgumentParser(description="Rank a run's checkpoints by two probes.")
    parser.add_argument("run", type=Path, help="folder of a run that kept several checkpoints")
    run = parser.parse_args().run
    config = load_config(run / "config.yaml", [])
    splits = {"val": open_split(config.data, config.data.val), "test": open_split(config.data, config.data.test)}
    splits = {"train": open_train(config.data)[0], **splits}
    labels, cpu = read_labels(splits, config.eval), torch.device("cpu")
    found: dict[str, list[tuple[float, float]]] = {}
    for checkpoint in sorted((run / "checkpoints").glob("step-????????")):
        scored = load_scored(str(checkpoint))
        features = {
            name: extract_features(scored, source, labels[name], None, cpu, 256, workers=1)
            for name, source in splits.items()
        }
        for modality in scored.modalities:
            parts = [features[name][modality] for name in ("train", "val", "test")]
            train, val, test = (Split(part.features, part.labels) for part in parts)
            scores = ridge_probe(train, test).top1, linear_probe(train, val, test, samples=0).top1
            found.setdefault(modality, []).append(scores)
            print(f"{checkpoint.name}  {modality:6} ridge {scores[0]:.4f}  linear {scores[1]:.4f}", flush=True)
    print(json.dumps({name: agreement(scores) for name, scores in found.items()}))


def agreement(scores: list[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of the two; None where one of them is the same everywhere."""
    ours, theirs = zip(*scores, strict=True)
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        return None
    return round(float(spearmanr(ours, theirs).statistic), 3)


if __name__ == "__main__":
    main()
