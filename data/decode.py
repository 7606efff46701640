"""Bytes of one member of a shard -> image, text, waveform or metadata; only formats on the list, within limits."""

import io
import json
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, UnidentifiedImageError

# Extension of a member -> what it holds. Anything else in a shard is left unread.
MODALITIES: dict[str, str] = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "webp": "image",
    "txt": "text",
    "wav": "audio",
    "flac": "audio",
    "ogg": "audio",
}
METADATA = "json"

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
_SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
MAX_PIXELS = 64_000_000
MAX_AUDIO_SECONDS = 600.0
MAX_AUDIO_VALUES = 60_000_000  # samples times channels: ten minutes of stereo at 48 kHz
MAX_MEMBER_BYTES = 256_000_000
MAX_TEXT_BYTES = 1_000_000


class DecodeError(ValueError):
    """A member that can't be decoded or exceeds a limit."""


class Waveform(NamedTuple):
    """Mono sound.

    Attributes:
        samples: (T,) float32 in [-1, 1].
        rate: samples per second.
    """

    samples: npt.NDArray[np.float32]
    rate: int


def decode_image(data: bytes) -> Image.Image:
    """An RGB image; transparency is laid on white.

    Raises:
        DecodeError: not a JPEG, PNG or WebP, damaged, or more than ``MAX_PIXELS`` pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb check only warns at our sizes; ours, below, is an error before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"image of {image.width}x{image.height}: at most {MAX_PIXELS} pixels are allowed")
        if image.mode.startswith("I"):
            # 16-bit grey: Pillow would clip it at 255, and nearly all of it would be white.
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")
    except DecodeError:
        raise
    except UnidentifiedImageError as error:  # Pillow's message names only an object in memory
        raise DecodeError(
            f"image of {len(data)} bytes: no image of the formats {', '.join(_PILLOW_FORMATS)}"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError or ValueError for some broken PNGs.
        raise DecodeError(f"image of {len(data)} bytes: {error}") from error


def decode_text(data: bytes) -> str:
    """UTF-8 text without surrounding white space.

    Raises:
        DecodeError: not UTF-8, or more than ``MAX_TEXT_BYTES`` bytes.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise DecodeError(f"text of {len(data)} bytes: at most {MAX_TEXT_BYTES} are allowed")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"text is not UTF-8: {error}") from error


def decode_audio(data: bytes) -> Waveform:
    """A waveform at its own rate, channels averaged to mono.

    Raises:
        DecodeError: not WAV, FLAC or Ogg, damaged, empty, or over ``MAX_AUDIO_SECONDS`` or
            ``MAX_AUDIO_VALUES``.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            if sound.format not in _SOUND_FORMATS:
                raise DecodeError(f"audio in format {sound.format}: allowed are {', '.join(_SOUND_FORMATS)}")
            seconds = sound.frames / sound.samplerate
            if seconds > MAX_AUDIO_SECONDS:
                raise DecodeError(f"audio of {seconds:.0f} s: at most {MAX_AUDIO_SECONDS:.0f} s are allowed")
            if sound.frames * sound.channels > MAX_AUDIO_VALUES:
                raise DecodeError(
                    f"audio of {sound.frames} samples in {sound.channels} channels: at most {MAX_AUDIO_VALUES} "
                    "values are allowed"
                )
            samples = sound.read(dtype="float32", always_2d=True)
            if len(samples) != sound.frames or len(samples) == 0:
                raise DecodeError(f"audio holds {len(samples)} of {sound.frames} announced samples")
            if not np.isfinite(samples).all():
                raise DecodeError("audio holds samples that are not finite")
            return Waveform(samples.mean(axis=1, dtype=np.float32), sound.samplerate)
    except soundfile.LibsndfileError as error:
        raise DecodeError(f"audio of {len(data)} bytes: {error}") from error


def decode_metadata(data: bytes) -> dict[str, Any]:
    """The sample's ``.json`` member.

    Raises:
        DecodeError: not a JSON object in UTF-8.
    """
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter from deep nesting
        raise DecodeError(f"metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise DecodeError(f"metadata is a JSON {type(metadata).__name__}: an object is needed")
    return metadata


DECODERS = {"image": decode_image, "text": decode_text, "audio": decode_audio}
