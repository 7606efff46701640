"""Evaluation while training goes on: every so many steps a look at what the encoder makes of a fixed few samples."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data.source import Source
from eval.knn import knn
from eval.labelfree import alignment, modality_gap, rankme, uniformity
from eval.linear import Split
from eval.panel import Panel, Seen, instances
from eval.retrieval import retrieval, retrieval_chance
from eval.ridge import ridge_probe
from pretrain.model.encoder import Encoder

FEWEST = 10
"""Samples, or pairs, below which a number would say nothing and is left out."""


@dataclass
class MonitorConfig:
    """Looks at the encoder during training; they need `data.val`."""

    every: int | None = None
    """Steps between two looks; null: never."""
    samples: int = 1000
    """How many of the held-out samples to look at, always the same; for probes, as many of the training samples."""
    max_share: float = 0.1
    """Largest share of the run's time; a look that would exceed it is put off until `every` steps later."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"eval.monitor.every={self.every}: allowed is 1 or more, or null")
        if self.samples < FEWEST:
            raise ValueError(f"eval.monitor.samples={self.samples}: allowed is {FEWEST} or more")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"eval.monitor.max_share={self.max_share}: allowed is above 0 and at most 1")


class Monitor:
    """Looks at an encoder, always at the same samples, which are read at the first look; disturbs nothing.

    With several ranks, each reads and encodes its share; all call ``due`` and ``look`` alike and get the same answers.

    Attributes:
        seconds: spent on looks so far, reading included.
        postponed: looks that were due, but would have taken more than their share of the time.
    """

    def __init__(
        self,
        config: MonitorConfig,
        held_out: Source,
        train: Source | None,
        tokenizer: PreTrainedTokenizerBase,
        label: str | None,
        device: torch.device,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Look at samples of ``held_out``; nothing is read yet.

        Args:
            config: when and at how much.
            held_out: what is scored. Samples that are in ``train``, too, flatter the probes; that is not checked.
            train: what the probes are fitted on; None: no probes.
            tokenizer: the encoder's.
            label: field of each sample's .json that holds its class; None: no probes.
            device: where the encoder is, and where ranks exchange tensors.
            batch_size: samples per pass.
            workers: processes that read; 0 reads in this one.
            rank: of this process.
            world: number of processes, those of torch's default group.
        """
        self.config, self.device, self.world = config, device, world
        self.seconds, self.postponed = 0.0, 0
        self._sources = [held_out] if train is None or label is None else [held_out, train]
        self._read = partial(
            Panel,
            samples=config.samples,
            tokenizer=tokenizer,
            label=None if train is None else label,
            device=device,
            batch_size=batch_size,
            workers=workers,
            rank=rank,
            world=world,
        )
        self._panels: list[Panel] = []
        self._cost = 0.0  # seconds of the last look, without reading

    def due(self, step: int, elapsed: float) -> bool:
        """Whether to look now, ``elapsed`` seconds after the run's (re)start. All ranks get the first one's answer.

        The first look is always taken: what one costs is not known before.
        """
        every = self.config.every
        if every is None or step % every:
            return False
        within = self.seconds + self._cost <= self.config.max_share * (elapsed + self._cost)
        answer = torch.tensor(int(within or not self._panels), device=self.device)
        if self.world > 1:
            dist.broadcast(answer, 0)
        self.postponed += 1 - int(answer)
        return bool(answer)

    def look(self, encoder: Encoder) -> dict[str, float]:
        """What the encoder, on the monitor's device, makes of the samples; in float32.

        Returns:
            per modality: ``rankme/M`` of the features; ``uniformity/M`` of the embeddings; with labels ``ridge/M`` and
            ``knn/M``, accuracies of probes of the features. Per pair of them, on the embeddings of the samples that
            have both: ``retrieval/A_to_B/r1`` (r5, r10) by instance, and ``.../chance_r1``; ``alignment/A_B`` and
            ``gap/A_B``. A modality or pair of fewer than ``FEWEST`` samples is left out; so is a modality with outputs
            that are zero or not finite, of which ``broken/M`` is the number instead.

        Raises:
            UserError: samples that can't be read any more or have no label, at the first look; on all ranks.
        """
        begun = self._now()
        with _undisturbed(encoder, self.device):
            if not self._panels:
                self._panels = [self._read(source, views=encoder.views) for source in self._sources]
            read = self._now()
            values = measure(*(panel.encode(encoder) for panel in self._panels))
        end = self._now()
        self.seconds += end - begun
        self._cost = end - read
        return values

    def _now(self) -> float:
        """Seconds, once the device has done what it was given: training's steps are not the look's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


def measure(held_out: dict[str, Seen], train: dict[str, Seen] | None = None) -> dict[str, float]:
    """The numbers of `Monitor.look`, by modality; without ``train`` no probes."""
    train, values, sound = train or {}, dict[str, float](), dict[str, Seen]()
    for name, seen in held_out.items():
        broken = sum(split[name].broken for split in (held_out, train) if name in split)
        if broken:
            values[f"broken/{name}"] = float(broken)
        elif len(seen.rows) >= FEWEST:
            sound[name] = seen
    for name, seen in sound.items():
        values[f"rankme/{name}"] = rankme(seen.features)
        values[f"uniformity/{name}"] = uniformity(seen.embeddings)
        if name in train and len(train[name].rows) >= FEWEST and train[name].labels.min() < train[name].labels.max():
            fitted, scored = (Split(split[name].features, split[name].labels) for split in (train, held_out))
            values[f"ridge/{name}"] = ridge_probe(fitted, scored).top1
            values[f"knn/{name}"] = knn(fitted, scored).top1
    for (a, first), (b, second) in combinations(sound.items(), 2):
        in_a, in_b = torch.isin(first.rows, second.rows), torch.isin(second.rows, first.rows)
        if int(in_a.sum()) < FEWEST:
            continue
        x, y = first.embeddings[in_a], second.embeddings[in_b]
        same = instances(first.content[in_a], second.content[in_b])
        for queries, gallery, name in ((x, y, f"{a}_to_{b}"), (y, x, f"{b}_to_{a}")):
            found = retrieval(queries, gallery, same, same)
            values |= {f"retrieval/{name}/r{k}": share for k, share in found.items()}
            values[f"retrieval/{name}/chance_r1"] = retrieval_chance(same, same, (1,))[1]
        values[f"alignment/{a}_{b}"] = alignment(x, y)
        values[f"gap/{a}_{b}"] = modality_gap(x, y)
    return values


@contextmanager
def _undisturbed(encoder: Encoder, device: torch.device) -> Iterator[None]:
    """Evaluation mode; after it, modules' modes and all random states are as they were."""
    modes = {module: module.training for module in encoder.modules()}
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (kept, not drawn from)
    # Compiled blocks would be compiled again for inference, and training's be given up after a few such.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        encoder.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
