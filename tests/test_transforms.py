import io
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from transformers import ASTFeatureExtractor, ViTImageProcessorPil

import data.digits
import data.transforms
from data.batch import Batch, Field
from data.decode import Waveform, decode_audio
from data.index import build_index
from data.transforms import (
    AudioView,
    ImageView,
    LogMel,
    OnDevice,
    Pixels,
    TextView,
    View,
    Views,
    make_field,
)
from tests.samples import encode_image, encode_sound, noise, noise_image, tokenizer

Picture = npt.NDArray[np.uint8]
Sound = npt.NDArray[np.int16]


def waveform(sound: Sound) -> Waveform:
    return Waveform(sound.astype(np.float32) / np.float32(32768), 16_000)


def for_training(view: View, values: Sequence[Any], seed: int | None = None) -> Field:
    room = view.allocate(len(values), training=True)
    for i, value in enumerate(values):
        view.put(room, i, value, i if seed is None else seed)
    return view.field(room, len(values), tokenizer())


def heard(view: AudioView, sound: Waveform, seed: int | None = None) -> Sound:
    """What the worker ships of one sound."""
    room = view.allocate(1, training=seed is not None)
    view.put(room, 0, sound, seed)
    assert not room.samples[0, room.lengths[0] :].any()
    shipped: Sound = room.samples[0, : room.lengths[0]].numpy()
    return shipped


def augmented(view: AudioView, sounds: list[Sound], seeds: Tensor) -> list[Sound]:
    """What the device makes of sounds, before it takes the spectrogram."""
    field = for_training(view, [waveform(sound) for sound in sounds])
    lengths = torch.tensor([min(len(sound), view.samples) for sound in sounds])
    x, lengths = LogMel(view)._augment(field.x, lengths, seeds)
    assert x.dtype == torch.int16
    for row, length in zip(x, lengths, strict=True):
        assert not row[length:].any()
    return [row[:length].numpy() for row, length in zip(x, lengths.tolist(), strict=True)]


