import io
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor
from transformers import ASTFeatureExtractor, ViTImageProcessorPil

import data.digits
from data.batch import Batch, Field
from data.decode import Waveform, decode_audio
from data.index import build_index
from data.transforms import AudioView, ImageView, LogMel, OnDevice, TextView, Views
from tests.samples import noise, noise_image, tokenizer

Sound = npt.NDArray[np.int16]


@cache
def clips(count: int) -> list[Sound]:
    """Spoken digits at 16 kHz, as a view gives them."""
    index = build_index(data.digits._ASSETS[0])
    found = []
    with data.digits._ASSETS[0].open("rb") as file:
        for sample in index.samples[:: len(index.samples) // count][:count]:
            offset, size = sample.members["flac"]
            file.seek(offset)
            found.append(AudioView().sample(decode_audio(file.read(size)), None))
    return found


def log_mel(view: AudioView, sounds: list[Sound]) -> Tensor:
    mel: Field = LogMel(view)(view.stack([sound[: view.samples] for sound in sounds], tokenizer()))
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
    sounds = [clip[: 3000 + 300 * i] for i, clip in enumerate(clips(20))]  # more than one chunk of 8
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
    view = ImageView(size=16)
    image = noise_image(*shape)
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    field = view.stack([view.sample(image, None)], tokenizer())
    assert field.x.dtype == torch.uint8
    torch.testing.assert_close(view.on_device()(field).x, expected, rtol=0, atol=1e-6)


class Extreme:
    """Random numbers at one end of their range."""

    def __init__(self, *ends: float) -> None:
        self.ends = list(ends)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.ends.pop(0)


@pytest.mark.parametrize("shape", [(1, 1), (224, 224), (1000, 3), (3, 1000), (333, 107)])
@pytest.mark.parametrize("smallest", [0.05, 0.5, 0.99])
def test_crops_stay_inside_and_keep_their_share(shape: tuple[int, int], smallest: float) -> None:
    view = ImageView(size=4, crop_scale=smallest)
    image = Image.new("RGB", shape)
    generator = np.random.default_rng(0)
    sources: list[Any] = [generator] * 200
    sources += [Extreme(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    ratios = []
    for random in sources:
        left, top, right, bottom = view._random_crop(image, random)
        assert -1e-9 <= left < right <= shape[0] + 1e-9
        assert -1e-9 <= top < bottom <= shape[1] + 1e-9
        assert smallest - 1e-9 <= (right - left) * (bottom - top) / (shape[0] * shape[1]) <= 1 + 1e-9
        ratios.append((right - left) / (bottom - top) / (shape[0] / shape[1]))
    assert 0.75 - 1e-9 <= min(ratios) < 0.999
    assert 1.001 < max(ratios) <= 4 / 3 + 1e-9
    for _ in range(50):
        assert view.sample(image, generator).shape == (3, 4, 4)


def test_a_crop_shows_its_box() -> None:
    # Red is the column, green the row.
    columns, rows_ = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([columns, rows_, rows_], axis=2).astype(np.uint8))
    view = ImageView(size=20, crop_scale=0.2)
    for seed in range(5):
        left, top, right, bottom = view._random_crop(image, np.random.default_rng(seed))
        x = view.sample(image, np.random.default_rng(seed)).float()
        assert x[0].mean() == pytest.approx((left + right - 1) / 2, abs=1.5)
        assert x[1].mean() == pytest.approx((top + bottom - 1) / 2, abs=1.5)
        assert (x[0, :, -1] - x[0, :, 0]).mean() == pytest.approx((right - left) * 19 / 20, abs=2.5)


def test_half_of_the_images_are_mirrored() -> None:
    image = noise_image(8, 8)
    plain, view = ImageView(size=8).sample(image, None), ImageView(size=8, flip=True)
    random = np.random.default_rng(0)
    seen = [view.sample(image, random) for _ in range(200)]
    mirrored = sum(torch.equal(x, plain.flip(2)) for x in seen)
    assert mirrored + sum(torch.equal(x, plain) for x in seen) == 200
    assert 70 < mirrored < 130
    assert torch.equal(view.sample(image, None), plain)
    assert torch.equal(ImageView(size=8).sample(image, random), plain)


def test_sound_is_clipped_to_16_bits() -> None:
    samples = np.array([0, 0.5, 1, -1, 2, -2, 1e-5, 0.6 / 32768], dtype=np.float32)
    got = AudioView().sample(Waveform(samples, 16_000), None)
    assert got.dtype == np.int16
    assert got.tolist() == [0, 16384, 32767, -32768, 32767, -32768, 0, 1]


def test_16_bit_sound_comes_back_exactly() -> None:
    given = np.arange(-32768, 32768, 7, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, given, 16_000, format="WAV")
    np.testing.assert_array_equal(AudioView().sample(decode_audio(file.getvalue()), None), given)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate).astype(np.float32)
    got = AudioView().sample(Waveform(tone * 0.5, rate), None)
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
    random = np.random.default_rng(0)
    speeds = []
    for _ in range(25):
        got = AudioView(frames=200, speed=0.2).sample(Waveform(tone, rate), random)
        speeds.append(16_000 / len(got))
        assert peak(got) / 500 == pytest.approx(speeds[-1], abs=0.01)
    assert 0.8 - 1e-3 <= min(speeds) < 0.88
    assert 1.12 < max(speeds) <= 1.2 + 1e-3


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_every_speed_that_is_allowed_works(end: float) -> None:
    largest = 0.0
    for speed in np.arange(1, 1000) / 1000:
        try:
            view = AudioView(frames=10, speed=float(speed))
        except ValueError:
            break
        largest = float(speed)
    view = AudioView(frames=1000, speed=largest)
    random: Any = Extreme(end)
    assert len(view.sample(Waveform(noise(800), 16_000), random)) > 0


def test_shift_puts_silence_in_front_and_keeps_the_end() -> None:
    view = AudioView(frames=20, shift=0.05)  # 3440 samples; at most 800 of silence
    random = np.random.default_rng(0)
    for length in (1000, 3000, view.samples - 1, view.samples):
        sound = Waveform(np.where(np.arange(length) % 2, 0.1, -0.1).astype(np.float32), 16_000)
        plain = view.sample(sound, None)
        silences = []
        for _ in range(60):
            got = view.sample(sound, random)
            silences.append(len(got) - length)
            assert len(got) <= view.samples
            assert not got[: silences[-1]].any()
            np.testing.assert_array_equal(got[silences[-1] :], plain)
        room = min(800, view.samples - length)
        assert 0 <= min(silences) <= room * 0.2
        assert room * 0.8 <= max(silences) <= room


def test_long_clips_are_cut_at_random_in_training_only() -> None:
    view = AudioView(frames=2)  # 560 samples
    sound = Waveform((np.arange(575) / 32768).astype(np.float32), 16_000)
    np.testing.assert_array_equal(view.sample(sound, None), np.arange(560))
    random = np.random.default_rng(0)
    starts = set()
    for _ in range(300):
        got = view.sample(sound, random)
        starts.add(int(got[0]))
        np.testing.assert_array_equal(got, got[0] + np.arange(560))
    assert starts == set(range(16))


def test_gain_and_noise_have_the_levels_asked_for() -> None:
    x = noise(3000, level=0.05)
    sound, random = Waveform(x, 16_000), np.random.default_rng(0)
    plain = AudioView().sample(sound, None).astype(float)

    factors = []
    for _ in range(60):
        got = AudioView(gain=6).sample(sound, random).astype(float)
        factors.append(20 * np.log10(np.sqrt((got**2).mean() / (plain**2).mean())))
        assert np.corrcoef(got, plain)[0, 1] > 0.9999
    assert -6.01 <= min(factors) < -4
    assert 4 < max(factors) <= 6.01

    levels = []
    for _ in range(60):
        added = AudioView(noise=0.5).sample(sound, random) - plain
        levels.append(np.sqrt((added**2).mean() / (plain**2).mean()))
    assert 0 <= min(levels) < 0.1
    assert 0.4 < max(levels) < 0.53


def test_silence_stays_silence_under_all_augmentation() -> None:
    view = AudioView(frames=4, speed=0.1, shift=0.1, noise=0.5, gain=6)
    got = view.sample(Waveform(np.zeros(500, dtype=np.float32), 16_000), np.random.default_rng(0))
    assert not got.any()


def test_captions_are_cut_with_their_last_token_kept() -> None:
    field = TextView(max_tokens=6).stack(["a cat", "the dog barks at the cat, who barks back at it"], tokenizer())
    assert field.x.shape == (2, 6)
    assert field.x[:, 0].tolist() == [tokenizer().cls_token_id] * 2
    assert field.x[1, -1] == tokenizer().sep_token_id
    assert field.valid is not None
    assert field.valid[1].all()
    assert torch.equal(field.valid, field.x != tokenizer().pad_token_id)
    assert TextView(max_tokens=64).stack(["a cat"], tokenizer()).x.shape[1] < 6


def test_on_device_gives_what_the_encoder_reads() -> None:
    views = Views(ImageView(size=8), TextView(max_tokens=8), AudioView(frames=10, mels=8))
    image = Field(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8), torch.arange(2))
    text = Field(torch.tensor([[0, 5, 2]]), torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool))
    audio = AudioView(frames=10, mels=8).stack([clips(4)[0][:1500]], tokenizer())
    batch = OnDevice(views)(Batch({"image": image, "text": text, "audio": audio}, 2, ["a", "b"]))
    assert batch.fields["image"].x[:, 0, 0, 0].tolist() == [-1, 1]
    assert torch.equal(batch.fields["text"].x, text.x)
    assert torch.equal(batch.fields["text"].rows, text.rows)
    assert batch.fields["audio"].x.shape == (1, 10, 8)
    assert (batch.size, batch.keys) == (2, ["a", "b"])


