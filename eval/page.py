"""What the report draws besides the numbers of results.json: curves, confusions, a map, found samples, pictures.

``make`` puts it together as plain JSON, schema 1, each part absent where there is nothing to draw:

- ``curves``: name -> [[step, value], ...];
- ``confusion``: task -> ``classes`` and ``counts``, a row per true class and a column per predicted one;
- ``map``: ``caption`` and ``points``, [x, y, modality, class, sample] each;
- ``gallery``: "A_to_B" -> queries, each with its ``found`` samples, nearest first;
- ``pictures``: ``title`` and ``png``;
- ``samples``: those that map and gallery name: ``key``, ``class`` and, as far as they have it and it fits, ``text``,
  ``image`` (a thumbnail), ``audio`` and ``notes`` on what is missing;
- ``left_out``: sentences on what did not fit.

Pictures and sounds are ``data:`` URIs, so that a page needs no other file.
"""

import base64
import io
import json
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.decode import DECODERS, MODALITIES, DecodeError, decode_image
from data.errors import UserError
from data.source import SampleError, Source
from eval.zeroshot import unit_rows

SCHEMA = 1
LIMIT = 15_000_000
"""Bytes of page.json, and so of the page but for its few kilobytes of script."""
CURVE_POINTS = 500
MAP_POINTS = 1500
CLASSES = 30
"""Classes of a confusion matrix; of more, those that are missed most often."""
QUERIES, FOUND = 6, 5
PICTURES = 4
THUMBNAIL = 96
"""Pixels of the longer side."""
MAX_CLIP = 400_000
"""Bytes of a clip that may go onto the page."""
MAX_TEXT = 400
"""Characters of a caption."""
MAPS = ("pca", "tsne")

_SOUNDS = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg"}


class Joint(NamedTuple):
    """One modality of a split in the joint space, for the n samples that have it.

    Attributes:
        embeddings: (n, E), of any length but zero.
        rows: (n,) int64, the sample's place in its split.
        classes: n names, by which the map is coloured.
        groups: (n,) int64; a found sample is right if it is of the query's group.
        content: (n,) int64, equal for equal inputs, of which only one is found.
    """

    embeddings: Tensor
    rows: Tensor
    classes: Sequence[str]
    groups: Tensor
    content: Tensor


