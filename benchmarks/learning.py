"""Learning per compute: ours beside open_clip's CLIP, of the same architecture, for the same time, on the same data.

    python benchmarks/learning.py --data ../shared/data                     # 1 hour on 2 CPU cores
    python benchmarks/learning.py --data ../shared/data --seconds 20 --seeds 0 --rates 1e-3 --tasks clipart  # a look

Data: ablation.py's tasks `digits` (images and texts, paired by class) and `clipart`, images and texts alone, since
open_clip has no sound. Sides: all our objectives, our contrastive objective alone, open_clip. All have the same width,
depth, heads, patches and embedding, the same tokenizer, the same batches from our stream in the same order, and bf16
where the machine is fast in it. open_clip has a causal text encoder read at ``</s>``, an optimiser as its trainer sets
it (AdamW 0.9, 0.98, 1e-6, decay 0.2 of matrices), and the best of --rates, chosen on validation samples with the first
seed; ours have their recipe's only rate. Schedules are the same: warm-up, then a cosine to 0.

First the time of a step is measured for all tasks, all sides in turn, on a machine that should do nothing else; reading
is part of it. Then each trains for as many of its steps as fit into --seconds. Scored are, on samples that took no
part: the linear probe of images, zero-shot classification of images, and retrieval, R@10 of both directions by pairs
(clipart) or R@1 by class (digits). Where open_clip is absent, ours are scored alone.

The last line is one JSON object: task -> side -> score -> [mean, spread], and under "ahead" how far all our objectives
are ahead of open_clip, the mean over seeds of the difference and its standard deviation.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.ablation import CALIBRATION, TASKS, VARIANTS, Task, make_shards, seconds_per_step
from benchmarks.measure import Spread, table
from benchmarks.peers import MissingPeerError, open_clip
from benchmarks.step import Size, open_clip_model
from data.batch import Field
from data.stream import Stream, open_split, open_train
from data.text import load_tokenizer, train_tokenizer
from data.transforms import OnDevice
from eval.encoders import Pretrained
from eval.features import Features, extract_features
from eval.linear import Split, linear_probe
from eval.retrieval import class_positives, pair_positives, retrieve
from eval.scored import LAST, Encoded, Scored, always_the_same, tensors_digest
from eval.splits import read_labels
from eval.tasks import class_prompts
from eval.zeroshot import zero_shot
from pretrain.checkpoint import load_encoder
from pretrain.config import Config, load_config
from pretrain.engine import pretrain
from pretrain.optimizer import learning_rate
from pretrain.start import fast_in_bf16

THEIRS = "open_clip"
OURS = {"ours, all objectives": "all", "ours, contrastive": "contrastive"}  # side -> its name in ablation.py
SCORES = ("probe", "zeroshot", "retrieval")
WORDS = 600  # of the tokenizer
# Of both; clipart's classes are folders' names.
SETTINGS = {
    "digits": ["data.views.audio=null"],
    "clipart": ['eval.templates=["{}", "a picture of {}", "clip art: {}"]'],
}
BY_CLASS = {"digits"}  # tasks whose pairs are drawn by class: any of the class is right


class OpenClip(Scored):
    """open_clip's CLIP, as evaluation sees encoders."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Random weights from torch's global generator.

        Raises:
            MissingPeerError: open_clip is absent.
        """
        self.name, self.views, self.tokenizer, self.config = THEIRS, config.data.views, tokenizer, config
        image, text, model = self.views.image, self.views.text, config.model
        if image is None or text is None:
            raise ValueError("open_clip needs views of images and of texts")
        size = Size(
            image.size, model.image_patch, text.max_tokens, model.width, model.depth, model.heads, model.embed_dim
        )
        self.length: int = text.max_tokens
        ends: dict[str, Any] = {
            "pool_type": "eos",
            "eos_id": tokenizer.sep_token_id,
            "pad_id": tokenizer.pad_token_id,
        }
        self.model: Any = open_clip_model(open_clip("model"), size, len(tokenizer), **ends)

    def random(self) -> Scored:
        """The same architecture."""
        with always_the_same():
            return OpenClip(self.config, self._tokenizer)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("open_clip has lost its tokenizer")
        return self.tokenizer

    def _identity(self) -> Any:
        return tensors_digest(self.model.state_dict())

    def _modules(self) -> Sequence[nn.Module]:
        return [self.model]

    def ids(self, field: Field) -> Tensor:
        """(n, L) -> (n, max_tokens): its positions are for whole contexts."""
        padding = self.length - field.x.shape[1]
        return nn.functional.pad(field.x, (0, padding), value=self._tokenizer.pad_token_id)

    def _encode(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        key = (LAST, "default")
        if (set(layers), set(poolings)) != ({LAST}, {"default"}):
            raise ValueError("only what the model itself returns can be had of open_clip")
        if modality == "text":
            embeddings = self.model.encode_text(self.ids(field))
            return Encoded({key: embeddings}, embeddings)
        visual = self.model.visual
        projection, visual.proj = visual.proj, None  # features are what comes before, as of ours
        try:
            features = visual(field.x)
        finally:
            visual.proj = projection
        return Encoded({key: features}, features @ projection)


def train_theirs(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[OpenClip, float]:
    """Train open_clip for ``config.train.steps`` steps; returns it, and seconds per step of their second half."""
    settings = config.train
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = OpenClip(config, tokenizer).to(device)
    model, loss = theirs.model.train(), open_clip("loss").ClipLoss()
    named = list(model.named_parameters())
    free = [each for name, each in named if each.ndim < 2 or "bn" in name or "ln" in name or "logit_scale" in name]
    kept = {id(each) for each in free}
    groups = [{"params": free, "weight_decay": 0.0}]
    groups += [{"params": [each for _, each in named if id(each) not in kept], "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    stream = Stream(open_train(config.data), config.data, tokenizer, seed=config.seed, batch_size=settings.batch_size)
    on_device, half, begun = OnDevice(config.data.views).to(device), settings.steps // 2, time.perf_counter()
    batches = stream.batches()
    for step in range(settings.steps):
        if step == half:
            begun = time.perf_counter()
        batch = on_device(next(batches).to(device))
        rate = learning_rate(settings, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_in_bf16(device)):
            value = loss(*model(batch.fields["image"].x, theirs.ids(batch.fields["text"])))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return theirs, (time.perf_counter() - begun) / (settings.steps - half)


def train_ours(config: Config) -> Pretrained:
    """Train ours."""
    config.train.log_every = config.train.save_every = config.train.steps
    encoder, tokenizer = load_encoder(pretrain(config))
    shutil.rmtree(config.out)
    return Pretrained("ours", encoder, tokenizer)


def judge(scored: Scored, config: Config, train: list[str], by_class: bool) -> dict[str, float]:
    """Its scores, and under "val" the probe's on validation samples; probes learn from the shards ``train``."""
    patterns = {"train": train, "val": config.data.val, "test": config.data.test}
    splits = {name: open_split(config.data, shards) for name, shards in patterns.items()}
    labels, cpu = read_labels(splits, config.eval), torch.device("cpu")
    scored.to(cpu)
    found = {
        name: extract_features(scored, split, labels[name], None, cpu, config.eval.batch_size, workers=1)
        for name, split in splits.items()
    }
    images = [found[name]["image"] for name in splits]
    probe = linear_probe(*(Split(part.features, part.labels) for part in images), samples=0)
    prompts, embeddings = class_prompts(scored, config.eval), images[-1].embeddings
    if prompts is None or embeddings is None:
        raise ValueError(f"{scored.name} has no shared space")
    return {
        "probe": probe.top1,
        "zeroshot": float((zero_shot(embeddings, prompts) == images[-1].labels).float().mean()),
        "retrieval": recall(images[-1], found["test"]["text"], by_class),
        "val": float(probe.chosen["val_top1"]),
    }


