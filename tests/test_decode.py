import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data.decode
from data.decode import DecodeError, decode_audio, decode_image, decode_metadata, decode_text
from tests.samples import encode_image, encode_sound, noise, noise_image


def pixels(encoded: bytes) -> Any:
    image = decode_image(encoded)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(("format_", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_rgb_comes_back_exactly(format_: str, options: dict[str, Any]) -> None:
    image = noise_image(7, 5)
    np.testing.assert_array_equal(pixels(encode_image(image, format_, **options)), np.asarray(image))


def test_jpeg_comes_back_nearly() -> None:
    gradient = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    got = pixels(encode_image(gradient, "JPEG", quality=95)).astype(int)
    assert np.abs(got - np.asarray(gradient)).max() <= 4


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_grey_is_the_same_in_every_channel(format_: str) -> None:
    grey = Image.linear_gradient("L").resize((16, 16))
    got = pixels(encode_image(grey, format_))
    np.testing.assert_array_equal(got, got[..., :1].repeat(3, axis=2))
    np.testing.assert_allclose(got[..., 0], np.asarray(grey), atol=4)


def test_one_bit_is_black_and_white() -> None:
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode_image(bits))[0], [[0, 0, 0], [255, 255, 255]])


@pytest.mark.parametrize("value", [0, 255, 256, 32768, 65535])
def test_16_bit_grey_is_scaled_not_clipped(value: int) -> None:
    got = pixels(encode_image(Image.fromarray(np.full((2, 3), value, dtype=np.uint16))))
    assert got.shape == (2, 3, 3)
    np.testing.assert_allclose(got, value / 257, atol=1)


def test_a_palette_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode_image(image)), [[[10, 20, 30], [40, 50, 60]]])


def test_cmyk_jpeg_becomes_rgb() -> None:
    got = pixels(encode_image(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert got.max() <= 2


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(format_: str) -> None:
    image = Image.new("RGBA", (3, 1), (200, 100, 0, 255))
    image.putpixel((1, 0), (200, 100, 0, 0))
    image.putpixel((2, 0), (200, 100, 0, 128))
    got = pixels(encode_image(image, format_, **({"lossless": True, "exact": True} if format_ == "WEBP" else {})))
    np.testing.assert_allclose(got, [[[200, 100, 0], [255, 255, 255], [227, 177, 127]]], atol=1)


def test_transparent_palette_entries_and_grey_values_are_laid_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode_image(palette, transparency=1)), [[[10, 20, 30], [255] * 3]])
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 90)
    np.testing.assert_array_equal(pixels(encode_image(grey, transparency=90)), [[[7] * 3, [255] * 3]])
    grey_alpha = Image.new("LA", (1, 1), (7, 0))
    np.testing.assert_array_equal(pixels(encode_image(grey_alpha)), [[[255] * 3]])


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_image_formats_are_refused(format_: str) -> None:
    with pytest.raises(DecodeError, match="no image of the formats JPEG, PNG, WEBP"):
        decode_image(encode_image(noise_image(16, 16), format_))


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_refused(format_: str) -> None:
    encoded = encode_image(noise_image(64, 64), format_)
    for length in (0, 10, len(encoded) // 2, len(encoded) - 200):
        with pytest.raises(DecodeError, match=f"image of {length} bytes"):
            decode_image(encoded[:length])


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_pngs_on_which_pillow_raises_value_error_are_refused() -> None:
    encoded = encode_image(noise_image(4, 4))
    short_header = encoded[:8] + png_chunk(b"IHDR", b"\0" * 5)
    huge_text = encoded[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 5_000_000)) + encoded[33:]
    for broken in (short_header, huge_text):
        with pytest.raises(DecodeError):
            decode_image(broken)


def test_pixels_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_PIXELS", 64)
    assert decode_image(encode_image(noise_image(8, 8))).size == (8, 8)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(DecodeError, match="image of 5x13: at most 64 pixels"):
        decode_image(encode_image_without_loading())


