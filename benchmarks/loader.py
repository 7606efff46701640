"""How much work reading is: our stream beside plain webdataset, `datasets` and open_clip's, in turn, in CPU seconds.

    python benchmarks/loader.py                 # 10 minutes on 2 CPU cores
    python benchmarks/loader.py --samples 600 --memory-samples 5000 --rounds 2      # a quick look

The plain pipeline is what one writes with webdataset, PIL and transformers: decode, resize, normalise to float32, and
make a log-mel spectrogram, all per sample, then stack. `datasets` streams the same shards and has the same done to each
sample. Ours ships integers and does the rest for whole batches. All end with the same tensors: float images, token ids,
log-mel. Since most of the others' time goes into `ASTFeatureExtractor`, a second line gives them our own log-mel.
open_clip's training pipeline reads images and texts alone, with its own tokenizer and the transform that does not crop;
beside it, ours reads these two. Both it and ours shuffle, the other two read in order.

"First batch" is from naming the shards to the first batch of 256 with two workers, imports excluded; "memory" is what
these two workers hold for themselves at the most while they read an epoch. Each is measured in a process of its own.
Where a peer is absent, its line says why. The last line is one JSON object with the ratios.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

if __name__ in ("__main__", "__mp_main__"):  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import datasets  # type: ignore[import-untyped]
import numpy as np
import psutil  # type: ignore[import-untyped]
import soundfile
import soxr
import torch
import webdataset
from PIL import Image
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, IterableDataset
from transformers import ASTFeatureExtractor, PreTrainedTokenizerBase

from benchmarks.measure import Spread, in_group, in_turn, ratio, spread, table
from benchmarks.peers import MissingPeerError, load
from data import decode
from data.batch import Field
from data.index import find_shards, load_shards
from data.order import Order, Supply
from data.shards import write_shards
from data.source import Source
from data.stream import DataConfig, Stream
from data.text import load_tokenizer, train_tokenizer
from data.transforms import SAMPLE_RATE, AudioView, ImageView, LogMel, OnDevice, TextView, Views

BATCH, WORKERS = 256, 2
SIDE, SECONDS = 256, 1.0
IMAGE, AUDIO = ImageView(size=224), AudioView(frames=100, mels=128)
VIEWS = Views(IMAGE, TextView(max_tokens=32), AUDIO)
PAIRS = Views(IMAGE, VIEWS.text, None)
WORDS = ("a", "photo", "of", "one", "red", "large", "old", "new", "cat", "dog", "tree", "house", "in", "the", "rain")


def samples(count: int) -> Iterator[dict[str, bytes | str]]:
    """JPEGs that compress like photographs, captions of ten words and a second of sound."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        grain = random.normal(0, 8, (SIDE, SIDE, 3))
        pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) + grain
        jpeg, flac = io.BytesIO(), io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
        sound = 0.1 * random.standard_normal(int(SECONDS * SAMPLE_RATE)).cumsum() / 30
        soundfile.write(flac, sound.clip(-1, 1), SAMPLE_RATE, format="FLAC")
        yield {
            "__key__": f"{number:06d}",
            "jpg": jpeg.getvalue(),
            "txt": " ".join(random.choice(WORDS, 10)).encode(),
            "flac": flac.getvalue(),
        }


def stock_mel() -> Callable[[Any], torch.Tensor]:
    """Log-mel of one clip as `transformers` makes it."""
    extractor = ASTFeatureExtractor(num_mel_bins=AUDIO.mels, max_length=AUDIO.frames)

    def mel(sound: Any) -> torch.Tensor:
        values: torch.Tensor = extractor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"][0]
        return values

    return mel


def own_mel() -> Callable[[Any], torch.Tensor]:
    """Log-mel of one clip by our own module, which is made for batches."""
    module = LogMel(AUDIO)
    return lambda sound: module(Field(torch.from_numpy(sound)[None] * 32768, torch.arange(1)), None).x[0]


class Usual:
    """The usual way: everything per sample, in float32."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, stock: bool = True) -> None:
        self.shards, self.tokenizer = shards_in(folder), tokenizer
        self.mel = stock_mel() if stock else own_mel()

    def sample(self, jpeg: bytes, caption: str, flac: bytes) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Float pixels (3, 224, 224), token ids and a log-mel spectrogram (frames, mels)."""
        image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        ids = self.tokenizer(caption, truncation=True, max_length=32)["input_ids"]
        sound, rate = soundfile.read(io.BytesIO(flac), dtype="float32")
        if rate != SAMPLE_RATE:
            sound = soxr.resample(sound, rate, SAMPLE_RATE)
        return pixels, ids, self.mel(sound)

    def batches(self, workers: int) -> Iterable[Any]:
        """An epoch, whole batches only."""
        return iter(DataLoader(Whole(self.samples, self.tokenizer), batch_size=None, num_workers=workers))

    def samples(self) -> Iterator[Any]:
        """Of the shards that fall to this worker."""
        raise NotImplementedError