@cache
def clips(count: int) -> list[Sound]:
    """Spoken digits at 16 kHz, as a view gives them."""
    index = build_index(data.digits._ASSETS[0])
    found = []
    with data.digits._ASSETS[0].open("rb") as file:
        for sample in index.samples[:: len(index.samples) // count][:count]:
            offset, size = sample.members["flac"]
            file.seek(offset)
            found.append(heard(AudioView(), decode_audio(file.read(size))))
    return found


def log_mel(view: AudioView, sounds: list[Sound]) -> Tensor:
    mel: Field = LogMel(view)(make_field(view, [waveform(sound) for sound in sounds], tokenizer()))
    assert mel.valid is None
    return mel.x


def reference(view: AudioView, sound: Sound) -> Tensor:
    extractor = ASTFeatureExtractor(num_mel_bins=view.mels, max_length=view.frames, mean=view.mean, std=view.std)
    features: Tensor = extractor(sound.astype(np.float32) / 32768, sampling_rate=16_000, return_tensors="pt")[
        "input_values"
    ]
    return features[0]


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize(
    "view",
    [
        AudioView(),
        AudioView(frames=64, mels=32),
        AudioView(frames=40, mels=80, mean=-3.0, std=2.5),
        AudioView(frames=1, mels=16),
    ],
    ids=["default", "64x32", "40x80", "1x16"],
)
def test_log_mel_equals_ast_on_speech_of_any_length(view: AudioView) -> None:
    long = np.concatenate(clips(4))
    lengths = [400, 401, 559, 560, 5000, view.samples - 1, view.samples, view.samples + 1, view.samples + 160]
    sounds = [long[: min(length, len(long))] for length in lengths]
    got = log_mel(view, sounds)
    assert got.shape == (len(sounds), view.frames, view.mels)
    assert got.dtype == torch.float32
    for sound, mel in zip(sounds, got, strict=True):
        torch.testing.assert_close(mel, reference(view, sound), rtol=0, atol=1e-5)


def test_log_mel_equals_ast_on_quiet_clipped_and_offset_sound() -> None:
    view = AudioView(frames=64, mels=32)
    speech = clips(4)[0].astype(np.float64)
    loud = speech / np.abs(speech).max() * 32768
    sounds = [
        np.rint(loud * 0.0005).astype(np.int16),
        np.clip(loud * 8, -32768, 32767).astype(np.int16),
        np.clip(loud * 0.1 + 20_000, -32768, 32767).astype(np.int16),
        np.zeros(5000, dtype=np.int16),
        np.rint(32000 * np.sin(np.arange(8000) * 2 * np.pi * 440 / 16000)).astype(np.int16),  # 90 dB between bands
    ]
    for sound, mel in zip(sounds, log_mel(view, sounds), strict=True):
        torch.testing.assert_close(mel, reference(view, sound), rtol=0, atol=1e-5)


def test_log_mel_of_a_clip_does_not_depend_on_its_batch() -> None:
    view = AudioView(frames=64, mels=32)
    sounds = [clip[: 3000 + 300 * i] for i, clip in enumerate(clips(40))]  # more than are taken at a time
    together = log_mel(view, sounds)
    alone = torch.cat([log_mel(view, [sound]) for sound in sounds])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_frames_past_the_end_are_zero_before_normalising() -> None:
    view = AudioView(frames=10, mels=8, mean=-4.0, std=2.0)
    mel = log_mel(view, [np.full(399, 99, dtype=np.int16), clips(4)[0][: 400 + 160 * 3 + 159], clips(4)[0]])
    padding = 4.0 / (2.0 * 2)
    assert (mel == padding).all(dim=2).sum(dim=1).tolist() == [10, 6, 0]
    assert (mel[1, 4:] == padding).all()


def test_log_mel_without_validity_takes_clips_as_whole() -> None:
    view = AudioView(frames=20, mels=8)
    sound = clips(4)[0]
    short = LogMel(view)(Field(torch.from_numpy(sound[None, :2000]), torch.arange(1)))
    torch.testing.assert_close(short.x, log_mel(view, [sound[:2000]]), rtol=0, atol=1e-6)
    long = LogMel(view)(Field(torch.from_numpy(sound[None]), torch.arange(1)))
    torch.testing.assert_close(long.x, log_mel(view, [sound]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (50, 31), (20, 77), (7, 9), (1, 40)])
def test_images_equal_those_of_vits_processor(shape: tuple[int, int]) -> None:
    view = ImageView(size=16, crop_scale=0.5, flip=True, colour=0.5, load=40)
    image = noise_image(*shape)
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    field = make_field(view, [np.array(image)], tokenizer())
    assert field.x.dtype == torch.uint8
    torch.testing.assert_close(view.on_device()(field).x, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(view.on_device()(field, None).x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (50, 31), (7, 9), (1, 40), (300, 200)])
def test_images_for_training_are_resized_to_the_side_that_is_loaded(shape: tuple[int, int]) -> None:
    image = noise_image(*shape).resize(shape, Image.Resampling.BICUBIC)
    for view, method in (
        (ImageView(size=16, flip=True), Image.Resampling.BILINEAR),
        (ImageView(size=16, crop_scale=0.5), Image.Resampling.BICUBIC),
        (ImageView(size=16, load=30), Image.Resampling.BICUBIC),
    ):
        x = for_training(view, [np.array(image)]).x
        side = view.load_side
        assert x.shape == (1, 3, side, side)
        expected = np.asarray(image.resize((side, side), method)).astype(int)
        assert np.abs(x[0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_the_side_that_is_loaded_keeps_the_resolution_of_the_smallest_crop() -> None:
    assert ImageView(size=224).load_side == 224
    assert ImageView(size=224, crop_scale=0.9).load_side == 237
    assert ImageView(size=224, crop_scale=0.5).load_side == 317
    assert ImageView(size=224, crop_scale=0.08).load_side == 448
    assert ImageView(size=224, crop_scale=0.5, load=256).load_side == 256


def test_jpegs_are_decoded_smaller_in_training_only() -> None:
    encoded = encode_image(noise_image(96, 64), "JPEG")
    assert ImageView(size=16).decode(encoded, training=False).shape == (64, 96, 3)
    assert ImageView(size=16).decode(encoded, training=True).shape == (16, 24, 3)
    assert ImageView(size=16, crop_scale=0.5).decode(encoded, training=True).shape == (32, 48, 3)
    assert ImageView(size=16, load=33).decode(encoded, training=True).shape == (64, 96, 3)


def test_views_decode_their_own_members() -> None:
    for training in (False, True):
        assert TextView().decode(b"a cat", training) == "a cat"
        sound = AudioView().decode(encode_sound(noise(100), rate=8000), training)
        assert (len(sound.samples), sound.rate) == (100, 8000)


def seen(view: ImageView, image: Picture, seeds: Tensor) -> Tensor:
    """(n, size, size, 3), 0 to 255: the image as the device gives it for each seed."""
    field = for_training(view, [image] * len(seeds))
    x: Tensor = view.on_device()(field, seeds).x
    assert (x.dtype, x.shape) == (torch.float32, (len(seeds), 3, view.size, view.size))
    return ((x + 1) * 127.5).permute(0, 2, 3, 1)


SEEDS = torch.arange(200) * 7919 - 300


@pytest.mark.parametrize("smallest", [0.05, 0.5, 0.99])
def test_crops_stay_inside_and_keep_their_share(smallest: float) -> None:
    pixels = Pixels(ImageView(size=4, crop_scale=smallest))
    many = torch.arange(20_000)
    (left, width), (top, height), mirrored = pixels._boxes(many)
    for start, length in ((left, width), (top, height)):
        assert start.min() >= 0
        assert (start + length).max() <= 1 + 1e-12
        # Everywhere: at both edges, and on average in the middle.
        assert (start / (1 - length)).mean() == pytest.approx(0.5, abs=0.02)
        assert (start / (1 - length)).min() < 0.01
        assert (start / (1 - length)).max() > 0.99
    share, ratio = width * height, width / height
    assert smallest - 1e-9 <= share.min() < smallest + 0.01
    assert 1 - 0.01 < share.max() <= 1
    assert share.mean() == pytest.approx((1 + smallest) / 2, abs=0.02)
    assert max(width.max(), height.max()) <= 1
    assert 0.75 - 1e-9 <= ratio.min() < 0.999
    assert 1.001 < ratio.max() <= 4 / 3 + 1e-9
    assert ratio.log().mean() == pytest.approx(0, abs=0.01)
    assert not mirrored.any()


def test_crops_of_extreme_draws_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.cartesian_prod(*[torch.tensor([0, 1 - 2**-53], dtype=torch.float64)] * 5)
    monkeypatch.setattr(data.transforms, "uniforms", lambda *_: ends)
    for smallest in (0.01, 0.5, 1.0):
        boxes = Pixels(ImageView(size=4, crop_scale=smallest))._boxes(torch.arange(len(ends)))
        for start, length in boxes[:2]:
            assert start.min() >= 0
            assert length.min() > 0
            assert (start + length).max() <= 1 + 1e-12


@pytest.mark.parametrize("size", [5, 24, 64])
@pytest.mark.parametrize("side", [64, 91])
def test_a_crop_is_what_pillow_makes_of_its_box(size: int, side: int) -> None:
    view = ImageView(size=size, crop_scale=0.1, flip=True, load=side)
    image = noise_image(side, side)
    (left, width), (top, height), mirrored = Pixels(view)._boxes(SEEDS)
    assert 70 < mirrored.sum() < 130
    for row, got in enumerate(seen(view, np.array(image), SEEDS)):
        stretch = torch.stack([left, top, left + width, top + height], dim=1)[row].clamp(0, 1) * side
        expected = image.resize((size, size), Image.Resampling.BILINEAR, box=tuple(stretch.tolist()))
        if mirrored[row]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert (got - torch.from_numpy(np.array(expected))).abs().max() < 1.1  # Pillow rounds twice


def test_an_image_that_is_not_square_is_cropped_alike() -> None:
    # Red is the column, green the row.
    columns, rows_ = np.meshgrid(np.arange(200), np.arange(100))
    image = np.stack([columns, rows_, rows_], axis=2).astype(np.uint8)
    view = ImageView(size=20, crop_scale=0.2)
    (left, width), (top, height), _ = Pixels(view)._boxes(SEEDS)
    x = seen(view, image, SEEDS)
    assert (x[..., 0].mean(dim=(1, 2)) - (200 * (left + width / 2) - 0.5)).abs().max() < 1.5
    assert (x[..., 1].mean(dim=(1, 2)) - (100 * (top + height / 2) - 0.5)).abs().max() < 1.5
    assert (x[:, :, -1, 0] - x[:, :, 0, 0] - (200 * width * 19 / 20)[:, None]).abs().max() < 3


def test_half_of_the_images_are_mirrored_exactly() -> None:
    image = np.array(noise_image(8, 8))
    plain = torch.from_numpy(image).float()
    found = seen(ImageView(size=8, flip=True), image, SEEDS).round()
    mirrored = sum(torch.equal(x, plain.flip(1)) for x in found)
    assert mirrored + sum(torch.equal(x, plain) for x in found) == 200
    assert 70 < mirrored < 130
    for x in seen(ImageView(size=8), image, SEEDS):
        assert torch.equal(x.round(), plain)


def test_colours_change_as_pillow_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.array(noise_image(40, 30)) // 3 + 70)  # nothing is clipped
    draws = torch.tensor([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [0.9, 0.5, 0.5], [0.9, 0.2, 0.7]]).double()
    monkeypatch.setattr(data.transforms, "uniforms", lambda *_: draws)
    found = seen(ImageView(size=40, colour=0.4), np.array(image.resize((40, 40))), torch.arange(5))
    for draw, got in zip(draws, found, strict=True):
        expected = image.resize((40, 40))
        for change, factor in zip(
            (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness), 1 + 0.4 * (2 * draw - 1), strict=True
        ):
            expected = change(expected).enhance(float(factor))
        assert (got - torch.from_numpy(np.array(expected))).abs().max() < 3  # Pillow rounds at each step
        assert (got - torch.from_numpy(np.array(image.resize((40, 40))))).abs().max() > 10


def test_colours_stay_within_their_bounds() -> None:
    flat = np.full((8, 8, 3), 100, dtype=np.uint8)
    x = seen(ImageView(size=8, colour=0.3), flat, torch.arange(500))
    assert (x - x[:, :1, :1, :1]).abs().max() < 1e-3  # contrast and saturation leave an even grey as it is
    assert 69.99 <= x.min() < 72
    assert 128 < x.max() <= 130.01
    bright = seen(ImageView(size=8, colour=1.0), np.array(noise_image(8, 8)), torch.arange(500))
    assert bright.min() == 0
    assert bright.max() == 255


def test_images_of_a_room_are_its_memory() -> None:
    view = ImageView(size=8)
    room = view.allocate(5, training=False)
    images = [np.array(noise_image(8, 8, seed)) for seed in range(4)]
    for place, image in ((0, images[0]), (1, images[3]), (1, images[1]), (2, images[2])):
        view.put(room, place, image, None)
    field = view.field(room, 3, tokenizer())
    assert field.x.data_ptr() == room.data_ptr()
    assert field.x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(field.x.permute(0, 2, 3, 1), images[:3])
    assert field.rows.tolist() == [0, 1, 2]


def test_sounds_of_a_room_are_its_memory() -> None:
    view = AudioView(frames=2)  # 560 samples
    room = view.allocate(3, training=False)
    room.samples.fill_(99)
    sounds = [np.arange(1, length + 1).astype(np.int16) for length in (560, 7, 30)]
    for place, sound in ((0, sounds[0]), (1, sounds[0]), (1, sounds[1]), (2, sounds[2])):
        view.put(room, place, waveform(sound), None)
    field = view.field(room, 2, tokenizer())
    assert field.x.data_ptr() == room.samples.data_ptr()
    assert field.x[1].tolist() == [*range(1, 8), *[0] * 553]
    assert field.valid is not None
    assert field.valid.sum(1).tolist() == [560, 7]
    assert field.valid[1, :7].all()
    assert view.field(room, 1, tokenizer()).valid is None  # nothing is padded


def test_captions_of_a_room_may_be_overwritten() -> None:
    view = TextView()
    room = view.allocate(3, training=True)
    for place, text in ((0, "a cat"), (1, "rain on a tin roof"), (1, "a dog")):
        view.put(room, place, text, 0)
    assert torch.equal(view.field(room, 2, tokenizer()).x, make_field(view, ["a cat", "a dog"], tokenizer()).x)


def shares(x: Tensor) -> bool:
    return bool(x.is_shared())  # type: ignore[no-untyped-call]


def test_workers_use_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, image = waveform(noise_sound(5)), np.array(noise_image(9, 9))
    here = [make_field(ImageView(size=8), [image], tokenizer()), make_field(AudioView(), [sound], tokenizer())]
    monkeypatch.setattr(data.transforms, "get_worker_info", object)
    shared = [make_field(ImageView(size=8), [image], tokenizer()), make_field(AudioView(), [sound], tokenizer())]
    for a, b in zip(here, shared, strict=True):
        assert not shares(a.x)
        assert shares(b.x)
        assert torch.equal(a.x, b.x)
    assert shared[1].valid is not None
    assert shares(shared[1].valid)


def noise_sound(seed: int, length: int = 3000) -> Sound:
    return np.rint(noise(length, seed, level=0.05) * 32768).astype(np.int16)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Sums are cut up among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [8, 33, 192])
def test_an_image_is_augmented_the_same_in_any_batch(size: int) -> None:
    view = ImageView(size=size, crop_scale=0.7, flip=True, colour=0.4)
    images = [np.array(noise_image(size, size, seed)) for seed in range(7)]
    seeds = torch.arange(7) * 10**15 - 3
    on_device = view.on_device()
    together = on_device(for_training(view, images), seeds).x
    order = [3, 0, 6, 1]
    shuffled = on_device(for_training(view, [images[row] for row in order]), seeds[order]).x
    for place, row in enumerate(order):
        assert torch.equal(shuffled[place], together[row])
        alone = on_device(for_training(view, [images[row]]), seeds[row : row + 1]).x
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(on_device(for_training(view, images), seeds + 1).x, together)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("frames", [9, 96])
def test_a_sound_is_augmented_the_same_in_any_batch(frames: int) -> None:
    view = AudioView(frames=frames, shift=0.02, noise=0.4, gain=6, time_mask=5, frequency_mask=20)
    sounds = [noise_sound(seed, 1000 + 17 * seed) for seed in range(40)]  # more than are taken at a time
    seeds = torch.arange(40) * 10**15 - 3
    on_device = view.on_device()
    together = augmented(view, sounds, seeds)
    spectrograms = on_device(for_training(view, [waveform(sound) for sound in sounds]), seeds).x
    for rows in ([0], [39], [17, 3, 0, 39, 38, 1, 2]):
        few = [sounds[row] for row in rows]
        field = for_training(view, [waveform(sound) for sound in few])
        found = on_device(field, seeds[rows]).x
        for place, (row, sound) in enumerate(zip(rows, augmented(view, few, seeds[rows]), strict=True)):
            np.testing.assert_array_equal(sound, together[row])
            torch.testing.assert_close(found[place], spectrograms[row], rtol=0, atol=1e-6)
            assert torch.equal(found[place] == 0, spectrograms[row] == 0)  # the same masks


def test_sound_is_clipped_to_16_bits() -> None:
    samples = np.array([0, 0.5, 1, -1, 2, -2, 1e-5, 0.6 / 32768], dtype=np.float32)
    got = heard(AudioView(), Waveform(samples, 16_000), None)
    assert got.dtype == np.int16
    assert got.tolist() == [0, 16384, 32767, -32768, 32767, -32768, 0, 1]


def test_16_bit_sound_comes_back_exactly() -> None:
    given = np.arange(-32768, 32768, 7, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, given, 16_000, format="WAV")
    np.testing.assert_array_equal(heard(AudioView(), decode_audio(file.getvalue()), None), given)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate).astype(np.float32)
    got = heard(AudioView(), Waveform(tone * 0.5, rate), None)
    assert abs(len(got) - 8000) <= 1
    assert peak(got) == pytest.approx(500, abs=3)
    assert np.abs(got[1000:-1000]).max() == pytest.approx(16384, rel=0.01)


def peak(sound: Sound) -> float:
    """The strongest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 17))
    return float(spectrum.argmax()) * 16_000 / (1 << 17)


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_speed_shortens_and_raises_the_pitch_alike(rate: int) -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype(np.float32) * np.float32(0.5)
    speeds = []
    for seed in range(25):
        got = heard(AudioView(frames=200, speed=0.2), Waveform(tone, rate), seed)
        speeds.append(16_000 / len(got))
        assert peak(got) / 500 == pytest.approx(speeds[-1], abs=0.01)
    assert 0.8 - 1e-3 <= min(speeds) < 0.88
    assert 1.12 < max(speeds) <= 1.2 + 1e-3


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_every_speed_that_is_allowed_works(monkeypatch: pytest.MonkeyPatch, end: float) -> None:
    monkeypatch.setattr("data.transforms.uniform", lambda seed, purpose: end)
    largest = 0.0
    for speed in np.arange(1, 1000) / 1000:
        try:
            view = AudioView(frames=10, speed=float(speed))
        except ValueError:
            break
        largest = float(speed)
    view = AudioView(frames=1000, speed=largest)
    assert len(heard(view, Waveform(noise(800), 16_000), 0)) > 0


def test_shift_puts_silence_in_front_and_keeps_the_end() -> None:
    view = AudioView(frames=20, shift=0.05)  # 3440 samples; at most 800 of silence
    for length in (1000, 3000, view.samples - 1, view.samples):
        sound = np.where(np.arange(length) % 2, 3000, -3000).astype(np.int16)
        silences = []
        for got in augmented(view, [sound] * 60, torch.arange(60)):
            silences.append(len(got) - length)
            assert len(got) <= view.samples
            assert not got[: silences[-1]].any()
            np.testing.assert_array_equal(got[silences[-1] :], sound)
        room = min(800, view.samples - length)
        assert 0 <= min(silences) <= room * 0.2
        assert room * 0.8 <= max(silences) <= room


def test_every_shift_occurs() -> None:
    view = AudioView(frames=20, shift=5 / 16_000)
    found = augmented(view, [noise_sound(0, 100)] * 200, torch.arange(200))
    assert {len(sound) - 100 for sound in found} == set(range(6))


def test_the_spectrogram_starts_later_by_the_silence() -> None:
    view = AudioView(frames=40, mels=16, shift=0.2)
    sound = noise_sound(0)
    seeds = torch.arange(30)
    mel = view.on_device()(for_training(view, [waveform(sound)] * 30), seeds).x
    for got, shifted in zip(mel, augmented(view, [sound] * 30, seeds), strict=True):
        torch.testing.assert_close(got, log_mel(view, [shifted])[0], rtol=0, atol=1e-5)


def test_long_clips_are_cut_at_random_in_training_only() -> None:
    view = AudioView(frames=2)  # 560 samples
    sound = waveform(np.arange(575).astype(np.int16))
    np.testing.assert_array_equal(heard(view, sound), np.arange(560))
    starts = set()
    for seed in range(300):
        got = heard(view, sound, seed)
        starts.add(int(got[0]))
        np.testing.assert_array_equal(got, got[0] + np.arange(560))
    assert starts == set(range(16))


def test_gain_and_noise_have_the_levels_asked_for() -> None:
    sound, seeds = noise_sound(0), torch.arange(60)
    plain = sound.astype(float)

    factors = []
    for louder in augmented(AudioView(gain=6), [sound] * 60, seeds):
        got = louder.astype(float)
        factors.append(20 * np.log10(np.sqrt((got**2).mean() / (plain**2).mean())))
        assert np.corrcoef(got, plain)[0, 1] > 0.9999
    assert -6.01 <= min(factors) < -5
    assert 5 < max(factors) <= 6.01

    levels = []
    for noisy in augmented(AudioView(noise=0.5), [sound] * 60, seeds):
        added = noisy - plain
        levels.append(np.sqrt((added**2).mean() / (plain**2).mean()))
        assert abs(np.corrcoef(added, plain)[0, 1]) < 0.1
        assert abs(np.corrcoef(added[1:], added[:-1])[0, 1]) < 0.1
    assert 0 <= min(levels) < 0.1
    assert 0.4 < max(levels) < 0.53


def test_noise_is_relative_to_the_sound_alone_not_to_what_is_padded() -> None:
    short, long = noise_sound(0, 2000), noise_sound(0, 2000)
    view = AudioView(noise=1.0, shift=2)
    compared = 0
    for got, alone in zip(
        augmented(view, [short] * 30, torch.arange(30)),
        augmented(AudioView(frames=12, noise=1.0), [long] * 30, torch.arange(30)),
        strict=True,
    ):
        # With the noise in the silence in front, too, and none behind the end.
        added = alone.astype(float) - long
        if len(got) > 3000 and added.std() > 100:
            compared += 1
            assert got[: len(got) - 2000].astype(float).std() == pytest.approx(added.std(), rel=0.15)
    assert compared > 10


def test_loud_sound_is_clipped() -> None:
    sound = np.array([32767, -32768] * 300, dtype=np.int16)
    for got in augmented(AudioView(gain=20), [sound] * 20, torch.arange(20)):
        assert (np.sign(got) == np.sign(sound)).all()


def test_silence_stays_silence_under_all_augmentation() -> None:
    view = AudioView(frames=4, speed=0.1, shift=0.1, noise=0.5, gain=6)
    silence = np.zeros(500, dtype=np.int16)
    assert not heard(view, waveform(silence), 0).any()
    for got in augmented(view, [silence, silence[:0]] * 5, torch.arange(10)):
        assert not got.any()


def test_evaluation_hears_the_clip_as_it_is() -> None:
    plain = AudioView(frames=30, mels=16)
    view = AudioView(frames=30, mels=16, speed=0.1, shift=0.1, noise=0.5, gain=6, time_mask=10, frequency_mask=5)
    field = make_field(view, [waveform(noise_sound(1))], tokenizer())
    assert torch.equal(view.on_device()(field).x, plain.on_device()(field).x)
    assert torch.equal(view.on_device()(field, None).x, plain.on_device()(field).x)


def test_masks_are_stretches_of_all_widths_and_places() -> None:
    view = AudioView(frames=20, mels=16, time_mask=4, frequency_mask=3)
    sound = noise_sound(0, 2800)  # 16 frames; the rest is padding
    seeds = torch.arange(600)
    field = for_training(view, [waveform(sound)])
    field = Field(field.x.expand(600, -1), torch.arange(600), field.valid.expand(600, -1))  # type: ignore[union-attr]
    plain, masked = AudioView(frames=20, mels=16).on_device()(field, seeds).x[0], view.on_device()(field, seeds).x
    hidden = masked == 0
    assert torch.equal(masked.masked_fill(hidden, 7), plain.expand(600, -1, -1).masked_fill(hidden, 7))
    assert not hidden[:, 16:].any()  # padding stays what it is in evaluation
    frames, bins = hidden.all(dim=2), hidden[:, :16].all(dim=1)
    assert torch.equal(hidden[:, :16], frames[:, :16, None] | bins[:, None])
    for places, widest, size in ((frames[:, :16], 4, 16), (bins, 3, 16)):
        widths = places.sum(dim=1)
        assert widths.bincount().tolist() == pytest.approx([600 / (widest + 1)] * (widest + 1), rel=0.3)
        starts = places[widths == widest].int().argmax(dim=1)
        assert set(starts.tolist()) == set(range(size - widest + 1))
        edges = places.int().diff(dim=1, prepend=torch.zeros(600, 1, dtype=torch.int))
        assert ((edges == 1).sum(dim=1) == (widths > 0)).all()  # one stretch


def test_training_hears_what_evaluation_hears() -> None:
    # In half the precision: in units of the normalised spectrogram.
    view = AudioView(frames=60, mels=64)
    field = for_training(view, [waveform(noise_sound(0, 9000)), waveform(noise_sound(1, 4000))])
    trained, evaluated = view.on_device()(field, torch.arange(2)).x, view.on_device()(field).x
    torch.testing.assert_close(trained, evaluated, atol=1e-3, rtol=0)


def test_a_mask_longer_than_the_clip_covers_at_most_the_clip() -> None:
    view = AudioView(frames=20, mels=16, time_mask=20)
    field = for_training(view, [waveform(noise_sound(0, 400 + 160 * 2)), waveform(noise_sound(0, 100))] * 50)
    masked = (view.on_device()(field, torch.arange(100)).x == 0).all(dim=2)
    assert masked[::2].sum(dim=1).unique().tolist() == [0, 1, 2, 3]
    assert not masked[::2, 3:].any()
    assert not masked[1::2].any()  # shorter than a frame


def test_captions_are_cut_with_their_last_token_kept() -> None:
    field = make_field(TextView(max_tokens=6), ["a cat", "the dog barks at the cat, who barks back at it"], tokenizer())
    assert field.x.shape == (2, 6)
    assert field.x[:, 0].tolist() == [tokenizer().cls_token_id] * 2
    assert field.x[1, -1] == tokenizer().sep_token_id
    assert field.valid is not None
    assert field.valid[1].all()
    assert torch.equal(field.valid, field.x != tokenizer().pad_token_id)
    assert make_field(TextView(max_tokens=64), ["a cat"], tokenizer()).x.shape[1] < 6


def test_on_device_gives_what_the_encoder_reads() -> None:
    views = Views(ImageView(size=8), TextView(max_tokens=8), AudioView(frames=10, mels=8))
    image = Field(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8), torch.arange(2))
    text = Field(torch.tensor([[0, 5, 2]]), torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool))
    audio = make_field(AudioView(frames=10, mels=8), [waveform(clips(4)[0][:1500])], tokenizer())
    batch = OnDevice(views)(Batch({"image": image, "text": text, "audio": audio}, 2, ["a", "b"]))
    assert batch.fields["image"].x[:, 0, 0, 0].tolist() == pytest.approx([-1, 1], abs=2e-7)
    assert torch.equal(batch.fields["text"].x, text.x)
    assert torch.equal(batch.fields["text"].rows, text.rows)
    assert batch.fields["audio"].x.shape == (1, 10, 8)
    assert (batch.size, batch.keys) == (2, ["a", "b"])


def test_each_row_is_augmented_by_its_own_seed() -> None:
    views = Views(ImageView(size=8, crop_scale=0.5), TextView(), AudioView(frames=10, mels=8, gain=6))
    assert views.image is not None
    assert views.audio is not None
    images, sounds = (
        [np.array(noise_image(8, 8, i)) for i in range(2)],
        [waveform(noise_sound(i, 1600)) for i in (0, 1)],
    )
    fields = {
        "image": for_training(views.image, images)._replace(rows=torch.tensor([0, 2])),
        "text": make_field(TextView(), ["a cat", "a dog", "größe"], tokenizer()),
        "audio": for_training(views.audio, sounds)._replace(rows=torch.tensor([1, 2])),
    }
    seeds = torch.tensor([5, 6, 7])
    got = OnDevice(views)(Batch(fields, 3, ["a", "b", "c"], seeds, ("skipped",)))
    assert torch.equal(got.fields["image"].x, views.image.on_device()(fields["image"], seeds[[0, 2]]).x)
    assert torch.equal(got.fields["audio"].x, views.audio.on_device()(fields["audio"], seeds[[1, 2]]).x)
    assert torch.equal(got.fields["text"].x, fields["text"].x)
    assert [field.rows.tolist() for field in got.fields.values()] == [[0, 2], [0, 1, 2], [1, 2]]
    assert got.seeds is not None
    assert torch.equal(got.seeds, seeds)  # masks are drawn with them, too
    assert got.skipped == ("skipped",)


def test_everything_that_is_drawn_has_a_purpose_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    purposes = []

    def noted(draw: Any) -> Any:
        def noting(seeds: Tensor, purpose: int, *rest: Any) -> Tensor:
            purposes.append(purpose)
            numbers: Tensor = draw(seeds, purpose, *rest)
            return numbers

        return noting

    for name in ("uniforms", "normals"):
        monkeypatch.setattr(data.transforms, name, noted(getattr(data.transforms, name)))
    image = ImageView(size=8, crop_scale=0.5, flip=True, colour=0.1)
    audio = AudioView(frames=10, mels=8, shift=0.1, noise=0.1, gain=1, time_mask=1, frequency_mask=1)
    image.on_device()(for_training(image, [np.array(noise_image(8, 8))]), torch.tensor([1]))
    audio.on_device()(for_training(audio, [waveform(noise_sound(0, 1000))]), torch.tensor([1]))
    assert len(purposes) == 5
    assert len(set(purposes)) == 5


def test_seeds_move_with_their_batch() -> None:
    batch = Batch({}, 2, ["a", "b"], torch.tensor([1, 2])).to("meta")
    assert batch.seeds is not None
    assert batch.seeds.device.type == "meta"
    assert Batch({}, 2, ["a", "b"]).to("meta").seeds is None


@pytest.mark.parametrize(
    ("view", "settings", "message"),
    [
        (ImageView, {"size": 0}, r"data\.views\.image\.size=0: allowed is 1 or more"),
        (ImageView, {"crop_scale": 0.0}, r"data\.views\.image\.crop_scale=0\.0: allowed"),
        (ImageView, {"crop_scale": 1.1}, r"data\.views\.image\.crop_scale=1\.1: allowed"),
        (ImageView, {"colour": -0.1}, r"data\.views\.image\.colour=-0\.1: allowed is from 0 to 1"),
        (ImageView, {"colour": 1.1}, r"data\.views\.image\.colour=1\.1: allowed"),
        (ImageView, {"size": 8, "load": 7}, r"data\.views\.image\.load=7: allowed is image\.size or more, or null"),
        (TextView, {"max_tokens": 2}, r"data\.views\.text\.max_tokens=2: allowed is 3"),
        (AudioView, {"frames": 0}, r"data\.views\.audio\.frames=0: allowed"),
        (AudioView, {"mels": 0}, r"data\.views\.audio\.mels=0: allowed"),
        (AudioView, {"std": 0.0}, r"data\.views\.audio\.std=0\.0: allowed"),
        (AudioView, {"speed": 1.0}, r"data\.views\.audio\.speed=1\.0: allowed"),
        (AudioView, {"speed": -0.1}, r"data\.views\.audio\.speed=-0\.1: allowed"),
        (AudioView, {"shift": -1.0}, r"data\.views\.audio\.shift=-1\.0: allowed"),
        (AudioView, {"noise": -1.0}, r"data\.views\.audio\.noise=-1\.0: allowed"),
        (AudioView, {"gain": -1.0}, r"data\.views\.audio\.gain=-1\.0: allowed"),
        (AudioView, {"time_mask": -1}, r"data\.views\.audio\.time_mask=-1: allowed is from 0 to audio\.frames"),
        (AudioView, {"frames": 9, "time_mask": 10}, r"data\.views\.audio\.time_mask=10: allowed"),
        (AudioView, {"mels": 9, "frequency_mask": 10}, r"data\.views\.audio\.frequency_mask=10: allowed"),
    ],
)
def test_bounds_name_the_key(view: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view(**settings)


def test_views_in_use_keep_their_order() -> None:
    assert list(Views().used) == ["image", "text", "audio"]
    assert list(Views(text=None).used) == ["image", "audio"]


def test_what_is_longer_than_its_view_is_counted() -> None:
    texts = ["a cat", "the dog barks at the cat, who barks back at it", "a dog"]
    assert make_field(TextView(max_tokens=6), texts, tokenizer()).cut == 1
    assert make_field(TextView(max_tokens=64), texts, tokenizer()).cut == 0
    view = AudioView(frames=10, mels=8)
    sounds = [Waveform(noise(length), 16_000) for length in (view.samples - 1, view.samples, view.samples + 1, 9000)]
    assert make_field(view, sounds, tokenizer()).cut == 2
    assert make_field(view, sounds[2:], tokenizer()).cut == 2
    assert make_field(ImageView(size=8), [np.zeros((9, 9, 3), dtype=np.uint8)], tokenizer()).cut is None
