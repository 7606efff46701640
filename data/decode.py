"""Bytes of one member of a shard -> image, text, waveform or metadata; only formats on the list, within limits."""

import importlib
import importlib.util
import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import ExifTags, Image, UnidentifiedImageError

# libjpeg-turbo without Pillow's detour through its own image: the optional extra `fast`. The pixels are the same to
# the bit without it.
simplejpeg: Any = importlib.import_module("simplejpeg") if importlib.util.find_spec("simplejpeg") else None

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

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # as Pillow calls them
SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")  # as libsndfile does
MAX_MEMBER_BYTES = 256_000_000
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # JPEG's own; resizing takes memory for a side of the image times a side of the view
MAX_TEXT_BYTES = 1_000_000
MAX_AUDIO_SECONDS = 600.0
MAX_AUDIO_VALUES = 60_000_000  # samples times channels: ten minutes of stereo at 48 kHz

# A WAV written to a pipe announces the largest size there is, or one near it (SoX: 0x7FFFF000), or 0.
_STREAMING = 0x7FFF0000
_WAV_TAGS = re.compile(rb"LIST|id3 |ID3 |bext|iXML|_PMX|axml|aXML|cue |smpl|inst|PEAK|DISP|JUNK|junk|PAD ")
_MAX_WAV_TAGS = 16  # so that sound that is made to look like tags takes no time to speak of
OGG_FIRST, OGG_LAST = 2, 4  # flags of a page
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class DecodeError(ValueError):
    """A member that can't be used. The name of its subclass is what gets counted."""


class ImageError(DecodeError):
    """An image that can't be decoded."""


class TextError(DecodeError):
    """A text that can't be decoded."""


class AudioError(DecodeError):
    """A sound that can't be decoded, or not to its end."""


class MetadataError(DecodeError):
    """Metadata that are no JSON object."""


class LimitError(DecodeError):
    """More bytes, pixels, seconds or values than are allowed."""


class EmptyError(DecodeError):
    """Nothing in it: no bytes, no sound, or a text of white space."""


class Waveform(NamedTuple):
    """Mono sound.

    Attributes:
        samples: (T,) float32 in [-1, 1], or int16 where it is stored so.
        rate: samples per second.
    """

    samples: npt.NDArray[np.float32] | npt.NDArray[np.int16]
    rate: int

    def floats(self) -> npt.NDArray[np.float32]:
        """(T,) float32 in [-1, 1]."""
        if self.samples.dtype == np.int16:
            return self.samples * np.float32(2**-15)
        return self.samples.astype(np.float32, copy=False)


def check_size(size: int) -> None:
    """Refuse a member of ``size`` bytes that is empty or too large; every decoder does so first.

    Raises:
        EmptyError: no bytes.
        LimitError: more than ``MAX_MEMBER_BYTES``.
    """
    if size == 0:
        raise EmptyError("0 bytes")
    if size > MAX_MEMBER_BYTES:
        raise LimitError(f"{size} bytes: at most {MAX_MEMBER_BYTES} are allowed")


def decode_image(data: bytes, at_least: int | None = None) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) in RGB; transparency is laid on white, and the image is turned as its EXIF data say.

    Args:
        data: a JPEG, PNG or WebP.
        at_least: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, which is faster, but never with a side below
            this many pixels; None gives every image in full.

    Raises:
        ImageError: not a JPEG, PNG or WebP, or damaged.
        LimitError: more than ``MAX_PIXELS`` pixels, seen before they are decoded.
        EmptyError: no bytes.
    """
    check_size(len(data))
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, which our own limit judges, and of EXIF data that it can't read.
            warnings.simplefilter("ignore")
            pixels = _fast_jpeg(data, at_least)
            if pixels is None:
                return _by_pillow(data, at_least)
            if b"Exif\0\0" not in data:
                return pixels
            return _upright(pixels, orientation(_open(data)))
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, for sizes far above ours
        raise LimitError(f"image of {len(data)} bytes: {error}") from error
    except UnidentifiedImageError as error:  # Pillow's message names only an object in memory
        raise ImageError(f"image of {len(data)} bytes: no image of the formats {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow raises SyntaxError or ValueError for some broken PNGs.
        raise ImageError(f"image of {len(data)} bytes: {error}") from error


def _fast_jpeg(data: bytes, at_least: int | None) -> npt.NDArray[np.uint8] | None:
    """Pixels of a plain JPEG as it is stored; None where Pillow must decide."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # the latter for 4:4:1 chroma, of which it has no name
        return None
    _check_pixels(width, height)
    if colours not in ("RGB", "YCbCr", "Gray"):  # CMYK, of which Pillow knows the inverted kind
        return None
    # The factors that Pillow knows, too, though there are others: so both give the same pixels.
    fits = 1 if at_least is None else min(width // at_least, height // at_least)
    factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(fits, 1))
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, min_height=-(-height // factor), min_width=-(-width // factor)
        )
    except ValueError:  # an error, or no more than a warning, with which Pillow may decode it
        return None
    return pixels


