"""CPU time of the linear probe beside scikit-learn's LogisticRegression and CLIP_benchmark's probe, in turn.

    OMP_NUM_THREADS=1 python benchmarks/probe.py                # 4 minutes on one CPU core
    OMP_NUM_THREADS=1 python benchmarks/probe.py --rows 2000 --rounds 1      # a quick look

Synthetic features of width 384 in 100 overlapping classes, their variance falling off as an encoder's does, in float32
as an encoder's are. All sides choose a strength by accuracy on a fifth of the rows, refit on all of them and predict as
many test rows as a quarter of them. Ours and scikit-learn's standardise and fit every default strength; scikit-learn's
with its default tolerance, in float32 and, for the record, in float64. CLIP_benchmark's is as its `evaluate` calls it
with its defaults (AdamW for 10 epochs at a rate of 0.1, 19 fits on the way to the best of 97 decays, features of
length 1), on the CPU, though it was made for GPUs. Ours takes the bootstrap intervals, too.

Time is that of the process's CPU, the median of rounds. The last line is one JSON object: `cpu_ratio_vs_...` is ours /
theirs; `top1_difference` the largest of the accuracies' differences between ours and scikit-learn's, in points;
`top1_ahead_of_clip_benchmark` how far ours is above CLIP_benchmark's, in points.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from benchmarks.measure import in_turn, ratio, spread, table
from benchmarks.peers import MissingPeerError, load
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


def clip_benchmarks(parts: list[Split]) -> float:
    """Test accuracy of CLIP_benchmark's probe, searched for as in its `evaluate`.

    Raises:
        MissingPeerError: it is not installed.
    """
    peer: Any = load("clip_benchmark.metrics.linear_probe")
    train, val, test = (peer.FeatureDataset(torch.nn.functional.normalize(part.x), part.y) for part in parts)

    def batches(rows: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=64, shuffle=True)

    shape = (parts[0].x.shape[1], int(parts[-1].y.max()) + 1)
    decays = np.logspace(-6, 2, num=97).tolist()
    settings = {"lr": 0.1, "epochs": 10, "amp": False, "device": "cpu", "seed": 0}

    def best(places: list[int]) -> int:
        found: int = peer.find_peak(decays, places, batches(train), batches(val), *shape, **settings, verbose=False)
        return found

    with ExitStack() as stack:
        for kind in (torch.nn.Module, torch.Tensor):  # it moves all to a GPU
            stack.enter_context(patch.object(kind, "cuda", lambda self: self))
        # Its own asks numpy for a number of an array of one, which numpy 2.4 no longer gives.
        stack.enter_context(patch.object(peer, "accuracy", lambda logits, target, topk: [top1_of(logits, target)]))
        for redirect in (redirect_stdout, redirect_stderr):
            stack.enter_context(redirect(StringIO()))
        peak = best(list(range(0, 97, 16)))
        for step in (8, 4, 2, 1):
            peak = best([max(peak - step, 0), peak, min(peak + step, 96)])
        model = peer.train(batches(ConcatDataset([train, val])), *shape, decays[peak], **settings)
        logits, target = peer.infer(model, batches(test), settings["amp"], settings["device"])
    return top1_of(logits, target)


def top1_of(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Share of the rows (n, C) whose largest logit is that of the target (n,)."""
    return float((logits.argmax(1) == target).float().mean())


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of train + val")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    arguments = parser.parse_args(argv)
    parts = split(synthetic(arguments.rows * 5 // 4), arguments.rows)
    sides: dict[str, Callable[[list[Split]], float]] = {
        "ours": ours,
        "scikit-learn, float32": lambda parts: theirs(parts, "float32"),
        "scikit-learn, float64": lambda parts: theirs(parts, "float64"),
        "CLIP_benchmark": clip_benchmarks,
    }
    lines = []
    try:
        load("clip_benchmark.metrics.linear_probe")
    except MissingPeerError as error:
        del sides["CLIP_benchmark"]
        lines.append(["CLIP_benchmark", f"absent: {error}", "", ""])
    top1: dict[str, float] = {}

    def seconds(name: str) -> float:
        begun = time.process_time()
        top1[name] = sides[name](parts)
        return time.process_time() - begun

    rounds = in_turn({name: lambda name=name: seconds(name) for name in sides}, arguments.rounds, warm_up=0)  # type: ignore[misc]
    against = {name: ratio(rounds, "ours", name) for name in sides}
    lines = [
        [name, spread(rounds, name).show(1), f"{against[name]:.3g}x", f"{100 * top1[name]:.2f}"] for name in sides
    ] + lines
    print(f"{arguments.rows} rows of train + val x {WIDTH}, {CLASSES} classes; {torch.get_num_threads()} threads\n")
    print(table(["probe", "CPU seconds (quartiles)", "ours takes of it", "top 1"], lines))
    same = [abs(top1["ours"] - top1[f"scikit-learn, {kind}"]) for kind in ("float32", "float64")]
    figures: dict[str, float | None] = {
        "cpu_ratio_vs_sklearn": against["scikit-learn, float32"],
        "cpu_ratio_vs_sklearn_float64": against["scikit-learn, float64"],
        "top1_difference": round(100 * max(same), 3),
    }
    if "CLIP_benchmark" in sides:
        figures["cpu_ratio_vs_clip_benchmark"] = against["CLIP_benchmark"]
        figures["top1_ahead_of_clip_benchmark"] = round(100 * (top1["ours"] - top1["CLIP_benchmark"]), 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
