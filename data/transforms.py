"""Views: what training and evaluation see of a sample.

A view has two halves. The loader's worker decodes a member and puts it, as small integers (uint8 pixels, token ids,
int16 sound), straight into the memory of its batch. ``on_device`` is a module that runs batched on the training
device: it augments, and gives what the encoder reads, normalised pixels and log-mel spectrograms, defined as the
`transformers` processors of the exported models define them, so that an export sees what training saw. A modality is
a view, and a field of ``Views``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import soxr
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

from data.batch import Batch, Field
from data.decode import Waveform, decode_audio, decode_image, decode_text
from data.draws import normal_quantiles, normals, uniform, uniforms
from data.memory import lend

# ASTFeatureExtractor's constants: 25 ms Hann window, 10 ms hop, 512-point transform at 16 kHz.
SAMPLE_RATE = 16_000
FRAME = 400
HOP = 160
FFT = 512
PREEMPHASIS = 0.97
MEL_FLOOR = 1.192092955078125e-07

# Purposes of random numbers: each has its own stream.
_CROP, _COLOUR, _SOUND, _NOISE, _MASKS, _SPEED, _START = range(7)


class View(Protocol):
    """What a modality needs to get from a member of a shard to the encoder."""

    def decode(self, data: bytes, training: bool) -> Any:
        """The bytes of a member -> what ``put`` takes; DecodeError as the modality's decoder raises it."""

    def allocate(self, n: int, training: bool) -> Any:
        """Room for up to n samples of one batch."""

    def put(self, room: Any, i: int, value: Any, seed: int | None) -> None:
        """The worker's half of a view: a decoded member into place ``i``, whatever was there.

        ``seed`` None gives the deterministic view, and belongs to a room for evaluation.
        """

    def field(self, room: Any, n: int, tokenizer: PreTrainedTokenizerBase) -> Field:
        """The first n samples of a room as a Field of n rows, numbered from 0; it keeps the room's memory."""

    def on_device(self) -> nn.Module:
        """A module from (that Field, its rows' seeds or None) to the Field that the encoder reads."""