def _by_pillow(data: bytes, at_least: int | None) -> npt.NDArray[np.uint8]:
    image = _open(data)
    _check_pixels(*image.size)
    if at_least is not None:
        image.draft(None, (at_least, at_least))  # JPEG only: never smaller than asked for
    rgb: Image.Image = image
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip it at 255, and nearly all of it would be white.
        rgb = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = rgb.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(rgb if rgb.mode == "RGB" else rgb.convert("RGB"))
    return _upright(pixels, orientation(image))


def _open(data: bytes) -> Image.Image:
    """Only the header is read."""
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise LimitError(f"image of {width}x{height}: at most {MAX_PIXELS} pixels are allowed")
    if max(width, height) > MAX_SIDE:
        raise LimitError(f"image of {width}x{height}: at most {MAX_SIDE} pixels a side are allowed")


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or the EXIF data are damaged, as viewers do.

    Not XMP's, by which few viewers turn a picture. EXIF behind the pixels of a PNG is seen when they were read.
    """
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):  # Pillow's ways of saying so
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo the orientation that a camera wrote."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def decode_text(data: bytes) -> str:
    """UTF-8 text without byte order mark and surrounding white space.

    Raises:
        TextError: not UTF-8.
        LimitError: more than ``MAX_TEXT_BYTES`` bytes.
        EmptyError: nothing but white space.
    """
    check_size(len(data))
    if len(data) > MAX_TEXT_BYTES:
        raise LimitError(f"text of {len(data)} bytes: at most {MAX_TEXT_BYTES} are allowed")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise TextError(f"text is not UTF-8: {error}") from error
    if not text:
        raise EmptyError("text of white space only")
    return text


def decode_audio(data: bytes) -> Waveform:
    """A waveform at its own rate, channels averaged to mono.

    A WAV whose header leaves the length open, as one written to a pipe does, is as long as it is.

    Raises:
        AudioError: not WAV, FLAC or Ogg, damaged, or shorter than it announces.
        LimitError: over ``MAX_AUDIO_SECONDS`` or ``MAX_AUDIO_VALUES``, seen before it is decoded.
        EmptyError: no samples.
    """
    check_size(len(data))
    if not data.startswith((b"RIFF", b"RIFX", b"fLaC", b"OggS")):  # libsndfile would try many other formats
        raise AudioError(f"audio of {len(data)} bytes: no sound of the formats WAV, FLAC, Ogg")
    if data.startswith(b"RIF"):
        data = _whole_wav(data)
    if data.startswith(b"OggS"):
        _check_ogg(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            if sound.format not in SOUND_FORMATS:
                raise AudioError(f"audio in format {sound.format}: allowed are {', '.join(SOUND_FORMATS)}")
            if sound.frames == 0:
                raise EmptyError("audio without samples")
            if sound.frames == np.iinfo(np.int64).max:  # a FLAC written to a pipe, whose end libsndfile misses
                raise AudioError("audio announces no length")
            seconds = sound.frames / sound.samplerate
            if seconds > MAX_AUDIO_SECONDS:
                raise LimitError(f"audio of {seconds:.0f} s: at most {MAX_AUDIO_SECONDS:.0f} s are allowed")
            if sound.frames * sound.channels > MAX_AUDIO_VALUES:
                raise LimitError(
                    f"audio of {sound.frames} samples in {sound.channels} channels: at most {MAX_AUDIO_VALUES} "
                    "values are allowed"
                )
            # What is int16 already need not go through float32 on its way to the int16 of a batch.
            whole = sound.channels == 1 and sound.subtype == "PCM_16"
            samples = sound.read(sound.frames, dtype="int16" if whole else "float32", always_2d=True)
            if len(samples) != sound.frames:
                raise AudioError(f"audio holds {len(samples)} of {sound.frames} announced samples")
            if whole:
                return Waveform(samples[:, 0], sound.samplerate)
            if not np.isfinite(samples).all():
                raise AudioError("audio holds samples that are not finite")
            return Waveform(samples.mean(axis=1, dtype=np.float32), sound.samplerate)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"audio of {len(data)} bytes: {error}") from error


def _whole_wav(data: bytes) -> bytes:
    """The WAV, with the length of its sound where it was left open.

    Raises:
        AudioError: fewer bytes of sound than the header announces, of which libsndfile says nothing.
    """
    for name, at, size in wav_chunks(data):
        if name != b"data":
            continue
        there = len(data) - at
        if there < size:
            raise AudioError(f"audio holds {there} of {size} announced bytes")
        length = size.to_bytes(4, "little" if data.startswith(b"RIFF") else "big")
        return data if data[at - 4 : at] == length else data[: at - 4] + length + data[at : at + size]
    raise AudioError(f"audio of {len(data)} bytes: a WAV that ends before its sound")


def wav_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of the content of each chunk of a WAV; nothing checks that all of it is there.

    Sound whose length was left open reaches to the end, or to tags that were written behind it.
    """
    layout = "<4sI" if data.startswith(b"RIFF") else ">4sI"
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from(layout, data, at)
        at += 8
        if name == b"data":
            there = len(data) - at
            # A length of 0 is not open in an empty sound before other chunks, of which the whole file's length tells.
            whole = struct.unpack_from(layout, data)[1] == len(data) - 8
            if size >= _STREAMING or (size == 0 and there > 0 and not whole):
                size = _wav_tags(layout, data, at) - at
        yield name, at, size
        at += size + size % 2


