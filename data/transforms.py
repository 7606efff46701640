"""Views: what training and evaluation see of a sample.

A view has two halves. ``sample`` and ``stack`` run in the loader's worker and give small integers (uint8 pixels,
token ids, int16 sound). ``on_device`` is a module that runs batched on the training device and gives what the encoder
reads: normalised pixels and log-mel spectrograms, defined as the `transformers` processors of the exported models
define them, so that an export sees what training saw. A modality is a view, and a field of ``Views``.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soxr
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

from data.batch import Batch, Field
from data.decode import Waveform

# ASTFeatureExtractor's constants: 25 ms Hann window, 10 ms hop, 512-point transform at 16 kHz.
SAMPLE_RATE = 16_000
FRAME = 400
HOP = 160
FFT = 512
PREEMPHASIS = 0.97
MEL_FLOOR = 1.192092955078125e-07


class View(Protocol):
    """What a modality needs to get from a decoded member to the encoder."""

    def sample(self, value: Any, random: np.random.Generator | None) -> Any:
        """One decoded member -> what is stacked; ``random`` None gives the deterministic view of evaluation."""

    def stack(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Field:
        """n samples -> a Field of n rows, numbered from 0."""

    def on_device(self) -> nn.Module:
        """A module from that Field to the one that the encoder reads."""


@dataclass
class ImageView:
    """Square RGB pixels."""

    size: int = 224
    """Height and width in pixels, after resizing without regard to the aspect ratio, as ViTImageProcessor does."""
    crop_scale: float = 1.0
    """Training only: the smallest share of the area that a random crop keeps; 1 switches cropping off."""
    flip: bool = False
    """Training only: mirror half of the images."""

    def __post_init__(self) -> None:
        _check(self.size >= 1, "image.size", self.size, "1 or more")
        _check(0 < self.crop_scale <= 1, "image.crop_scale", self.crop_scale, "above 0 and at most 1")

    def sample(self, image: Image.Image, random: np.random.Generator | None) -> Tensor:
        """(3, size, size) uint8. ``random`` None gives the deterministic view of evaluation."""
        box = (0.0, 0.0, float(image.width), float(image.height))
        if random is not None and self.crop_scale < 1:
            box = self._random_crop(image, random)
        # Bilinear with antialiasing: the resampling of ViTImageProcessor.
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if random is not None and self.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def stack(self, values: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, 3, size, size) uint8."""
        return Field(torch.stack(list(values)), torch.arange(len(values)))

    def on_device(self) -> nn.Module:
        """To float in [-1, 1]."""
        return NormaliseImage()

    def _random_crop(self, image: Image.Image, random: np.random.Generator) -> tuple[float, float, float, float]:
        # Area and aspect ratio as in Szegedy et al. 2015, "Going deeper with convolutions", section 6; the ratio
        # is limited so that the box always fits.
        scale = random.uniform(self.crop_scale, 1.0)
        ratio = np.exp(random.uniform(-1, 1) * min(np.log(4 / 3), -np.log(scale)))
        width, height = image.width * np.sqrt(scale * ratio), image.height * np.sqrt(scale / ratio)
        left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        return left, top, left + width, top + height