def make_field(view: View, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Field:
    """Decoded members in the deterministic view, as a Field of rows numbered from 0."""
    room = view.allocate(len(values), training=False)
    for i, value in enumerate(values):
        view.put(room, i, value, None)
    return view.field(room, len(values), tokenizer)


@dataclass
class ImageView:
    """Square RGB pixels."""

    size: int = 224
    """Height and width in pixels, after resizing without regard to the aspect ratio, as ViTImageProcessor does."""
    crop_scale: float = 1.0
    """Training only: the smallest share of the area that a random crop keeps; 1 switches cropping off."""
    flip: bool = False
    """Training only: mirror half of the images."""
    colour: float = 0.0
    """Training only: largest relative change of brightness, of contrast and of saturation; 0 switches them off."""
    load: int | None = None
    """Training only: side in pixels to which workers resize and from which the device crops. More is sharper and takes
    more memory; null is size / sqrt(crop_scale), at which the smallest crop has as many pixels as the view, and at
    most twice the size."""

    def __post_init__(self) -> None:
        _check(self.size >= 1, "image.size", self.size, "1 or more")
        _check(0 < self.crop_scale <= 1, "image.crop_scale", self.crop_scale, "above 0 and at most 1")
        _check(0 <= self.colour <= 1, "image.colour", self.colour, "from 0 to 1")
        _check(self.load is None or self.load >= self.size, "image.load", self.load, "image.size or more, or null")

    @property
    def load_side(self) -> int:
        """``load``, or what it is where it is null."""
        return self.load or min(math.ceil(self.size / math.sqrt(self.crop_scale)), 2 * self.size)

    @property
    def resamples(self) -> bool:
        """Whether training crops, mirrors or shrinks on the device."""
        return self.crop_scale < 1 or self.flip or self.load_side != self.size

    def decode(self, data: bytes, training: bool) -> npt.NDArray[np.uint8]:
        """(H, W, 3); in training a JPEG may come out smaller than it is, but not than the side that is loaded."""
        return decode_image(data, at_least=self.load_side if training else None)

    def allocate(self, n: int, training: bool) -> Tensor:
        """(n, side, side, 3) uint8."""
        side = self.load_side if training else self.size
        return _memory((n, side, side, 3), torch.uint8)

    def put(self, room: Tensor, i: int, pixels: npt.NDArray[np.uint8], seed: int | None) -> None:
        """(H, W, 3) resized to the room's side; crops and all else that is random happen on the device."""
        side = room.shape[1]
        if pixels.shape[:2] == (side, side):
            room[i] = torch.from_numpy(pixels)
        elif seed is None:
            # Bilinear with antialiasing: the resampling of ViTImageProcessor, to the bit.
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
            room[i] = torch.from_numpy(np.array(image))
        else:
            # torch's is three times faster than Pillow's and differs by at most one grey level. Where the device
            # resamples once more, bicubic keeps 0.94 of the contrast between neighbouring pixels that a single
            # bilinear step would leave, bilinear 0.85.
            mode = "bicubic" if self.crop_scale < 1 or side != self.size else "bilinear"
            # These strides are known as channels-last, so that the result is in the room's order, too.
            x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
            room[i] = F.interpolate(x, size=(side, side), mode=mode, antialias=True)[0].permute(1, 2, 0)

    def field(self, room: Tensor, n: int, tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, 3, side, side) uint8, a view of the room: channels come last in memory."""
        return Field(room[:n].permute(0, 3, 1, 2), torch.arange(n))

    def on_device(self) -> nn.Module:
        """Augmentation, and pixels to float in [-1, 1]."""
        return Pixels(self)


@dataclass
class TextView:
    """Token ids."""

    max_tokens: int = 64
    """Longest sequence, special tokens included; longer captions are cut."""

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 3, "text.max_tokens", self.max_tokens, "3 or more")

    def decode(self, data: bytes, training: bool) -> str:
        """The caption."""
        return decode_text(data)

    def allocate(self, n: int, training: bool) -> list[str]:
        """n captions."""
        return [""] * n

    def put(self, room: list[str], i: int, text: str, seed: int | None) -> None:
        """The caption as it is; tokens are made per batch, which is faster."""
        room[i] = text

    def field(self, room: list[str], n: int, tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, L) int64 ids, padded to the longest of the batch, and which of them are no padding."""
        encoded = tokenizer(
            room[:n],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            split_special_tokens=True,  # "<mask>" or "<s>" in a caption is text
        )
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        return Field(encoded["input_ids"], torch.arange(n), encoded["attention_mask"].bool(), cut)

    def on_device(self) -> nn.Module:
        """Ids are what the encoder reads."""
        return Unchanged()


class SoundRoom(NamedTuple):
    """Room for the sounds of a batch.

    Attributes:
        samples: (n, T) int16.
        lengths: (n,) int64; what lies behind a sound's end is zero.
        cut: (n,) bool, which were longer.
    """

    samples: Tensor
    lengths: npt.NDArray[np.int64]
    cut: npt.NDArray[np.bool_]


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
    time_mask: int = 0
    """Training only: largest number of neighbouring frames, drawn from 0 up, that are set to the mean (SpecAugment)."""
    frequency_mask: int = 0
    """Training only: the same for mel bins."""

    def __post_init__(self) -> None:
        _check(self.frames >= 1, "audio.frames", self.frames, "1 or more")
        _check(self.mels >= 1, "audio.mels", self.mels, "1 or more")
        _check(self.std > 0, "audio.std", self.std, "above 0")
        _check(0 <= self.speed <= 0.9, "audio.speed", self.speed, "from 0 to 0.9")
        for name in ("shift", "noise", "gain"):
            _check(getattr(self, name) >= 0, f"audio.{name}", getattr(self, name), "0 or more")
        _check(0 <= self.time_mask <= self.frames, "audio.time_mask", self.time_mask, "from 0 to audio.frames")
        _check(
            0 <= self.frequency_mask <= self.mels, "audio.frequency_mask", self.frequency_mask, "from 0 to audio.mels"
        )

    @property
    def samples(self) -> int:
        """Samples at 16 kHz under ``frames`` frames."""
        return FRAME + (self.frames - 1) * HOP

    def decode(self, data: bytes, training: bool) -> Waveform:
        """The whole sound, mono."""
        return decode_audio(data)

    def allocate(self, n: int, training: bool) -> SoundRoom:
        """(n, samples)."""
        samples = _memory((n, self.samples), torch.int16)
        return SoundRoom(samples, np.zeros(n, np.int64), np.zeros(n, np.bool_))

    def put(self, room: SoundRoom, i: int, sound: Waveform, seed: int | None) -> None:
        """At 16 kHz and the random speed, at most ``samples`` long.

        Longer clips are cut at random in training and keep their beginning otherwise, as ASTFeatureExtractor does.
        """
        # Whole per cents: a ratio of small numbers resamples five times faster than an odd one.
        speed = 1.0
        if seed is not None and self.speed > 0:
            speed = round(1 + self.speed * (2 * uniform(seed, _SPEED) - 1), 2)
        x = sound.samples
        if sound.rate != SAMPLE_RATE or speed != 1.0:
            # One resampling serves both: the target rate and the change of speed.
            x = soxr.resample(sound.floats(), sound.rate * speed, SAMPLE_RATE)
        start, room.cut[i] = 0, len(x) > self.samples
        if seed is not None and len(x) > self.samples:
            start = int(uniform(seed, _START) * (len(x) - self.samples + 1))
        x = x[start : start + self.samples]
        row = room.samples[i].numpy()
        row[: len(x)] = x if x.dtype == np.int16 else np.rint(np.clip(x * 32768, -32768, 32767))
        row[len(x) :] = 0
        room.lengths[i] = len(x)

    def field(self, room: SoundRoom, n: int, tokenizer: PreTrainedTokenizerBase) -> Field:
        """(n, samples) int16, a view of the room, and which of them are no padding."""
        lengths, cut = room.lengths[:n], int(room.cut[:n].sum())
        if (lengths == self.samples).all():
            return Field(room.samples[:n], torch.arange(n), cut=cut)
        valid = _memory((n, self.samples), torch.bool)
        for row, length in zip(valid.numpy(), lengths, strict=True):  # a fifth of the time of comparing all places
            row[:length] = True
            row[length:] = False
        return Field(room.samples[:n], torch.arange(n), valid, cut)

    def on_device(self) -> nn.Module:
        """Augmentation, and sound to log-mel (n, frames, mels)."""
        return LogMel(self)


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


class Unchanged(nn.Module):
    """For a modality that the encoder reads as the worker ships it."""

    def forward(self, field: Field, seeds: Tensor | None = None) -> Field:
        """The field."""
        return field


class Pixels(nn.Module):
    """Training's random crop, mirroring and colours; then 0 .. 255 to -1 .. 1, as ViTImageProcessor with mean and
    standard deviation 0.5.
    """

    def __init__(self, view: ImageView) -> None:
        super().__init__()
        self.view = view
        self.minus_one = nn.Buffer(torch.tensor(-1.0), persistent=False)

    def forward(self, image: Field, seeds: Tensor | None = None) -> Field:
        """(n, 3, side, side) uint8 -> (n, 3, size, size) float32; seeds (n,), or None for evaluation."""
        few = _few(image.x)
        if seeds is None or not (self.view.resamples or self.view.colour > 0):
            pixels = _like(image.x, torch.float32)
            for part, place in zip(torch.split(image.x, few), torch.split(pixels, few), strict=True):
                # x / 127.5 - 1 in one step, to 2e-7.
                torch.add(self.minus_one, part.float(), alpha=1 / 127.5, out=place)
            return image._replace(x=pixels)
        parts = []
        for part, seed in zip(torch.split(image.x, few), torch.split(seeds, few), strict=True):
            x = self._crop(part, seed) if self.view.resamples else part.float()
            if self.view.colour > 0:
                x = self._recolour(x, seed)
            parts.append(x / 127.5 - 1)
        return image._replace(x=torch.cat(parts))

    def _crop(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Random boxes of (n, 3, side, side) uint8, some mirrored, as (n, 3, size, size) float32 in 0 .. 255."""
        (left, width), (top, height), mirrored = self._boxes(seeds)
        n, _, side, _ = x.shape
        size = self.view.size
        # Resampling is linear and separable: two batched matrix products, which any device is fast at.
        rows = _resampling(top, height, torch.zeros_like(mirrored), size, side)
        columns = _resampling(left, width, mirrored, size, side)
        lines = rows @ x.permute(0, 2, 3, 1).reshape(n, side, side * 3).float()  # (n, size, side * 3)
        lines = lines.view(n, size, side, 3).permute(0, 3, 1, 2).reshape(n, 3 * size, side)
        return (lines @ columns.transpose(1, 2)).view(n, 3, size, size)

    def _boxes(self, seeds: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """(left, width) and (top, height) of each crop, as shares of the image, and which are mirrored; all (n,)."""
        draws = uniforms(seeds, _CROP, 5).unbind(1)
        # Area and aspect ratio as in Szegedy et al. 2015, "Going deeper with convolutions", section 6; the ratio
        # is limited so that the box always fits.
        area = 1 - (1 - self.view.crop_scale) * draws[0]
        ratio = ((2 * draws[1] - 1) * area.log().neg().clamp(max=math.log(4 / 3))).exp()
        width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
        mirrored = draws[4] < 0.5 if self.view.flip else torch.zeros_like(seeds, dtype=torch.bool)
        return (draws[2] * (1 - width), width), (draws[3] * (1 - height), height), mirrored

    def _recolour(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Saturation about each pixel's grey, then contrast about the image's mean grey, then brightness."""
        factors = 1 + self.view.colour * (2 * uniforms(seeds, _COLOUR, 3) - 1)
        saturation, contrast, brightness = factors.float()[..., None, None, None].unbind(1)  # each (n, 1, 1, 1)
        grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
        # First over each line: a sum over all pixels would be cut up among threads by the size of the batch.
        mean = grey.mean(3, keepdim=True).mean(2, keepdim=True)
        x = torch.lerp(mean, torch.lerp(grey, x, saturation), contrast)
        return (x * brightness).clamp(0, 255)


def _resampling(start: Tensor, length: Tensor, mirrored: Tensor, size: int, side: int) -> Tensor:
    """Matrices (n, size, side) float32 that resize the stretch [start, start + length) of a line to ``size`` pixels.

    Bilinear, with antialiasing where the stretch shrinks: Pillow's weights, and torch's.
    """
    step = (length * (side / size))[:, None]  # (n, 1): pixels of the line under one of the result
    numbers = torch.arange(size, device=start.device)
    numbers = torch.where(mirrored[:, None], size - 1 - numbers, numbers)  # (n, size)
    centres = (start * side)[:, None] + (numbers + 0.5) * step
    distance = (torch.arange(side, device=start.device) + 0.5) - centres.float()[..., None]
    weights = distance.abs_().div_(step.clamp(min=1).float()[..., None]).neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


class LogMel(nn.Module):
    """Waveforms to normalised log-mel spectrograms, equal to ``ASTFeatureExtractor``'s, for a whole batch at once.

    Kaldi's filterbank: per frame the mean is removed, then pre-emphasis, a symmetric Hann window, the power
    spectrum, triangular filters on the mel scale from 20 Hz to 8 kHz, and the logarithm. Frames past a clip's end
    are zero before normalising. In training the waveform is augmented before, and the spectrogram masked after.
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
        self.quantiles = nn.Buffer(normal_quantiles(), persistent=False)

    def forward(self, audio: Field, seeds: Tensor | None = None) -> Field:
        """(n, T) int16 -> (n, frames, mels) float32; nothing is padding any more. Seeds (n,), or None for evaluation.

        Padding stands at a row's end.

        Evaluation computes in float64: where a band is 90 dB below another, float32 is off by 4e-4 after the
        logarithm. Training takes float32, at half the time on a CPU and far less on a GPU.
        """
        waveform = audio.x[:, : self.view.samples]
        if audio.valid is None:
            lengths = torch.full((len(waveform),), waveform.shape[1], device=waveform.device)
        else:
            # Where a row's padding begins, found by bisection: a tenth of the time that torch takes to sum booleans.
            padding = audio.valid[:, : self.view.samples].logical_not().view(torch.uint8)
            lengths = torch.searchsorted(padding, padding.new_ones((len(padding), 1)))[:, 0]
        if (missing := self.view.samples - waveform.shape[1]) > 0:
            waveform = F.pad(waveform, (0, missing))
        few = _few(waveform)
        each_seeds = repeat(None) if seeds is None else torch.split(seeds, few)
        parts = zip(torch.split(waveform, few), torch.split(lengths, few), each_seeds, strict=False)
        return Field(torch.cat([self._spectrograms(*part) for part in parts]), audio.rows)

    def _spectrograms(self, waveform: Tensor, lengths: Tensor, seeds: Tensor | None) -> Tensor:
        """(n, samples) int16, zeros behind the lengths -> (n, frames, mels) float32."""
        if seeds is not None:
            waveform, lengths = self._augment(waveform, lengths, seeds)
        mel = self._mel(waveform, torch.float64 if seeds is None else torch.float32)
        present = torch.div(lengths - FRAME, HOP, rounding_mode="floor") + 1  # whole frames of each clip
        within = torch.arange(self.view.frames, device=mel.device) < present[:, None]
        mel = mel.masked_fill_(~within[..., None], 0.0).sub_(self.view.mean).div_(self.view.std * 2).float()
        return mel if seeds is None else self._mask(mel, within, seeds)

    def _augment(self, waveform: Tensor, lengths: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """(n, samples) int16 of the given lengths, zeros behind, delayed, under noise and louder or quieter."""
        view = self.view
        if view.shift == 0 and view.noise == 0 and view.gain == 0:
            return waveform, lengths
        shift, noise, gain = uniforms(seeds, _SOUND, 3).unbind(1)
        # Of the clip itself, before silence dilutes it. Sums of squared integers are exact in float64.
        loudness = (waveform.double().square_().sum(dim=1) / lengths.clamp(min=1)).sqrt()
        times = torch.arange(view.samples, device=waveform.device)
        if view.shift > 0:
            # Never so far that the clip's end is pushed out.
            longest = (view.samples - lengths).clamp(max=int(view.shift * SAMPLE_RATE))
            delay = (shift * (longest + 1)).long()
            sources = times - delay[:, None]
            waveform = waveform.gather(1, sources.clamp(min=0)).masked_fill_(sources < 0, 0)
            lengths = lengths + delay
        x = waveform.float()
        if view.noise > 0:
            level = (loudness * noise * view.noise).float()
            x += level[:, None] * normals(seeds, _NOISE, view.samples, self.quantiles)
            x.masked_fill_(times >= lengths[:, None], 0)
        if view.gain > 0:
            x *= (10 ** (view.gain * (2 * gain - 1) / 20)).float()[:, None]
        return x.round_().clamp_(-32768, 32767).to(torch.int16), lengths

    def _mel(self, waveform: Tensor, precision: torch.dtype) -> Tensor:
        """(n, samples) int16 -> log-mel (n, frames, mels), before padding and normalising."""
        x = waveform.to(precision).div_(32768)
        mean = x.unfold(1, FRAME, HOP).mean(dim=-1, keepdim=True)  # (n, frames, 1)
        # Per frame: x - mean, then pre-emphasis. Taking the differences once for all frames gives the same but for
        # each frame's first sample, which the window multiplies by 0.
        differences = x.clone()
        differences[:, 1:].sub_(x[:, :-1], alpha=PREEMPHASIS)
        # The transform would fill short frames with zeros itself, in twice the time.
        frames = x.new_empty((len(x), mean.shape[1], FFT))
        frames[..., FRAME:].zero_()
        torch.sub(differences.unfold(1, FRAME, HOP), mean, alpha=1 - PREEMPHASIS, out=frames[..., :FRAME])
        frames[..., :FRAME].mul_(self.window.to(precision))
        spectrum = torch.fft.rfft(frames)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # (n, frames, 257)
        mel: Tensor = power @ self.filters.to(precision)
        return mel.clamp_min_(MEL_FLOOR).log_()

    def _mask(self, mel: Tensor, within: Tensor, seeds: Tensor) -> Tensor:
        """One stretch of frames and one of bins set to the mean, in (n, frames, mels) where (n, frames) is sound.

        Park et al. 2019, "SpecAugment", section 2, without time warping.
        """
        view = self.view
        if view.time_mask == 0 and view.frequency_mask == 0:
            return mel
        draws = uniforms(seeds, _MASKS, 4)
        bins = torch.full_like(seeds, view.mels)
        frames = _stretch(draws[:, :2], within.sum(dim=1), view.time_mask, view.frames)
        mels = _stretch(draws[:, 2:], bins, view.frequency_mask, view.mels)
        return mel.masked_fill_((frames[..., None] | mels[:, None]) & within[..., None], 0)


def _stretch(draws: Tensor, lengths: Tensor, longest: int, size: int) -> Tensor:
    """(n, size) bool, True in a stretch of 0 to ``longest`` places, drawn by (n, 2), within the first ``lengths``."""
    width = (draws[:, 0] * (lengths.clamp(max=longest) + 1)).long()
    start = (draws[:, 1] * (lengths - width + 1)).long()
    places = torch.arange(size, device=draws.device)
    return (places >= start[:, None]) & (places < (start + width)[:, None])


class OnDevice(nn.Module):
    """The device half of all views: a batch as it left the stream -> the batch that the encoder reads."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.views = nn.ModuleDict({name: view.on_device() for name, view in views.used.items()})

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        """Image uint8 -> float in [-1, 1]; text unchanged; audio int16 -> log-mel (n, frames, mels).

        Augmented as the batch's seeds say, if it has any: a row's numbers depend on its seed alone.
        """
        fields = {}
        for name, raw in batch.fields.items():
            seeds = batch.seeds
            if seeds is not None and len(raw.rows) < batch.size:
                seeds = seeds[raw.rows.to(seeds.device, non_blocking=True)]
            fields[name] = self.views[name](raw, seeds)
        return batch._replace(fields=fields)


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a batch, where touching it and handing it on cost least.

    In a worker it is shared with the training process from the start, as torch's own collation does, which saves
    the copy into shared memory. Elsewhere it is that of an earlier batch, if one is gone.
    """
    size = math.prod(shape) * dtype.itemsize
    if get_worker_info() is None:
        given = torch.from_numpy(lend(size))
    else:
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        given = torch.empty(0, dtype=torch.uint8).set_(storage)
    return given.view(dtype).view(shape)


def _like(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory in the shape, order and place of (n, c, h, w) with the channels last."""
    if values.device.type != "cpu" or not values.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(values, dtype=dtype)
    n, c, h, w = values.shape
    return _memory((n, h, w, c), dtype).permute(0, 3, 1, 2)


def _few(values: Tensor) -> int:
    """How many samples to take at a time: on a CPU about what stays within its cache, which for log-mel is twice as
    fast as a whole batch; on a GPU what leaves its memory to the model.
    """
    return max(1, (2**18 if values.device.type == "cpu" else 2**23) // values[0].numel())


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"data.views.{name}={got}: allowed is {allowed}")