def _wav_tags(layout: str, data: bytes, start: int) -> int:
    """Where chunks of tags begin that reach from there to the end of the WAV exactly, or else its end."""
    for found in _WAV_TAGS.finditer(data, start):
        at = found.start()
        for _ in range(_MAX_WAV_TAGS):
            if at + 8 <= len(data):
                size = struct.unpack_from(layout, data, at)[1]
                at += 8 + size + size % 2
        if at in (len(data), len(data) + 1):  # the last byte that makes a length even is often missing
            return found.start()
    return len(data)


class OggPage(NamedTuple):
    """A page of an Ogg file, undamaged.

    Attributes:
        at: where it begins in the file.
        position: in the stream, at its end, in the stream's own unit.
        lengths: of up to 255 segments; one of less than 255 bytes ends a packet.
    """

    at: int
    flags: int
    position: int
    stream: int
    lengths: bytes
    payload: bytes

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.at + 27 + len(self.lengths) + len(self.payload)


def ogg_pages(data: bytes) -> Iterator[OggPage]:
    """The pages of an Ogg file, up to bytes that are none.

    Raises:
        AudioError: pages that are damaged or missing.
    """
    at = 0
    numbers: dict[int, int] = {}  # of the last page, per stream
    while data.startswith(b"OggS", at) and len(data) >= at + 27:
        flags, position, stream, number, checksum, segments = struct.unpack_from("<5xBQIIIB", data, at)
        if number != (0 if flags & OGG_FIRST else numbers.get(stream, -1) + 1):
            raise AudioError(f"audio of {len(data)} bytes: Ogg pages are missing before byte {at}")
        numbers[stream] = number
        lengths = data[at + 27 : at + 27 + segments]
        start = at + 27 + segments
        payload = data[start : start + sum(lengths)]
        if ogg_checksum(data[at : at + 22] + bytes(4) + data[at + 26 : start] + payload) != checksum:
            raise AudioError(f"audio of {len(data)} bytes: Ogg page at byte {at} is damaged or cut off: wrong checksum")
        page = OggPage(at, flags, position, stream, lengths, payload)
        yield page
        at = page.end


def ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's with the bits of each byte in the other order, and without its inversions."""
    checksum = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(checksum.to_bytes(4, "big").translate(_MIRRORED), "little")


def _check_ogg(data: bytes) -> None:
    """Every page is whole and the last one is the end: libsndfile skips others in silence.

    Raises:
        AudioError: pages that are damaged or missing, or a second sound behind the first.
    """
    end, flags = 0, 0
    for page in ogg_pages(data):
        if page.flags & OGG_FIRST and flags & OGG_LAST:  # a stream that begins after one has ended
            raise AudioError("audio of several sounds, one behind the other")
        end, flags = page.end, page.flags
    if not flags & OGG_LAST:
        raise AudioError(f"audio of {len(data)} bytes: the Ogg pages end at byte {end} without a last one")


def decode_metadata(data: bytes) -> dict[str, Any]:
    """The sample's ``.json`` member.

    Raises:
        MetadataError: not a JSON object in UTF-8.
        EmptyError: no bytes.
    """
    check_size(len(data))
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter from deep nesting
        raise MetadataError(f"metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise MetadataError(f"metadata is a JSON {type(metadata).__name__}: an object is needed")
    return metadata


DECODERS: dict[str, Callable[[bytes], Any]] = {"image": decode_image, "text": decode_text, "audio": decode_audio}