def recall(image: Features, text: Features, by_class: bool) -> float:
    """Mean of both directions: R@1 by class, or R@10 by pairs; all samples have both modalities."""
    both = []
    for queries, items in ((image, text), (text, image)):
        if queries.embeddings is None or items.embeddings is None or not torch.equal(queries.rows, items.rows):
            raise ValueError("retrieval needs embeddings of images and texts of the same samples")
        positives = (
            class_positives(queries.labels, items.labels)
            if by_class
            else pair_positives(queries.content, items.content)
        )
        k = 1 if by_class else 10
        both.append(retrieve(queries.embeddings, items.embeddings, positives, (k,)).recall[k])
    return statistics.mean(both)


def ahead(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Score -> mean and spread, over seeds, of how far all our objectives are ahead of open_clip."""
    ours, theirs = rows["ours, all objectives"], rows.get(THEIRS, [])
    found = {}
    for score in SCORES if theirs else ():
        differences = [one[score] - other[score] for one, other in zip(ours, theirs, strict=True)]
        found[score] = mean_and_spread(differences)
    return found


def mean_and_spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation, which is 0 of a single value."""
    return [round(statistics.mean(values), 4), round(statistics.stdev(values) if len(values) > 1 else 0.0, 4)]


class Study:
    """One task: its data, its settings and what it measures."""

    def __init__(self, name: str, data: Path, scratch: Path, overrides: Sequence[str]) -> None:
        self.name, self.scratch = name, scratch
        scratch.mkdir(exist_ok=True)
        self.task: Task = TASKS[name]
        self.recipe = scratch / "recipe.yaml"
        self.recipe.write_text(self.task.recipe)
        self.train = [str((data / self.task.folder / self.task.train).resolve())]
        self.common = [*make_shards(self.task, data, scratch), *SETTINGS[name], *overrides]
        sources = open_train(self.config("contrastive", 0).data)
        captions = chain.from_iterable(source.captions(100_000) for source in sources)
        folder = scratch / "tokenizer"
        train_tokenizer(captions, WORDS).save_pretrained(folder)
        self.tokenizer = load_tokenizer(folder)
        self.common += [f"tokenizer.name={folder}", "tokenizer.train=null"]
        if name == "clipart":
            source = open_split(self.config("contrastive", 0).data, self.train)
            classes = sorted({str(label) for label in source.labels("label")})
            self.common.append(f"eval.classes={json.dumps(classes)}")

    def config(self, variant: str, seed: int) -> Config:
        """Of a run of ours, and of one of open_clip as far as it goes."""
        own = [*VARIANTS[variant], f"seed={seed}", f"out={self.scratch / 'run'}", "train.pictures=false"]
        return load_config(self.recipe, [*self.common, *own])

    def seconds_per_step(self, rounds: int, theirs: bool) -> dict[str, float]:
        """Of each side, all in turn."""
        taken: dict[str, list[float]] = {}
        for _ in range(rounds):
            variants = {side: self.config(variant, 0) for side, variant in OURS.items()}
            for side, seconds in seconds_per_step(variants, 1, self.scratch).items():
                taken.setdefault(side, []).append(seconds)
            if theirs:
                config = self.config("contrastive", 0)
                config.train.steps = CALIBRATION
                taken.setdefault(THEIRS, []).append(train_theirs(config, self.tokenizer)[1])
        return {side: Spread.of(seconds).median for side, seconds in taken.items()}

    def score(self, side: str, steps: int, seed: int, rate: float | None) -> dict[str, float]:
        """Train and judge; ``rate`` is open_clip's."""
        config = self.config(OURS.get(side, "contrastive"), seed)
        config.train.steps = steps
        if rate is not None:
            config.train.learning_rate = rate
        with redirect_stdout(sys.stderr):
            scored = train_theirs(config, self.tokenizer)[0] if side == THEIRS else train_ours(config)
            return judge(scored, config, self.train, self.name in BY_CLASS)


def main(argv: list[str] | None = None) -> None:
    """Print a table per task and the JSON line."""
    parser = argparse.ArgumentParser(description="Train ours and open_clip for the same time and score both.")
    parser.add_argument("--data", type=Path, required=True, help="folder with digits/ and clipart/")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which of them")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each side for each")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="open_clip's, to choose from"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each side's steps are timed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all sides")
    given = parser.parse_intermixed_args(argv)
    absent = None
    try:
        open_clip("model")
    except MissingPeerError as error:
        absent = str(error)
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        studies = {name: Study(name, given.data, Path(made) / name, given.overrides) for name in given.tasks}
        with redirect_stdout(sys.stderr):  # where training prints
            # All before the first run: what comes after may share the machine.
            timed = {name: study.seconds_per_step(given.rounds, absent is None) for name, study in studies.items()}
        for name, study in studies.items():
            taken = timed[name]
            steps = {side: max(1, round(given.seconds / seconds)) for side, seconds in taken.items()}
            rate = None
            if absent is None:
                tried = {
                    rate: study.score(THEIRS, steps[THEIRS], given.seeds[0], rate)["val"]
                    for rate in (given.rates if len(given.rates) > 1 else ())
                }
                rate = max(tried, key=lambda each: tried[each], default=given.rates[0])
            rows: dict[str, list[dict[str, float]]] = {side: [] for side in taken}
            for seed in given.seeds:
                for side in taken:
                    rows[side].append(study.score(side, steps[side], seed, rate if side == THEIRS else None))
                    print(name, seed, side, rows[side][-1], file=sys.stderr, flush=True)
            lines, scores = [], dict[str, Any]()
            for side, runs in rows.items():
                scores[side] = {score: mean_and_spread([run[score] for run in runs]) for score in SCORES}
                cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in scores[side].values()]
                lines.append([side, *cells, str(steps[side]), f"{1000 * taken[side]:.0f}"])
            if absent is not None:
                lines.append([THEIRS, f"absent: {absent}", "", "", "", ""])
            kind = "R@1 by class" if name in BY_CLASS else "R@10 by pairs"
            chosen = "" if rate is None else f"; open_clip's learning rate: {rate:g}, of {given.rates}"
            print(f"{name}, {given.seconds:g} s, mean and standard deviation of {len(given.seeds)} seeds{chosen}:\n")
            print(table(["", "image probe", "zero-shot", kind, "steps", "ms per step"], lines), flush=True)
            summary[name] = {**scores, "ahead": ahead(rows)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
