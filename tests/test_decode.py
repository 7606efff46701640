import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from PIL import ExifTags, Image, ImageOps

import data.decode
from data.decode import (
    AudioError,
    DecodeError,
    EmptyError,
    ImageError,
    LimitError,
    MetadataError,
    TextError,
    check_size,
    decode_audio,
    decode_image,
    decode_metadata,
    decode_text,
)
from tests.samples import encode_image, encode_sound, noise, noise_image

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(params=["simplejpeg", "pillow"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways in which a JPEG may be decoded."""
    if request.param == "pillow":
        monkeypatch.setattr(data.decode, "simplejpeg", None)
    elif data.decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


both_paths = pytest.mark.usefixtures("path")


def by_each_path(encoded: bytes, at_least: int | None = None) -> list[Pixels | str]:
    """What simplejpeg, if it is there, and Pillow alone make of it: pixels, or the error's class and message."""
    found: list[Pixels | str] = []
    for module in (data.decode.simplejpeg, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.decode, "simplejpeg", module)
            try:
                found.append(decode_image(encoded, at_least))
            except DecodeError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def pixels(encoded: bytes) -> Any:
    image = decode_image(encoded)
    assert image.dtype == np.uint8
    assert (image.ndim, image.shape[2]) == (3, 3)
    assert image.flags.writeable  # torch warns of others
    return image


def smooth_image(width: int, height: int) -> Image.Image:
    return noise_image(1 + width // 8, 1 + height // 8).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 17, 100])
@pytest.mark.parametrize("height", [1, 16, 61])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_do_not_depend_on_the_path(width: int, height: int, mode: str) -> None:
    image = smooth_image(width, height).convert(mode)
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 20}):
        encoded = encode_image(image, "JPEG", **options)
        for at_least in (None, 8, 9, 20, 1000):
            fast, slow = by_each_path(encoded, at_least)
            assert isinstance(fast, np.ndarray)
            np.testing.assert_array_equal(fast, slow)


@both_paths
@pytest.mark.parametrize("exif", [False, True])
def test_a_jpeg_may_come_out_smaller_but_not_below_what_is_asked_for(exif: bool) -> None:
    options = {"exif": exif_data(6)} if exif else {}
    encoded = encode_image(smooth_image(200, 96), "JPEG", **options)
    turn = -1 if exif else 1
    sides = {None: 1, 12: 8, 13: 4, 24: 4, 25: 2, 48: 2, 49: 1, 96: 1, 300: 1}
    for at_least, factor in sides.items():
        assert decode_image(encoded, at_least).shape[:2][::turn] == (96 // factor, 200 // factor)
    small = decode_image(encode_image(smooth_image(200, 96), "JPEG", subsampling=0, quality=95), 24).astype(int)
    np.testing.assert_allclose(small, np.asarray(smooth_image(200, 96).reduce(4)), atol=12)


def test_only_jpegs_come_out_smaller() -> None:
    assert decode_image(encode_image(noise_image(64, 64)), 8).shape == (64, 64, 3)
    assert decode_image(encode_image(noise_image(64, 64), "WEBP"), 8).shape == (64, 64, 3)


def exif_data(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a scan"
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@both_paths
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(format_: str, orientation: int) -> None:
    options = {"lossless": True} if format_ == "WEBP" else {}
    encoded = encode_image(smooth_image(24, 8), format_, exif=exif_data(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert expected is not None
    np.testing.assert_array_equal(pixels(encoded), np.asarray(expected.convert("RGB")))


@both_paths
def test_damaged_exif_data_turn_nothing() -> None:
    plain = encode_image(smooth_image(24, 8), "JPEG")
    for orientation in (0, 9, 77):
        encoded = encode_image(smooth_image(24, 8), "JPEG", exif=exif_data(orientation))
        np.testing.assert_array_equal(pixels(encoded), pixels(plain))
    good = exif_data(6)
    for exif in (good[:9], good[:14], good[:20], good[:6] + b"XX" + good[8:], good[:10] + b"\xff" * 4 + good[14:]):
        np.testing.assert_array_equal(pixels(encode_image(smooth_image(24, 8), "JPEG", exif=exif)), pixels(plain))


@pytest.mark.parametrize(("format_", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_rgb_comes_back_exactly(format_: str, options: dict[str, Any]) -> None:
    image = noise_image(7, 5)
    np.testing.assert_array_equal(pixels(encode_image(image, format_, **options)), np.asarray(image))


@both_paths
def test_jpeg_comes_back_nearly() -> None:
    gradient = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    got = pixels(encode_image(gradient, "JPEG", quality=95)).astype(int)
    assert np.abs(got - np.asarray(gradient)).max() <= 4


@both_paths
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


@both_paths
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


@both_paths
@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_image_formats_are_refused(format_: str) -> None:
    with pytest.raises(ImageError, match="no image of the formats JPEG, PNG, WEBP"):
        decode_image(encode_image(noise_image(16, 16), format_))


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_truncated_images_are_refused(format_: str) -> None:
    encoded = encode_image(noise_image(64, 64), format_)
    for length in (10, len(encoded) // 2, len(encoded) - 200):
        with pytest.raises(ImageError, match=f"image of {length} bytes"):
            decode_image(encoded[:length])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("at_least", [None, 8])
def test_jpegs_truncated_anywhere_are_refused(progressive: bool, at_least: int | None) -> None:
    encoded = encode_image(noise_image(24, 24), "JPEG", progressive=progressive)
    assert len(encoded) > 900
    for length in range(1, len(encoded)):
        fast, slow = by_each_path(encoded[:length], at_least)
        assert isinstance(fast, str)
        assert fast == slow
        assert fast.startswith(f"ImageError: image of {length} bytes: ")


def test_jpegs_with_warnings_are_for_pillow_to_judge() -> None:
    encoded = encode_image(smooth_image(64, 48), "JPEG", quality=95)
    middle = len(encoded) // 2
    damaged = encoded[:middle] + bytes(30) + encoded[middle + 30 :]
    sampling = encoded.index(b"\xff\xc0") + 11
    odd_chroma = encoded[:sampling] + b"\x14" + encoded[sampling + 1 :]
    for each in (encoded + b"behind the end", damaged, odd_chroma):
        fast, slow = by_each_path(each)
        assert isinstance(fast, np.ndarray)
        np.testing.assert_array_equal(fast, slow)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_pngs_on_which_pillow_raises_value_error_are_refused() -> None:
    encoded = encode_image(noise_image(4, 4))
    short_header = encoded[:8] + png_chunk(b"IHDR", b"\0" * 5)
    huge_text = encoded[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 5_000_000)) + encoded[33:]
    for broken in (short_header, huge_text):
        with pytest.raises(ImageError):
            decode_image(broken)


def test_pixels_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_PIXELS", 64)
    assert decode_image(encode_image(noise_image(8, 8))).shape == (8, 8, 3)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(LimitError, match="image of 5x13: at most 64 pixels"):
        decode_image(encode_image_without_loading())


@both_paths
def test_pixels_of_jpegs_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_PIXELS", 64)
    large, small = (encode_image(noise_image(*size), "JPEG") for size in ((5, 13), (8, 8)))
    assert decode_image(small).shape == (8, 8, 3)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    if data.decode.simplejpeg is not None:
        monkeypatch.setattr(data.decode.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    for at_least in (None, 1):
        with pytest.raises(LimitError, match="image of 5x13: at most 64 pixels"):
            decode_image(large, at_least)


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
            with pytest.raises(LimitError):
                decode_image(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", chunk) + png_chunk(b"IDAT", b""))


def test_text_is_stripped_utf8() -> None:
    assert decode_text(" größe\n🐈 \r\n".encode()) == "größe\n🐈"
    assert decode_text("\ufeff a \ufeff b".encode()) == "a \ufeff b"  # only the first one is a byte order mark


def test_text_that_is_not_utf8_is_refused() -> None:
    for encoding in ("latin-1", "utf-16"):
        with pytest.raises(TextError, match="text is not UTF-8"):
            decode_text("größe".encode(encoding))


def test_text_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_TEXT_BYTES", 4)
    assert decode_text(b"abcd") == "abcd"
    with pytest.raises(LimitError, match="text of 5 bytes: at most 4"):
        decode_text(b"abcde")


@pytest.mark.parametrize("encoded", [b" ", b"\n\t \r\n", "\u3000".encode(), b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_text_of_white_space_is_empty(encoded: bytes) -> None:
    with pytest.raises(EmptyError, match="white space"):
        decode_text(encoded)


@pytest.mark.parametrize("decode", [decode_image, decode_text, decode_audio, decode_metadata])
def test_every_decoder_checks_the_size(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmptyError, match="0 bytes"):
        decode(b"")
    monkeypatch.setattr(data.decode, "MAX_MEMBER_BYTES", 20)
    with pytest.raises(LimitError, match="21 bytes: at most 20 are allowed"):
        decode(b"x" * 21)


def test_sizes_are_checked_without_the_bytes() -> None:
    check_size(1)
    check_size(data.decode.MAX_MEMBER_BYTES)
    with pytest.raises(EmptyError):
        check_size(0)
    with pytest.raises(LimitError, match="256000001 bytes: at most 256000000"):
        check_size(data.decode.MAX_MEMBER_BYTES + 1)


def test_metadata_is_an_object() -> None:
    assert decode_metadata(b'{"label": 3, "of": {"\xc3\xb6": null}}') == {"label": 3, "of": {"ö": None}}


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"[1]", "a JSON list: an object is needed"),
        (b"3", "a JSON int: an object is needed"),
        (b"null", "a JSON NoneType: an object is needed"),
        (b'{"a": ', "metadata is not JSON"),
        (b'{"a": "\xff"}', "metadata is not JSON"),
        (b'{"a":' * 100_000, "metadata is not JSON"),
    ],
)
def test_other_metadata_is_refused(encoded: bytes, message: str) -> None:
    with pytest.raises(MetadataError, match=message):
        decode_metadata(encoded)


@pytest.mark.parametrize(("format_", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.1)])
def test_sound_comes_back_at_its_own_rate(format_: str, tolerance: float) -> None:
    tone = (0.5 * np.sin(np.arange(8000) * 0.1)).astype(np.float32)
    got = decode_audio(encode_sound(tone, format_, rate=22_050))
    assert got.rate == 22_050
    assert got.floats().dtype == np.float32
    np.testing.assert_allclose(got.floats(), tone, atol=tolerance)


@pytest.mark.parametrize("format_", ["WAV", "FLAC"])
def test_16_bits_stay_what_they_are(format_: str) -> None:
    given = np.arange(-32768, 32768, 7, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, given, 16_000, format=format_, subtype="PCM_16")
    got = decode_audio(file.getvalue())
    assert got.samples.dtype == np.int16
    np.testing.assert_array_equal(got.samples, given)
    np.testing.assert_array_equal(got.floats(), given / np.float32(32768))


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
        with pytest.raises(AudioError, match="finite"):
            decode_audio(encode_sound(given, subtype="FLOAT"))


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM"])
def test_compressed_wav_is_read_to_its_end(subtype: str) -> None:
    given = (0.5 * np.sin(np.arange(3200) * 0.05)).astype(np.float32)
    got = decode_audio(encode_sound(given, subtype=subtype)).samples
    assert 3200 <= len(got) < 4200  # they come in blocks
    assert np.corrcoef(got[:3200], given)[0, 1] > 0.99


@pytest.mark.parametrize("format_", ["AIFF", "AU", "CAF", "W64", "MP3", "RF64"])
def test_other_sound_formats_are_refused(format_: str) -> None:
    with pytest.raises(AudioError, match="no sound of the formats WAV, FLAC, Ogg"):
        decode_audio(encode_sound(noise(2000), format_))


@pytest.mark.parametrize(("format_", "options"), [("FLAC", {}), ("OGG", {}), ("OGG", {"subtype": "OPUS"})])
def test_sound_truncated_anywhere_is_refused(format_: str, options: dict[str, Any]) -> None:
    encoded = encode_sound(noise(20_000), format_, **options)
    for length in (*range(1, len(encoded), 97), len(encoded) - 1):
        with pytest.raises(AudioError, match="audio"):
            decode_audio(encoded[:length])


def pages(encoded: bytes) -> list[bytes]:
    starts = [at for at in range(len(encoded)) if encoded.startswith(b"OggS", at)]
    return [encoded[a:b] for a, b in zip(starts, [*starts[1:], len(encoded)], strict=True)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_with_damaged_or_missing_pages_is_refused(subtype: str) -> None:
    encoded = encode_sound(noise(40_000), "OGG", subtype=subtype)
    parts = pages(encoded)
    assert len(parts) >= 4
    at = 0
    for i, page in enumerate(parts):
        flipped = at + len(page) * 2 // 3
        damaged = encoded[:flipped] + bytes([encoded[flipped] ^ 1]) + encoded[flipped + 1 :]
        without = b"".join(parts[:i] + parts[i + 1 :])
        for bad in (damaged, without):
            with pytest.raises(AudioError):
                decode_audio(bad)
        at += len(page)


def test_ogg_may_be_followed_by_other_bytes_but_not_by_another_sound() -> None:
    encoded = encode_sound(noise(4000), "OGG")
    assert len(decode_audio(encoded + b"TAG" + bytes(125)).samples) == 4000
    with pytest.raises(AudioError, match="several sounds"):
        decode_audio(encoded + encoded)


def test_flac_of_unknown_length_is_refused() -> None:
    encoded = bytearray(encode_sound(noise(4000), "FLAC"))
    encoded[21] &= 0xF0
    encoded[22:26] = bytes(4)
    with pytest.raises(AudioError, match="announces no length"):
        decode_audio(bytes(encoded))


def announcing(encoded: bytes, data_size: int, file_size: int | None = None, order: str = "<") -> bytes:
    """A WAV with other sizes in its headers."""
    at = encoded.index(b"data")
    whole = encoded[4:8] if file_size is None else struct.pack(f"{order}I", file_size)
    return encoded[:4] + whole + encoded[8 : at + 4] + struct.pack(f"{order}I", data_size) + encoded[at + 8 :]


@pytest.mark.parametrize("options", [{}, {"endian": "BIG"}, {"subtype": "FLOAT"}, {"format_": "WAVEX"}])
def test_truncated_wav_is_refused(options: dict[str, Any]) -> None:
    encoded = encode_sound(noise(500), **options)
    assert len(decode_audio(encoded).samples) == 500
    for missing in (1, 2, 300, 600):
        with pytest.raises(AudioError, match=r"audio holds \d+ of (1000|2000) announced bytes"):
            decode_audio(encoded[:-missing])
    for length in (4, 11, 12, 30, 43):
        with pytest.raises(AudioError, match="audio"):
            decode_audio(encoded[:length])


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFF000, 0x7FFFFFFF])
@pytest.mark.parametrize("file_size", [0, 8, 0xFFFFFFFF])
def test_wav_that_was_written_to_a_pipe_is_as_long_as_it_is(size: int, file_size: int) -> None:
    encoded = encode_sound(noise(500))
    expected = decode_audio(encoded).samples
    np.testing.assert_array_equal(decode_audio(announcing(encoded, size, file_size)).samples, expected)
    big = encode_sound(noise(500), endian="BIG")
    np.testing.assert_array_equal(decode_audio(announcing(big, size, file_size, ">")).samples, expected)


def test_wav_may_have_chunks_around_its_sound() -> None:
    encoded = encode_sound(noise(501), subtype="PCM_U8")  # an odd size, and so a byte of padding
    chunk = b"note" + struct.pack("<I", 3) + b"data"  # three bytes, and one of padding
    around = encoded[:12] + chunk + encoded[12:] + chunk
    around = around[:4] + struct.pack("<I", len(around) - 8) + around[8:]
    np.testing.assert_array_equal(decode_audio(around).samples, decode_audio(encoded).samples)


def test_sound_without_samples_is_empty() -> None:
    with pytest.raises(EmptyError, match="without samples"):
        decode_audio(encode_sound(noise(0)))
    chunk = b"LIST" + struct.pack("<I", 4) + b"INFO"
    encoded = encode_sound(noise(0)) + chunk
    with pytest.raises(EmptyError, match="without samples"):
        decode_audio(encoded[:4] + struct.pack("<I", len(encoded) - 8) + encoded[8:])


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading samples fails the test."""
    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
        yield


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG"])
def test_seconds_are_limited_before_decoding(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_AUDIO_SECONDS", 2.0)
    with pytest.raises(LimitError, match="audio of 3 s: at most 2 s"):
        decode_audio(encode_sound(noise(24_000), format_, rate=8000))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("format_", ["WAV", "FLAC"])
def test_samples_times_channels_are_limited_before_decoding(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_AUDIO_VALUES", 599)
    with pytest.raises(LimitError, match="audio of 300 samples in 2 channels: at most 599"):
        decode_audio(encode_sound(np.stack([noise(300)] * 2, axis=1), format_))


def test_sound_at_the_limits_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.decode, "MAX_AUDIO_SECONDS", 2.0)
    monkeypatch.setattr(data.decode, "MAX_AUDIO_VALUES", 16_000)
    assert len(decode_audio(encode_sound(noise(16_000), rate=8000)).samples) == 16_000


def test_an_hour_is_refused_in_no_time() -> None:
    encoded = bytearray(encode_sound(noise(4000), "FLAC"))
    encoded[22:26] = struct.pack(">I", 3600 * 16_000)
    with pytest.raises(LimitError, match="audio of 3600 s: at most 600 s"):
        decode_audio(bytes(encoded))