def make(
    source: Source,
    joint: Mapping[str, Joint],
    confusions: Mapping[str, Mapping[str, Any]],
    run: Path | None = None,
    *,
    method: str = "pca",
    seed: int = 0,
    limit: int = LIMIT,
) -> dict[str, Any]:
    """The whole page as JSON, of at most about ``limit`` bytes.

    Args:
        source: the split that ``joint`` is of; thumbnails, texts and sounds are read from it.
        joint: by modality; empty for an encoder without a joint space.
        confusions: by task, as ``confusion`` makes them.
        run: folder of the pretraining run, of which metrics.jsonl and pictures/ are shown if they are there.
        method: of the map: ``pca`` or ``tsne``.
        seed: draws the samples of the map and the queries.
        limit: bytes.

    Raises:
        UserError: ``method`` is unknown, or metrics.jsonl is damaged.
        ValueError: embeddings that are zero or not finite.
        FetchError: a shard can't be read any more.
    """
    page: dict[str, Any] = {"schema": SCHEMA, "left_out": []}
    if run is not None:
        page["curves"] = read_curves(run / "metrics.jsonl")
        page["pictures"], notes = read_pictures(run / "pictures", limit // 3)
        page["left_out"] += notes
    page["confusion"] = dict(confusions)
    page["map"] = joint_map(joint, method, seed=seed)
    page["gallery"] = {f"{a}_to_{b}": found_by(joint[a], joint[b], seed) for a, b in permutations(joint, 2)}
    page = {name: part for name, part in page.items() if part or name == "left_out"}

    named = [str(row) for queries in page.get("gallery", {}).values() for query in queries for row in _rows_of(query)]
    named += [point[4] for point in page.get("map", {}).get("points", [])]
    if named:
        classes = {
            str(row): name
            for part in joint.values()
            for row, name in zip(part.rows.tolist(), part.classes, strict=True)
        }
        free = limit - len(json.dumps(page))
        page["samples"], notes = read_samples(source, {row: classes[row] for row in named}, free)
        page["left_out"] += notes
    return page


def class_names(labels: Tensor, names: Sequence[str] = ()) -> list[str]:
    """A name per sample: of its label (n,), or of all its labels (n, C) joined; numbers where ``names`` is empty."""

    def name(label: int) -> str:
        return names[label] if names else str(label)

    if labels.ndim == 1:
        return [name(label) for label in labels.tolist()]
    return [" + ".join(name(label) for label in row.nonzero()[:, 0].tolist()) or "none" for row in labels]


def read_curves(path: Path, limit: int = CURVE_POINTS) -> dict[str, list[list[float]]]:
    """The numbers of a run's metrics.jsonl by name; empty where there is no such file.

    Of more than ``limit`` points the lowest and the highest of each of limit / 2 stretches are kept, so that no spike
    is lost. A last line that is still being written is not read.

    Raises:
        UserError: a line that is no JSON object with a ``step``.
    """
    curves: dict[str, list[list[float]]] = {}
    if not path.is_file():
        return curves
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no JSON object with a step: {line[:80].rstrip()}") from error
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(name, []).append([step, value])
    return {name: thinned(points, limit) for name, points in curves.items()}


def thinned(points: list[list[float]], limit: int) -> list[list[float]]:
    """At most ``limit`` of [step, value]: the ends, and the lowest and highest of as many equal stretches as fit."""
    if len(points) <= limit:
        return points
    count = (limit - 2) // 2
    bounds = [1 + i * (len(points) - 2) // count for i in range(count + 1)]
    kept = {0, len(points) - 1}
    for start, end in pairwise(bounds):
        stretch = range(start, end)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def confusion(predicted: Tensor, labels: Tensor, names: Sequence[str] = ()) -> dict[str, Any]:
    """How many samples of each class were taken for which.

    Args:
        predicted: (n,) int64.
        labels: (n,) int64, the true ones.
        names: of the classes; numbers where it is empty.

    Returns:
        ``classes``: the names, ``counts``: a row per true class, a column per predicted one. Of more than ``CLASSES``
        classes the most often missed ones have rows and columns of their own, and the last is of all others.
    """
    ids, found = torch.unique(torch.cat([labels, predicted]), return_inverse=True)
    true, guessed = found[: len(labels)], found[len(labels) :]
    if len(ids) > CLASSES:
        missed = true[true != guessed].bincount(minlength=len(ids))
        chosen = missed.sort(descending=True, stable=True).indices[: CLASSES - 1].sort().values
        place = torch.full((len(ids),), len(chosen))
        place[chosen] = torch.arange(len(chosen))
        true, guessed = place[true], place[guessed]
        shown = [*class_names(ids[chosen], names), f"{len(ids) - len(chosen)} others"]
    else:
        shown = class_names(ids, names)
    counts = (true * len(shown) + guessed).bincount(minlength=len(shown) ** 2)
    return {"classes": shown, "counts": counts.view(len(shown), -1).tolist()}


def joint_map(
    joint: Mapping[str, Joint], method: str = "pca", *, limit: int = MAP_POINTS, seed: int = 0
) -> dict[str, Any] | None:
    """The joint space in two dimensions, after its vectors are scaled to unit length.

    Args:
        joint: by modality.
        method: ``pca``, or ``tsne`` (van der Maaten & Hinton 2008, Visualizing Data using t-SNE).
        limit: points. Of more, samples are drawn, and each stays in all its modalities.
        seed: of the draw and of t-SNE.

    Returns:
        ``caption``: method, number of samples and, of PCA, how much variance the axes keep; ``points``: [x, y,
        modality, class, sample]. None of fewer than four points or two dimensions.

    Raises:
        UserError: ``method`` is unknown.
        ValueError: embeddings that are zero or not finite.
    """
    if method not in MAPS:
        raise UserError(f"map {method!r} is unknown; allowed are {', '.join(MAPS)}")
    if not joint:
        return None
    rows = sorted({row for part in joint.values() for row in part.rows.tolist()})
    count = min(len(rows), limit // len(joint))
    drawn = torch.tensor(sorted(random.Random(seed).sample(rows, count)))
    points, vectors = [], []
    for modality, part in joint.items():
        chosen = torch.isin(part.rows, drawn).nonzero()[:, 0]
        if len(chosen):
            vectors.append(unit_rows(part.embeddings[chosen], f"{modality} embeddings").cpu())
        points += [(modality, part.classes[i], str(int(part.rows[i]))) for i in chosen.tolist()]
    if len(points) < 4 or vectors[0].shape[1] < 2:
        return None
    space = torch.cat(vectors).numpy()
    caption = f"{count:,} samples" if count == len(rows) else f"{count:,} of {len(rows):,} samples, drawn at random"
    from sklearn.decomposition import PCA  # these take seconds
    from sklearn.manifold import TSNE

    if method == "pca":
        pca = PCA(2, svd_solver="full")
        flat = pca.fit_transform(space)
        spread = pca.explained_variance_.sum()
        kept = f"{100 * pca.explained_variance_ratio_.sum():.0f} % of the variance" if spread > 0 else "nothing"
        caption = f"PCA of the unit vectors: the two axes keep {kept}. {caption}."
    else:
        perplexity = min(30.0, (len(space) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, init="random", random_state=seed).fit_transform(space)
        caption = (
            f"t-SNE of the unit vectors, perplexity {perplexity:.0f}: near points are alike, distances between "
            f"clusters say nothing. {caption}."
        )
    places = [[round(float(x), 4), round(float(y), 4)] for x, y in flat]
    return {"caption": caption, "points": [[*place, *point] for place, point in zip(places, points, strict=True)]}


def found_by(queries: Joint, gallery: Joint, seed: int = 0, count: int = QUERIES, top: int = FOUND) -> list[Any]:
    """What a few drawn queries find by cosine: ``query``, the place of a sample, and ``found``, the ``top`` nearest.

    Queries without a right answer in the gallery are not drawn. Of found samples with equal input the first stands for
    all; ``sample`` is its place, ``correct`` whether it is of the query's group, and ``cosine`` its nearness.

    Raises:
        ValueError: embeddings that are zero or not finite, or of two widths.
    """
    answerable = torch.isin(queries.groups, gallery.groups).nonzero()[:, 0].tolist()
    drawn = sorted(random.Random(seed).sample(answerable, min(count, len(answerable))))
    if not drawn:
        return []
    units = unit_rows(queries.embeddings[drawn], "queries")
    targets = unit_rows(gallery.embeddings, "gallery")
    if units.shape[1] != targets.shape[1]:
        raise ValueError(f"queries and gallery must have one width, got {units.shape[1]} and {targets.shape[1]}")
    listed = []
    for query, cosines in zip(drawn, (units @ targets.T).cpu(), strict=True):
        found: list[dict[str, Any]] = []
        seen: set[int] = set()
        for i in cosines.sort(descending=True, stable=True).indices.tolist():
            content = int(gallery.content[i])
            if content not in seen:
                seen.add(content)
                correct = bool(gallery.groups[i] == queries.groups[query])
                place = str(int(gallery.rows[i]))
                found.append({"sample": place, "correct": correct, "cosine": round(float(cosines[i]), 4)})
            if len(found) == top:
                break
        listed.append({"query": str(int(queries.rows[query])), "found": found})
    return listed


def _rows_of(query: Mapping[str, Any]) -> Iterable[str]:
    return [query["query"], *(found["sample"] for found in query["found"])]


def read_samples(source: Source, classes: Mapping[str, str], limit: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What is shown of samples, at most ``limit`` bytes of it, and sentences on the rest.

    The first samples have the space, and sounds that which pictures and texts leave.

    Args:
        source: where they are read.
        classes: place in the split -> class, of each sample to show.
        limit: bytes, as JSON.

    Raises:
        FetchError: a shard can't be read any more.
    """
    ends = list(accumulate(shard.samples for shard in source.shards))
    shown: dict[str, dict[str, Any]] = {}
    too_much: Counter[str] = Counter()
    sounds: dict[str, str] = {}
    held = 0  # bytes of sounds that wait; more than there is space for would only fill the memory

    def leave_out(row: str, modality: str) -> None:
        too_much[modality] += 1
        shown[row]["notes"].append(f"{modality} left out: the page would be too large")

    for row, name in classes.items():
        shard = bisect_right(ends, int(row))
        number = int(row) - ends[shard] + source.shards[shard].samples
        sample: dict[str, Any] = {"key": source.sample(shard, number).key, "class": name, "notes": []}
        try:
            contents = source.contents(shard, number)
        except SampleError as error:
            contents, sample["notes"] = {}, [str(error.args[-1])]
        shown[row] = sample
        limit -= len(json.dumps(sample))
        for extension, content in contents.items():
            if (modality := MODALITIES.get(extension)) is None:
                continue
            try:
                value = _shown(modality, extension, content)
            except DecodeError as error:
                sample["notes"].append(f"{modality} left out: {error}")
                continue
            size = len(json.dumps(value))
            if modality == "audio" and held + size <= limit:
                sounds[row] = value
                held += size
            elif modality != "audio" and size <= limit:
                sample[modality] = value
                limit -= size
            else:
                leave_out(row, modality)
    for row, value in sounds.items():
        size = len(json.dumps(value))
        if size <= limit:
            shown[row]["audio"] = value
            limit -= size
        else:
            leave_out(row, "audio")
    return shown, [
        f"{modality} of {count:,} samples: the page would be too large" for modality, count in too_much.items()
    ]


def _shown(modality: str, extension: str, content: bytes) -> str:
    """A member as text or ``data:`` URI.

    Raises:
        DecodeError: damaged, or a clip of more than ``MAX_CLIP`` bytes.
    """
    if modality == "text":
        text: str = DECODERS["text"](content)
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    if modality == "image":
        return thumbnail(content)
    if len(content) > MAX_CLIP:
        raise DecodeError(f"a clip of {len(content) / 1e6:.1f} MB, at most {MAX_CLIP / 1e6:.1f} MB are shown")
    return _uri(_SOUNDS[extension], content)


def thumbnail(content: bytes) -> str:
    """A picture, at most ``THUMBNAIL`` pixels wide and high, as a ``data:`` URI.

    Raises:
        DecodeError: it can't be read.
    """
    picture = Image.fromarray(decode_image(content, THUMBNAIL))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "png")
    picture.save(jpeg, "jpeg", quality=85)
    if len(png.getvalue()) <= len(jpeg.getvalue()):  # tiny pictures and drawings
        return _uri("image/png", png.getvalue())
    return _uri("image/jpeg", jpeg.getvalue())


def read_pictures(folder: Path, limit: int) -> tuple[list[dict[str, str]], list[str]]:
    """PNG files of a run, at most ``PICTURES`` from its first to its last, and a sentence on those that are left out.

    Where they take more than ``limit`` bytes as JSON, the later ones are preferred.
    """
    files = sorted(folder.glob("*.png"))
    last = len(files) - 1
    chosen = files if len(files) <= PICTURES else [files[round(i * last / (PICTURES - 1))] for i in range(PICTURES)]
    pictures: list[dict[str, str]] = []
    for file in reversed(chosen):
        picture = {"title": file.stem, "png": _uri("image/png", file.read_bytes())}
        limit -= len(json.dumps(picture))
        if limit < 0:
            break
        pictures.insert(0, picture)
    missing = len(files) - len(pictures)
    return pictures, [f"{missing:,} of {len(files):,} pictures of the run"] if missing else []


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