@pytest.mark.parametrize(
    ("view", "settings", "message"),
    [
        (ImageView, {"size": 0}, r"data\.views\.image\.size=0: allowed is 1 or more"),
        (ImageView, {"crop_scale": 0.0}, r"data\.views\.image\.crop_scale=0\.0: allowed"),
        (ImageView, {"crop_scale": 1.1}, r"data\.views\.image\.crop_scale=1\.1: allowed"),
        (TextView, {"max_tokens": 2}, r"data\.views\.text\.max_tokens=2: allowed is 3"),
        (AudioView, {"frames": 0}, r"data\.views\.audio\.frames=0: allowed"),
        (AudioView, {"mels": 0}, r"data\.views\.audio\.mels=0: allowed"),
        (AudioView, {"std": 0.0}, r"data\.views\.audio\.std=0\.0: allowed"),
        (AudioView, {"speed": 1.0}, r"data\.views\.audio\.speed=1\.0: allowed"),
        (AudioView, {"speed": -0.1}, r"data\.views\.audio\.speed=-0\.1: allowed"),
        (AudioView, {"shift": -1.0}, r"data\.views\.audio\.shift=-1\.0: allowed"),
        (AudioView, {"noise": -1.0}, r"data\.views\.audio\.noise=-1\.0: allowed"),
        (AudioView, {"gain": -1.0}, r"data\.views\.audio\.gain=-1\.0: allowed"),
    ],
)
def test_bounds_name_the_key(view: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view(**settings)


def test_views_in_use_keep_their_order() -> None:
    assert list(Views().used) == ["image", "text", "audio"]
    assert list(Views(text=None).used) == ["image", "audio"]