@dataclass
class TextView:
    """Token ids."""

    max_tokens: int = 64
    """Longest sequence, special tokens included; longer captions are cut."""

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 3, "text.max_tokens", self.max_tokens, "3 or more")

    def sample(self, text: str, random: np.random.Generator | None) -> str:
        """The caption as it is; tokens are made per batch, which is faster."""
        return text

    def stack(self, values: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, L) int64 ids, padded to the longest of the batch, and which of them are no padding."""
        encoded = tokenizer(
            list(values),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            split_special_tokens=True,  # "<mask>" or "<s>" in a caption is text
        )
        return Field(encoded["input_ids"], torch.arange(len(values)), encoded["attention_mask"].bool())

    def on_device(self) -> nn.Module:
        """Ids are what the encoder reads."""
        return nn.Identity()


@dataclass
class AudioView:
    """Mono sound at 16 kHz, seen as a log-mel spectrogram of fixed length."""

    frames: int = 1024
    """Length of the spectrogram; a frame is 10 ms. Shorter clips are padded, longer ones cut."""
    mels: int = 128
    """Number of mel bins."""
    mean: float = -4.2677393
    """Mean of the log-mel values, subtracted; the default is ASTFeatureExtractor's (AudioSet)."""
    std: float = 4.5689974
    """Standard deviation of the log-mel values; they are divided by twice this, as ASTFeatureExtractor does."""
    speed: float = 0.0
    """Training only: largest relative change of speed (and pitch); 0.1 plays at 0.9 to 1.1 of the speed."""
    shift: float = 0.0
    """Training only: longest random silence, in seconds, put in front of a clip."""
    noise: float = 0.0
    """Training only: largest level of white noise, relative to the clip's root mean square; drawn from 0 up."""
    gain: float = 0.0
    """Training only: largest change of loudness, in decibels, up or down."""

    def __post_init__(self) -> None:
        _check(self.frames >= 1, "audio.frames", self.frames, "1 or more")
        _check(self.mels >= 1, "audio.mels", self.mels, "1 or more")
        _check(self.std > 0, "audio.std", self.std, "above 0")
        _check(0 <= self.speed <= 0.9, "audio.speed", self.speed, "from 0 to 0.9")
        for name in ("shift", "noise", "gain"):
            _check(getattr(self, name) >= 0, f"audio.{name}", getattr(self, name), "0 or more")

    @property
    def samples(self) -> int:
        """Samples at 16 kHz under ``frames`` frames."""
        return FRAME + (self.frames - 1) * HOP

    def sample(self, sound: Waveform, random: np.random.Generator | None) -> npt.NDArray[np.int16]:
        """(t,) int16 at 16 kHz, t <= ``self.samples``. ``random`` None gives the deterministic view.

        Longer clips are cut at random in training and keep their beginning otherwise, as ASTFeatureExtractor does.
        """
        # Whole per cents: a ratio of small numbers resamples five times faster than an odd one.
        speed = 1.0 if random is None else round(1 + self.speed * random.uniform(-1, 1), 2)
        x = sound.samples
        if sound.rate != SAMPLE_RATE or speed != 1.0:
            # One resampling serves both: the target rate and the change of speed.
            x = soxr.resample(x, sound.rate * speed, SAMPLE_RATE)
        if random is not None:
            x = self._augment(x, random)
        x = x[: self.samples]
        return np.rint(np.clip(x * 32768, -32768, 32767)).astype(np.int16)

    def stack(self, values: Sequence[npt.NDArray[np.int16]], tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, samples) int16, padded with zeros, and which of them are no padding."""
        x = np.zeros((len(values), self.samples), dtype=np.int16)
        for row, value in zip(x, values, strict=True):
            row[: len(value)] = value
        lengths = torch.tensor([len(value) for value in values])
        valid = torch.arange(self.samples) < lengths[:, None]
        return Field(torch.from_numpy(x), torch.arange(len(values)), valid)

    def on_device(self) -> nn.Module:
        """To log-mel (n, frames, mels)."""
        return LogMel(self)

    def _augment(self, x: npt.NDArray[np.float32], random: np.random.Generator) -> npt.NDArray[np.float32]:
        loudness = np.sqrt(np.mean(np.square(x)))  # of the clip itself, before silence dilutes it
        if len(x) > self.samples:
            x = x[random.integers(len(x) - self.samples + 1) :]
        elif self.shift > 0:
            # Never so far that the clip's end is pushed out.
            longest = min(int(self.shift * SAMPLE_RATE), self.samples - len(x))
            x = np.concatenate([np.zeros(random.integers(longest + 1), dtype=np.float32), x])
        if self.noise > 0:
            level = np.float32(loudness * self.noise * random.random())
            x = x + level * random.standard_normal(len(x), dtype=np.float32)
        if self.gain > 0:
            x = x * np.float32(10 ** (self.gain * random.uniform(-1, 1) / 20))
        return x


@dataclass
class Views:
    """The modalities of a run; a modality set to null is not read."""

    image: ImageView | None = field(default_factory=ImageView)
    """Images, or null."""
    text: TextView | None = field(default_factory=TextView)
    """Captions, or null."""
    audio: AudioView | None = field(default_factory=AudioView)
    """Sounds, or null."""

    @property
    def used(self) -> dict[str, View]:
        """Modality name -> view, for those in use, in the order of the fields."""
        views = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: view for name, view in views.items() if view is not None}


class NormaliseImage(nn.Module):
    """Pixels 0 .. 255 to -1 .. 1: ViTImageProcessor's with mean and standard deviation 0.5."""

    def forward(self, image: Field) -> Field:
        """(n, 3, H, W) uint8 -> float32."""
        return image._replace(x=image.x.float() / 127.5 - 1)


