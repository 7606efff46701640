"""CPU time of the linear probe beside scikit-learn's LogisticRegression: the same sweep on the same features, in turn.

    OMP_NUM_THREADS=1 python benchmarks/probe.py                # 2 minutes on one CPU core
    OMP_NUM_THREADS=1 python benchmarks/probe.py --rows 2000 --rounds 1      # a quick look

Synthetic features of width 384 in 100 overlapping classes, their variance falling off as an encoder's does, in float32
as an encoder's are. Both sides standardise, fit every default strength on 80 % of the rows, choose by accuracy on the
other 20 %, refit on all rows and predict as many test rows as a quarter of them; theirs with its default tolerance, in
float32 and, for the record, in float64. Ours takes the bootstrap intervals, too. Time is that of the process's CPU,
the median of rounds. The last line is one JSON object: `cpu_ratio_vs_sklearn` is ours / theirs in float32, and
`top1_difference` the largest of the two accuracies' differences, in points.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from eval.linear import DEFAULT_STRENGTHS, Split, linear_probe

WIDTH, CLASSES, LATENT = 384, 100, 64


def synthetic(rows: int, seed: int = 0) -> Split:
    """Features (rows, 384) float32 of 100 classes that overlap."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    y = torch.randint(CLASSES, (rows,), generator=generator)
    hidden = normal(CLASSES, LATENT)[y] + 1.8 * normal(rows, LATENT)
    mix = normal(LATENT, WIDTH) * torch.arange(1, LATENT + 1)[:, None] ** -0.5
    return Split(torch.nn.functional.gelu(hidden @ mix) + 0.1 * normal(rows, WIDTH), y)


def split(data: Split, rows: int) -> list[Split]:
    """Train, val (a fifth of ``rows``) and test (what is left)."""
    edges = [rows * 4 // 5, rows // 5, len(data.y) - rows]
    return [Split(x, y) for x, y in zip(torch.split(data.x, edges), torch.split(data.y, edges), strict=True)]


def ours(parts: list[Split]) -> float:
    """Test accuracy."""
    return linear_probe(*parts).top1


def theirs(parts: list[Split], dtype: str) -> float:
    """Test accuracy of scikit-learn."""
    (x, y), (x_val, y_val), (x_test, y_test) = ((part.x.numpy().astype(dtype), part.y.numpy()) for part in parts)

    def fit(x: Any, y: Any, strength: float) -> tuple[StandardScaler, LogisticRegression]:
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=1 / (strength * len(y)), max_iter=1000)
        return scaler, model.fit(scaler.transform(x), y)

    scores = {}
    for strength in DEFAULT_STRENGTHS:
        scaler, model = fit(x, y, strength)
        scores[strength] = model.score(scaler.transform(x_val), y_val)
    chosen = max(scores, key=lambda strength: (scores[strength], strength))
    scaler, model = fit(np.concatenate([x, x_val]), np.concatenate([y, y_val]), chosen)
    return float(model.score(scaler.transform(x_test), y_test))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of train + val")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    arguments = parser.parse_args(argv)
    parts = split(synthetic(arguments.rows * 5 // 4), arguments.rows)
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(parts),
        "sklearn float32": lambda: theirs(parts, "float32"),
        "sklearn float64": lambda: theirs(parts, "float64"),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, scikit-learn {sklearn.__version__}")
    print(f"{arguments.rows} rows of train + val x {WIDTH}, {CLASSES} classes; CPU seconds and top 1")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    top1 = {}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            begun = time.process_time()
            top1[name] = side()
            seconds[name].append(time.process_time() - begun)
            print(f"{name:16} {seconds[name][-1]:8.2f} {top1[name]:8.4f}", flush=True)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    difference = max(abs(top1["ours"] - value) for value in top1.values())
    figures = {
        "cpu_ratio_vs_sklearn": round(medians["ours"] / medians["sklearn float32"], 3),
        "cpu_ratio_vs_sklearn_float64": round(medians["ours"] / medians["sklearn float64"], 3),
        "top1_difference": round(100 * difference, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