class Whole(IterableDataset[Any]):
    """Stacks samples to whole batches."""

    def __init__(self, samples: Callable[[], Iterator[Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.samples, self.tokenizer = samples, tokenizer

    def __iter__(self) -> Iterator[Any]:
        data = self.samples()
        while len(batch := list(itertools.islice(data, BATCH))) == BATCH:
            images, ids, sounds = zip(*batch, strict=True)
            padded = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
            yield torch.stack(images), padded["input_ids"], torch.stack(sounds)


class Plain(Usual):
    """webdataset."""

    def samples(self) -> Iterator[Any]:
        """In order."""
        data = webdataset.WebDataset(self.shards, shardshuffle=False)
        return (self.sample(each["jpg"], each["txt"].decode(), each["flac"]) for each in data)


class Streaming(Usual):
    """`datasets`."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, stock: bool = True) -> None:
        super().__init__(folder, tokenizer, stock)
        # As bytes, to be decoded as everywhere here: its own decoding of sounds needs torchcodec, and that CUDA.
        kinds = {"__key__": "string", "__url__": "string", "jpg": "binary", "txt": "string", "flac": "binary"}
        self.data: Any = datasets.load_dataset(
            "webdataset",
            data_files={"train": self.shards},
            split="train",
            streaming=True,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        )

    def samples(self) -> Iterator[Any]:
        """In order; it divides shards among workers itself."""
        return (self.sample(each["jpg"], each["txt"], each["flac"]) for each in self.data)


class OpenClip:
    """open_clip's training pipeline, as its trainer makes it; images and texts."""

    def __init__(self, folder: Path) -> None:
        self.shards = shards_in(folder)
        self.count = sum(index.samples for index in load_shards(find_shards(self.shards)))
        self.package = load("open_clip")
        self.train = cast(Any, load("open_clip_train.data"))
        # It was made for webdataset before 1.0, which had no marks between the files of one shard and of the next.
        expand = self.train.tar_file_expander
        self.train.tar_file_expander = lambda *given, **named: (
            each for each in expand(*given, **named) if "fname" in each
        )

    def batches(self, workers: int) -> Iterable[Any]:
        """An epoch."""
        options = argparse.Namespace(
            train_data="::".join(self.shards),
            train_num_samples=self.count // BATCH * BATCH,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=BATCH,
            workers=workers,
            world_size=1,
        )
        transform = self.package.image_transform(224, is_train=False)
        tokenizer = self.package.SimpleTokenizer(context_length=32)
        made = self.train.get_wds_dataset(options, transform, is_train=True, tokenizer=tokenizer, floor=workers > 0)
        loader: Iterable[Any] = made.dataloader
        return loader


class Ours:
    """The project's stream, and the device's half of the views."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, views: Views = VIEWS) -> None:
        self.source = Source(load_shards(find_shards(shards_in(folder))))
        self.tokenizer, self.views = tokenizer, views

    def batches(self, workers: int) -> Iterator[Any]:
        """An epoch, whole batches only."""
        config = DataConfig(views=self.views, workers=workers)
        stream = Stream([self.source], config, self.tokenizer, seed=0, batch_size=BATCH)
        on_device, steps = OnDevice(self.views), len(self.source) // BATCH
        return map(on_device, itertools.islice(stream.batches() if workers else stream, steps))


def shards_in(folder: Path) -> list[str]:
    """Those to train on."""
    return [str(path) for path in sorted(folder.glob("train-*.tar"))]


def make(name: str, folder: Path) -> Usual | OpenClip | Ours:
    """A side by its name."""
    if name == "open_clip":
        return OpenClip(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if name.startswith("ours"):
        return Ours(folder, tokenizer, VIEWS if name == "ours" else PAIRS)
    side = Plain if name.startswith("webdataset") else Streaming
    return side(folder, tokenizer, stock="our log-mel" not in name)


# Rows of tables: the side that is compared, and what of ours it is compared with.
AGAINST = {
    "webdataset": "ours",
    "webdataset, our log-mel": "ours",
    "datasets": "ours",
    "datasets, our log-mel": "ours",
    "open_clip": "ours, image and text",
}


def read_plain(shards: list[str]) -> int:
    """All members' bytes, sample by sample, by webdataset; returns how many samples."""
    return sum(1 for sample in webdataset.WebDataset(shards, shardshuffle=False) if sample["jpg"] and sample["flac"])


def read_ours(shards: list[str]) -> int:
    """All members' bytes of an epoch in shuffled order, by index; returns how many samples."""
    source = Source(load_shards(shards))
    order = Order([Supply("a", [shard.samples for shard in source.shards], 1.0)], 0, BATCH)
    seen = 0
    for lane in range(order.lanes):
        draws = -(-(len(source) - lane) // order.lanes)
        of, numbers = order.sources[0].locate(order.sources[0].draw(lane, 0, draws))
        for shard, number in zip(of.tolist(), numbers.tolist(), strict=True):
            content = source.contents(shard, number)
            seen += bool(content["jpg"] and content["flac"])
    return seen


def cpu_ms(action: Callable[[], int]) -> float:
    """CPU milliseconds of this process, threads and all, per sample that the action handles."""
    before = time.process_time()
    count = action()
    return 1000 * (time.process_time() - before) / count


def exhaust(side: Usual | OpenClip | Ours) -> int:
    """Run through an epoch in this process; returns how many samples there were."""
    return BATCH * sum(1 for _ in side.batches(0))


def start_and_memory(name: str, folder: Path) -> tuple[float, float]:
    """Seconds to the first batch of two workers, and the most megabytes that these hold for themselves in an epoch."""
    # Linux's own way, and the one that peers are made for; a process that was spawned would spawn its workers.
    multiprocessing.set_start_method("fork", force=True)
    begun = time.perf_counter()
    batches = iter(make(name, folder).batches(WORKERS))
    next(batches)
    seconds, most = time.perf_counter() - begun, own_megabytes()
    for _ in batches:
        most = max(most, own_megabytes())
    return seconds, most


def own_megabytes() -> float:
    """Of this process's children together: memory that would be free without them."""
    held = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            held += child.memory_full_info().uss
    return held / 1e6


def collate_ms(tokenizer: PreTrainedTokenizerBase, rounds: int) -> tuple[float, float, float]:
    """Milliseconds for 256 images: what is left when the last is decoded, what batching costs in all, `torch.stack`.

    Ours are resized into the place that they have in the batch, so that most of what batching costs lies before the
    last image: writing to the memory of a batch rather than to that of one image, again and again.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    tensors = list(torch.from_numpy(pictures[:, :224, :224].copy()))
    one = IMAGE.allocate(1, True)
    last, batching, stacked = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for picture in pictures:
            IMAGE.put(one, 0, picture, 0)
        before = time.perf_counter()
        room = IMAGE.allocate(BATCH, True)
        for i, picture in enumerate(pictures):
            IMAGE.put(room, i, picture, i)
        middle = time.perf_counter()
        IMAGE.field(room, BATCH, tokenizer)
        after = time.perf_counter()
        del room  # which leaves its memory to the next one, as in training
        between = time.perf_counter()
        batch = torch.stack(tensors)
        stacked.append(1000 * (time.perf_counter() - between))
        del batch
        last.append(1000 * (after - middle))
        batching.append(1000 * (after - before - (before - start)))
    return statistics.median(last), statistics.median(batching), statistics.median(stacked)


def ordering() -> tuple[float, float]:
    """Seconds, and megabytes at the most, to order an epoch of 10 million samples in 10,000 shards for 64 lanes."""
    tracemalloc.start()
    order = Order([Supply("a", [1000] * 10_000, 1.0)], 0, 4096).sources[0]
    for lane in range(order.lanes):
        order.draw(lane, 0, order.size // order.lanes)
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    before = time.perf_counter()
    order = Order([Supply("a", [1000] * 10_000, 1.0)], 0, 4096).sources[0]
    for lane in range(order.lanes):
        order.draw(lane, 0, order.size // order.lanes)
    return time.perf_counter() - before, megabytes


def memory_growth(folder: Path, count: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, float]]:
    """Megabytes that a worker process holds for itself after so many samples; image, text and sound each."""
    views = Views(ImageView(size=32), TextView(max_tokens=16), AudioView(frames=8, mels=16))
    sources = [Source(load_shards(find_shards([f"{folder}/small-*.tar"])))]
    stream = Stream(sources, DataConfig(views=views, workers=1), tokenizer, seed=0, batch_size=BATCH)
    seen, held = 0, list[tuple[int, float]]()
    for batch in stream.batches():
        seen += batch.size
        if seen // (count // 10) > len(held):
            (worker,) = multiprocessing.active_children()
            lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
            pages = next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))
            held.append((seen, pages / 1024))
        if len(held) == 10:
            return held
    raise RuntimeError("the stream ended")


def small_samples(count: int) -> Iterator[dict[str, bytes | str]]:
    """As many samples as there is patience for, tiny."""
    png, wav = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(png, "PNG")
    soundfile.write(wav, np.zeros(1600), SAMPLE_RATE, format="WAV")
    for number in range(count):
        yield {"__key__": f"{number:06d}", "png": png.getvalue(), "txt": b"a red square", "wav": wav.getvalue()}


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description="Compare reading.")
    parser.add_argument("--samples", type=int, default=2048, help="JPEG, caption and second of sound each")
    parser.add_argument("--memory-samples", type=int, default=100_000, help="small ones, for the memory of a worker")
    parser.add_argument("--rounds", type=int, default=5, help="times that each pipeline runs, in turn")
    given = parser.parse_args(argv)
    if given.samples < WORKERS * BATCH:
        parser.error(f"--samples {given.samples}: allowed is {WORKERS * BATCH} or more, a batch for each worker")
    # CPU seconds, not speed: further threads would only add their waiting, most of all to NumPy's small products.
    torch.set_num_threads(1)
    threadpool_limits(1)
    datasets.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = train_tokenizer([" ".join(WORDS)] * 100, 400)
        tokenizer.save_pretrained(folder / "tokenizer")
        # As many samples for each worker, and none of them with less than a batch.
        written = write_shards(samples(given.samples), folder / "train", max_samples=-(-given.samples // (2 * WORKERS)))
        shards = [str(path) for path in written]
        print(
            f"{given.samples} samples in {len(shards)} shards, JPEG by {'simplejpeg' if decode.simplejpeg else 'PIL'}"
        )

        sides, absent = {}, dict[str, str]()
        for name in (*dict.fromkeys(AGAINST.values()), *AGAINST):
            try:
                sides[name] = make(name, folder)
            except MissingPeerError as error:
                absent[name] = str(error)
        actions = {name: partial(cpu_ms, partial(exhaust, side)) for name, side in sides.items()}
        actions |= {"ours, bytes": partial(cpu_ms, lambda: read_ours(shards))}
        actions |= {"webdataset, bytes": partial(cpu_ms, lambda: read_plain(shards))}
        rounds = in_turn(actions, given.rounds)
        starts = [
            {name: in_group(1, 1, start_and_memory, name, folder)[0] for name in sides if "log-mel" not in name}
            for _ in range(given.rounds)
        ]
        against = {**AGAINST, "webdataset, bytes": "ours, bytes"}
        lines = []
        for name in rounds[0]:
            ours = against.get(name)
            times = "-" if ours is None else f"{ratio(rounds, name, ours):.2f}x"
            line = [name, spread(rounds, name).show(3), times]
            if name in starts[0]:
                line.append(Spread.of([row[name][0] for row in starts]).show(2))
                line.append(Spread.of([row[name][1] for row in starts]).show())
            lines.append([*line, *["-"] * (5 - len(line))])
        lines += [[name, f"absent: {reason}", "", "", ""] for name, reason in absent.items()]
        header = ["", "CPU ms per sample (quartiles)", "times ours", "s to the first batch", "MB of two workers"]
        print(f"whole batches of {BATCH}; one thread\n\n{table(header, lines)}", flush=True)

        collated, batching, stacked = collate_ms(tokenizer, 20)
        seconds, megabytes = ordering()
        others = [
            ["to collate 256 images of 224 px, when the last is decoded", f"{collated:.2f} ms"],
            ["the same with writing each to its place", f"{batching:.2f} ms"],
            ["the same by torch.stack", f"{stacked:.2f} ms"],
            ["ordering 10 million samples", f"{seconds:.2f} s, {megabytes:.0f} MB"],
        ]
        print(table(["of ours", ""], others), flush=True)

        write_shards(small_samples(given.memory_samples // 10), folder / "small", max_samples=1000)
        held = memory_growth(folder, given.memory_samples, tokenizer)
        grown = [[f"{seen:,}", f"{megabytes:.1f}"] for seen, megabytes in held]
        print(table(["samples read by a worker of ours", "MB of its own"], grown))
        first = {name: statistics.median(row[name][0] for row in starts) for name in starts[0]}
        figures = {
            "end_to_end_ratio": ratio(rounds, "webdataset", "ours"),
            "own_mel_ratio": ratio(rounds, "webdataset, our log-mel", "ours"),
            "datasets_ratio": ratio(rounds, "datasets", "ours"),
            "open_clip_ratio": ratio(rounds, "open_clip", "ours, image and text"),
            "read_ratio": ratio(rounds, "webdataset, bytes", "ours, bytes"),
            "cpu_ms": round(spread(rounds, "ours").median, 3),
            "first_batch_s": {name: round(seconds, 2) for name, seconds in first.items()},
            "collate_ms": round(collated, 3),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