class LogMel(nn.Module):
    """Waveforms to normalised log-mel spectrograms, equal to ``ASTFeatureExtractor``'s, for a whole batch at once.

    Kaldi's filterbank: per frame the mean is removed, then pre-emphasis, a symmetric Hann window, the power
    spectrum, triangular filters on the mel scale from 20 Hz to 8 kHz, and the logarithm. Frames past a clip's end
    are zero before normalising.
    """

    def __init__(self, view: AudioView) -> None:
        super().__init__()
        self.view = view
        with warnings.catch_warnings():
            # Few mel bins leave low filters narrower than a bin of the transform, as in ASTFeatureExtractor.
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            filters = mel_filter_bank(
                num_frequency_bins=FFT // 2 + 1,
                num_mel_filters=view.mels,
                min_frequency=20,
                max_frequency=SAMPLE_RATE // 2,
                sampling_rate=SAMPLE_RATE,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        self.window = nn.Buffer(torch.hann_window(FRAME, periodic=False, dtype=torch.float64), persistent=False)
        self.filters = nn.Buffer(torch.from_numpy(filters), persistent=False)

    def forward(self, audio: Field) -> Field:
        """(n, T) int16 -> (n, frames, mels) float32; nothing is padding any more.

        Float64 inside: where a band is 90 dB below another, float32 is off by 4e-4 after the logarithm.
        """
        if audio.valid is None:
            lengths = torch.full((len(audio.x),), audio.x.shape[1], device=audio.x.device)
        else:
            lengths = audio.valid.sum(dim=1)
        waveform = audio.x[:, : self.view.samples]
        waveform = nn.functional.pad(waveform, (0, self.view.samples - waveform.shape[1]))
        # A few clips at a time stay within a CPU's cache: three times faster than all 128 of a batch at once.
        clips = 8 if waveform.device.type == "cpu" else 64
        mel = torch.cat([self._mel(part) for part in torch.split(waveform, clips)])
        present = torch.div(lengths - FRAME, HOP, rounding_mode="floor") + 1  # whole frames of each clip
        within = torch.arange(self.view.frames, device=mel.device) < present[:, None]
        mel = mel.masked_fill(~within[..., None], 0.0)
        return Field(((mel - self.view.mean) / (self.view.std * 2)).float(), audio.rows)

    def _mel(self, waveform: Tensor) -> Tensor:
        """(n, samples) int16 -> log-mel (n, frames, mels) float64, before padding and normalising."""
        x = waveform.to(self.window.dtype) / 32768
        mean = x.unfold(1, FRAME, HOP).mean(dim=-1, keepdim=True)  # (n, frames, 1)
        # Per frame: x - mean, then pre-emphasis. Taking the differences once for all frames gives the same but for
        # each frame's first sample, which the window multiplies by 0.
        differences = nn.functional.pad(x[:, 1:] - PREEMPHASIS * x[:, :-1], (1, 0))
        frames = (differences.unfold(1, FRAME, HOP) - (1 - PREEMPHASIS) * mean).mul_(self.window)
        power = torch.view_as_real(torch.fft.rfft(frames, FFT)).square_().sum(dim=-1)  # (n, frames, 257)
        return (power @ self.filters).clamp_min_(MEL_FLOOR).log_()


class OnDevice(nn.Module):
    """The device half of all views: a batch as it left the stream -> the batch that the encoder reads."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.views = nn.ModuleDict({name: view.on_device() for name, view in views.used.items()})

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        """Image uint8 -> float in [-1, 1]; text unchanged; audio int16 -> log-mel (n, frames, mels)."""
        return batch._replace(fields={name: self.views[name](field) for name, field in batch.fields.items()})


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"data.views.{name}={got}: allowed is {allowed}")