def encode_image_without_loading() -> bytes:
    """A PNG header of 5x13 pixels, and no pixels."""
    header = struct.pack(">IIBBBBB", 5, 13, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def test_decompression_bombs_are_errors_without_warnings() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    near = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chunk in (header, near):
            with pytest.raises(DecodeError):
                decode_image(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", chunk) + png_chunk(b"IDAT", b""))


def test_text_is_stripped_utf8() -> None:
    assert decode_text(" größe\n🐈 \r\n".encode()) == "größe\n🐈"


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(DecodeError, match="text is not UTF-8"):
        decode_text("größe".encode("latin-1"))


def test_text_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_TEXT_BYTES", 4)
    assert decode_text(b"abcd") == "abcd"
    with pytest.raises(DecodeError, match="text of 5 bytes: at most 4"):
        decode_text(b"abcde")


def test_metadata_is_an_object() -> None:
    assert decode_metadata(b'{"label": 3, "of": {"\xc3\xb6": null}}') == {"label": 3, "of": {"ö": None}}


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"[1]", "a JSON list: an object is needed"),
        (b"3", "a JSON int: an object is needed"),
        (b"null", "a JSON NoneType: an object is needed"),
        (b'{"a": ', "metadata is not JSON"),
        (b"", "metadata is not JSON"),
        (b'{"a": "\xff"}', "metadata is not JSON"),
        (b'{"a":' * 100_000, "metadata is not JSON"),
    ],
)
def test_other_metadata_is_refused(encoded: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode_metadata(encoded)


@pytest.mark.parametrize(("format_", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.1)])
def test_sound_comes_back_at_its_own_rate(format_: str, tolerance: float) -> None:
    tone = (0.5 * np.sin(np.arange(8000) * 0.1)).astype(np.float32)
    got = decode_audio(encode_sound(tone, format_, rate=22_050))
    assert got.rate == 22_050
    assert got.samples.dtype == np.float32
    np.testing.assert_allclose(got.samples, tone, atol=tolerance)


@pytest.mark.parametrize("format_", ["WAV", "FLAC"])
def test_channels_are_averaged(format_: str) -> None:
    stereo = np.stack([noise(500, 1), noise(500, 2)], axis=1)
    got = decode_audio(encode_sound(stereo, format_)).samples
    assert got.shape == (500,)
    np.testing.assert_allclose(got, stereo.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize(("subtype", "tolerance"), [("PCM_24", 1e-6), ("FLOAT", 0), ("PCM_U8", 1e-2), ("ULAW", 1e-2)])
def test_other_sample_formats_of_wav_keep_their_scale(subtype: str, tolerance: float) -> None:
    given = noise(300)
    np.testing.assert_allclose(decode_audio(encode_sound(given, subtype=subtype)).samples, given, atol=tolerance)


def test_samples_that_are_no_numbers_are_refused() -> None:
    for value in (np.nan, np.inf):
        given = noise(300)
        given[7] = value
        with pytest.raises(DecodeError, match="finite"):
            decode_audio(encode_sound(given, subtype="FLOAT"))


@pytest.mark.parametrize("format_", ["AIFF", "AU", "CAF", "W64", "MP3"])
def test_other_sound_formats_are_refused(format_: str) -> None:
    with pytest.raises(DecodeError, match="allowed are WAV"):
        decode_audio(encode_sound(noise(2000), format_))


@pytest.mark.parametrize("format_", ["FLAC", "OGG"])
def test_truncated_sound_is_refused(format_: str) -> None:
    encoded = encode_sound(noise(20_000), format_)
    for length in (0, 20, len(encoded) // 2):
        with pytest.raises(DecodeError, match="audio"):
            decode_audio(encoded[:length])


def test_sound_without_samples_is_refused() -> None:
    with pytest.raises(DecodeError, match="0 of 0"):
        decode_audio(encode_sound(noise(0)))


def test_seconds_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_AUDIO_SECONDS", 2.0)
    assert len(decode_audio(encode_sound(noise(16_000), rate=8000)).samples) == 16_000
    with pytest.raises(DecodeError, match="audio of 3 s: at most 2 s"):
        decode_audio(encode_sound(noise(24_000), rate=8000))
