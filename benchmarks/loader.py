"""How much work reading is: our stream beside a plain webdataset pipeline on the same shards, in turn, in CPU seconds.

    python benchmarks/loader.py                 # minutes on 2 CPU cores; the figures of benchmarks/README.md
    python benchmarks/loader.py --samples 300 --memory-samples 5000 --rounds 2      # a quick look

The plain pipeline is what one writes with webdataset, PIL and transformers: decode, resize, normalise to float32, and
make a log-mel spectrogram, all per sample, then stack. Ours ships integers and does the rest for whole batches. Both
end with the same tensors: float images, token ids, log-mel. Since most of the plain one's time goes into
`ASTFeatureExtractor`, a second line gives it our own log-mel. The last line is one JSON object with the ratios.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import soundfile
import soxr
import torch
import webdataset
from PIL import Image
from threadpoolctl import threadpool_limits
from transformers import ASTFeatureExtractor, PreTrainedTokenizerBase

from data import decode
from data.batch import Field
from data.index import find_shards, load_shards
from data.order import Order, Supply
from data.shards import write_shards
from data.source import Source
from data.stream import DataConfig, Stream
from data.text import train_tokenizer
from data.transforms import SAMPLE_RATE, AudioView, ImageView, LogMel, OnDevice, TextView, Views

BATCH = 256
SIDE, SECONDS = 256, 1.0
IMAGE, AUDIO = ImageView(size=224), AudioView(frames=100, mels=128)
VIEWS = Views(IMAGE, TextView(max_tokens=32), AUDIO)
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


class Plain:
    """The usual way: everything per sample, in float32."""

    def __init__(self, shards: list[str], tokenizer: PreTrainedTokenizerBase, stock: bool) -> None:
        self.shards, self.tokenizer = shards, tokenizer
        self.mel = stock_mel() if stock else own_mel()

    def sample(self, sample: dict[str, Any]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Float pixels (3, 224, 224), token ids and a log-mel spectrogram (frames, mels)."""
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        ids = self.tokenizer(sample["txt"].decode(), truncation=True, max_length=32)["input_ids"]
        sound, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        if rate != SAMPLE_RATE:
            sound = soxr.resample(sound, rate, SAMPLE_RATE)
        return pixels, ids, self.mel(sound)

    def __iter__(self) -> Iterator[Any]:
        data = iter(webdataset.WebDataset(self.shards, shardshuffle=False).map(self.sample))
        while len(batch := list(itertools.islice(data, BATCH))) == BATCH:  # as ours: whole batches only
            images, ids, sounds = zip(*batch, strict=True)
            yield (
                torch.stack(images),
                self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt"),
                torch.stack(sounds),
            )


class Ours:
    """The project's stream, and the device's half of the views."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
        config = DataConfig(views=VIEWS, workers=0)
        self.stream = Stream([source], config, tokenizer, seed=0, batch_size=BATCH)
        self.steps = len(source) // BATCH
        self.on_device = OnDevice(VIEWS)

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.islice(self.stream, self.steps):
            yield self.on_device(batch)


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


def exhaust(batches: Any) -> int:
    """Run through; returns how many samples there were."""
    return BATCH * sum(1 for _ in batches)


def compare(ours: Callable[[], int], plain: Callable[[], int], rounds: int) -> tuple[float, float, float]:
    """Median CPU milliseconds per sample of each, and the median of their ratios, timed alternately."""
    pairs = [(cpu_ms(ours), cpu_ms(plain)) for _ in range(rounds + 1)][1:]  # the first warms up
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


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


def first_batch_seconds(source: Source, tokenizer: PreTrainedTokenizerBase) -> float:
    """From asking for batches to the first one of 8 samples, with two workers."""
    config = DataConfig(views=VIEWS, workers=2)
    stream = Stream([source], config, tokenizer, seed=0, batch_size=8)
    before = time.perf_counter()
    next(stream.batches())
    return time.perf_counter() - before


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


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description="Compare reading with a plain webdataset pipeline.")
    parser.add_argument("--samples", type=int, default=2000, help="JPEG, caption and second of sound each")
    parser.add_argument("--memory-samples", type=int, default=100_000, help="small ones, for the memory of a worker")
    parser.add_argument("--rounds", type=int, default=5, help="times that each pipeline runs, in turn")
    arguments = parser.parse_args()
    # CPU seconds, not speed: further threads would only add their waiting, most of all to NumPy's small products.
    torch.set_num_threads(1)
    threadpool_limits(1)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = train_tokenizer([" ".join(WORDS)] * 100, 400)
        shards = [str(path) for path in write_shards(samples(arguments.samples), folder / "train", max_samples=500)]
        source = Source(load_shards(shards))
        print(
            f"{len(source)} samples in {len(shards)} shards, JPEG by {'simplejpeg' if decode.simplejpeg else 'PIL'}\n"
        )

        print(f"whole batches of {BATCH}; one thread\n{'CPU ms per sample':32} {'ours':>8} {'plain':>8} {'ratio':>8}")

        def ours() -> int:
            return exhaust(Ours(source, tokenizer))

        rows: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {
            "end to end": (ours, lambda: exhaust(Plain(shards, tokenizer, stock=True))),
            "end to end, our log-mel in both": (ours, lambda: exhaust(Plain(shards, tokenizer, stock=False))),
            "reading bytes": (lambda: read_ours(shards), lambda: read_plain(shards)),
        }
        ratios = {}
        for name, (one, other) in rows.items():
            a, b, ratios[name] = compare(one, other, arguments.rounds)
            print(f"{name:32} {a:8.3f} {b:8.3f} {ratios[name]:7.2f}x", flush=True)

        collated, batching, stacked = collate_ms(tokenizer, 20)
        print(f"\n{'to collate 256 images of 224 px':32} {collated:8.2f} ms after the last one is decoded")
        print(f"{'  with writing each to its place':32} {batching:8.2f} ms")
        print(f"{'the same by torch.stack':32} {stacked:8.2f} ms after the last one is decoded")
        print(f"{'first batch of two workers':32} {first_batch_seconds(source, tokenizer):8.2f} s")
        seconds, megabytes = ordering()
        print(f"{'ordering 10 million samples':32} {seconds:8.2f} s, {megabytes:.0f} MB")

        write_shards(small_samples(arguments.memory_samples // 10), folder / "small", max_samples=1000)
        held = memory_growth(folder, arguments.memory_samples, tokenizer)
        print(f"\n{'samples read by a worker':32} " + " ".join(f"{seen:>7}" for seen, _ in held))
        print(f"{'MB of its own':32} " + " ".join(f"{megabytes:7.1f}" for _, megabytes in held))
        print(
            json.dumps(
                {
                    "end_to_end_ratio": round(ratios["end to end"], 2),
                    "read_ratio": round(ratios["reading bytes"], 2),
                    "collate_ms": round(collated, 3),
                }
            )
        )


if __name__ == "__main__":
    main()
