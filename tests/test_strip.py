import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from PIL import ExifTags, Image

from data.decode import AudioError, decode_audio, decode_image
from data.strip import StripError, sniff, strip

SECRETS = (b"SECRET-CAMERA", b"SECRET-ARTIST", b"SECRET-PROFILE", b"SECRET-TRAILER", b"GPS")
IMAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}),
    ("PNG", "P", {}),
    ("PNG", "LA", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
]
SOUNDS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "ULAW"),
    ("WAVEX", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]


def picture(format_: str, mode: str, orientation: int | None = 6, **options: Any) -> bytes:
    """An image with camera, position, artist, profile and bytes behind its end."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SECRET-CAMERA"
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 8.0, 14.0), 0x1D: "GPS-SECRET"}
    file = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(
        file,
        format_,
        exif=exif.tobytes(),
        icc_profile=b"SECRET-PROFILE" * 9,
        xmp=b"<x:xmpmeta>SECRET-ARTIST</x:xmpmeta>",
        comment=b"SECRET-ARTIST",
        **options,
    )
    return file.getvalue() + b"SECRET-TRAILER"


def sound(format_: str, subtype: str | None = None, endian: str = "FILE") -> bytes:
    """A sound with an artist and, in Vorbis, a comment of more than one page."""
    samples = np.random.default_rng(0).standard_normal((9000, 2)) * 0.1
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 48_000, 2, format=format_, subtype=subtype, endian=endian) as writer:
        writer.title = "SECRET-ARTIST"
        writer.comment = "SECRET-CAMERA" * (6000 if subtype == "VORBIS" else 10)
        writer.write(samples)
    return file.getvalue()


def assert_bare(stripped: bytes) -> None:
    assert [secret for secret in SECRETS if secret in stripped] == []


def samples_of(content: bytes) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = soundfile.read(io.BytesIO(content), always_2d=True)[0]
    return values


@pytest.mark.parametrize(("format_", "mode", "options"), IMAGES)
def test_images_keep_their_pixels_and_orientation_and_nothing_else(
    format_: str, mode: str, options: dict[str, Any]
) -> None:
    given = picture(format_, mode, **options)
    stripped = strip(given, str(sniff(given)))

    assert b"SECRET-CAMERA" in given
    assert_bare(stripped)
    with Image.open(io.BytesIO(given)) as before, Image.open(io.BytesIO(stripped)) as after:
        assert after.mode == before.mode
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
        assert dict(after.getexif()) == {ExifTags.Base.Orientation: 6}
        assert "icc_profile" not in after.info
    np.testing.assert_array_equal(decode_image(stripped), decode_image(given))
    assert strip(stripped, str(sniff(stripped))) == stripped


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 9])
def test_upright_images_keep_no_exif(format_: str, orientation: int | None) -> None:
    given = picture(format_, "RGB", orientation)
    stripped = strip(given, str(sniff(given)))
    assert b"Exif" not in stripped
    assert b"eXIf" not in stripped
    assert b"EXIF" not in stripped
    with Image.open(io.BytesIO(stripped)) as image:
        assert "exif" not in image.info
    np.testing.assert_array_equal(decode_image(stripped), decode_image(given))


@pytest.mark.parametrize(("orientation", "flags"), [(None, 0), (6, 0x08)])
def test_the_header_of_a_webp_announces_what_is_left(orientation: int | None, flags: int) -> None:
    given = picture("WEBP", "RGB", orientation)
    assert given[12:16] == b"VP8X"
    assert given[20] == 0x2C  # profile, EXIF and XMP
    assert strip(given, "webp")[20] == flags


def test_a_chunk_that_reaches_behind_the_end_of_a_webp_is_refused() -> None:
    given = picture("WEBP", "RGB")
    with pytest.raises(StripError, match="XMP ' at byte"):
        strip(given[:4] + struct.pack("<I", len(given) - 8 - len(b"SECRET-TRAILER") - 4) + given[8:], "webp")


def test_damaged_exif_goes_and_the_picture_stays() -> None:
    given = picture("JPEG", "RGB")
    at = given.index(b"Exif\0\0") + 6
    damaged = given[:at] + b"\xff" * 40 + given[at + 40 :]
    stripped = strip(damaged, "jpg")
    assert_bare(stripped)
    np.testing.assert_array_equal(decode_image(stripped), decode_image(strip(picture("JPEG", "RGB", 1), "jpg")))


def test_exif_behind_the_pixels_of_a_png_turns_it() -> None:
    given = picture("PNG", "RGB").removesuffix(b"SECRET-TRAILER")
    at = given.index(b"eXIf") - 4
    end = at + 12 + struct.unpack_from(">I", given, at)[0]
    moved = given[:at] + given[end:-12] + given[at:end] + given[-12:]
    assert strip(moved, "png") == strip(given, "png")


def test_text_chunks_of_png_go_wherever_they_stand() -> None:
    given = picture("PNG", "RGB", None).removesuffix(b"SECRET-TRAILER")
    text = b"tEXtAuthor\0SECRET-ARTIST"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    given = given[:33] + chunk + given[33:-12] + chunk + given[-12:]
    assert_bare(strip(given, "png"))
    np.testing.assert_array_equal(decode_image(strip(given, "png")), decode_image(given))


def test_thumbnail_comment_and_second_picture_of_a_jpeg_go() -> None:
    given = picture("JPEG", "RGB", None)
    jfif = b"JFIF\0\1\1\0\0\1\0\1\1\1SEC"  # a thumbnail of one pixel
    thumbnail = b"\xff\xe0" + struct.pack(">H", len(jfif) + 2) + jfif
    comment = b"\xff\xfe" + struct.pack(">H", 15) + b"SECRET-ARTIST"
    scan = given.index(b"\xff\xda")
    many = given[:scan] + thumbnail + comment + given[scan:] + given
    stripped = strip(many, "jpg")
    assert_bare(stripped)
    assert b"SEC" not in stripped
    assert stripped.count(b"\xff\xd9") == 1
    np.testing.assert_array_equal(decode_image(stripped), decode_image(given))


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_animations_stay(format_: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, format_, save_all=True, append_images=frames[1:], lossless=True, xmp=b"SECRET-ARTIST")
    stripped = strip(file.getvalue(), format_.lower())
    assert_bare(stripped)
    with Image.open(io.BytesIO(stripped)) as image:
        assert getattr(image, "n_frames", 1) == 3
        image.seek(2)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("format_", "subtype"), SOUNDS)
def test_sounds_keep_their_samples_and_no_tags(format_: str, subtype: str) -> None:
    given = sound(format_, subtype)
    extension = str(sniff(given))
    stripped = strip(given, extension)

    assert b"SECRET-ARTIST" in given
    assert_bare(stripped)
    assert b"libsndfile" not in stripped
    np.testing.assert_array_equal(samples_of(stripped), samples_of(given))
    np.testing.assert_array_equal(decode_audio(stripped).samples, decode_audio(given).samples)
    assert strip(stripped, extension) == stripped


def test_big_endian_wav() -> None:
    given = sound("WAV", "PCM_16", endian="BIG")
    assert given.startswith(b"RIFX")
    stripped = strip(given, "wav")
    assert_bare(stripped)
    np.testing.assert_array_equal(samples_of(stripped), samples_of(given))


@pytest.mark.parametrize("announced", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_that_was_written_to_a_pipe_gets_its_length(announced: int) -> None:
    samples = np.arange(500, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    whole = strip(file.getvalue(), "wav")
    at = whole.index(b"data")
    opened = (
        whole[:4] + struct.pack("<I", announced) + whole[8 : at + 4] + struct.pack("<I", announced) + whole[at + 8 :]
    )
    assert strip(opened, "wav") == whole


@pytest.mark.parametrize(("format_", "subtype"), [kind for kind in SOUNDS if "WAV" in kind[0]])
def test_bytes_behind_the_format_of_a_wav_go(format_: str, subtype: str) -> None:
    plain = strip(sound(format_, subtype), "wav")
    at = plain.index(b"fmt ")
    (length,) = struct.unpack_from("<I", plain, at + 4)
    known = plain[at + 8 : at + 8 + length]
    for announced in ((), (length - 18 + 14,)) if length >= 18 else ((), (0,), (14,)):
        # Perhaps the chunk says itself that more follows.
        begin = known if not announced else known[:16] + struct.pack("<H", *announced) + known[18:]
        chunk = b"fmt " + struct.pack("<I", len(begin) + 14) + begin + b"SECRET-CAMERA\0"
        stripped = strip(plain[:at] + chunk + plain[at + 8 + length :], "wav")
        assert_bare(stripped)
        np.testing.assert_array_equal(samples_of(stripped), samples_of(plain))


def test_bytes_behind_the_number_of_samples_of_a_wav_go() -> None:
    plain = strip(sound("WAV", "FLOAT"), "wav")
    at = plain.index(b"fact")
    more = plain[: at + 4] + struct.pack("<I", 18) + plain[at + 8 : at + 12] + b"SECRET-CAMERA\0" + plain[at + 12 :]
    assert strip(more, "wav") == plain


@pytest.mark.parametrize("announced", [0, 0x7FFFF000, 0xFFFFFFFF])
@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize("padded", [True, False])
def test_tags_behind_sound_of_open_length_go(announced: int, endian: str, padded: bool) -> None:
    order = "<" if endian == "LITTLE" else ">"
    file = io.BytesIO()
    # Sound in which the name of a chunk comes up by chance.
    soundfile.write(file, np.frombuffer(b"LIST\3\1\0\0abcd" * 50, np.int16), 16_000, format="WAV", endian=endian)
    plain = strip(file.getvalue(), "wav")
    at = plain.index(b"data")
    size = struct.pack(f"{order}I", announced)
    opened = plain[:4] + size + plain[8 : at + 4] + size + plain[at + 8 :]
    tags = [b"LIST" + struct.pack(f"{order}I", 12) + b"INFOSECRET--", b"id3 " + struct.pack(f"{order}I", 13)]
    tagged = opened + b"".join(tags) + b"SECRET-CAMERA" + b"\0" * padded
    assert strip(tagged, "wav") == plain
    np.testing.assert_array_equal(decode_audio(tagged).samples, decode_audio(plain).samples)


def test_a_wav_without_sound_stays_so() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(0, np.int16), 16_000, format="WAV")
    plain = strip(file.getvalue(), "wav")
    more = plain[8:] + b"ours" + struct.pack("<I", 14) + b"SECRET-CAMERA\0"
    assert strip(b"RIFF" + struct.pack("<I", len(more)) + more, "wav") == plain


def test_tags_in_front_of_and_behind_flac_go() -> None:
    plain = strip(sound("FLAC"), "flac")
    id3 = b"ID3\4\0\0" + bytes((0, 0, 2, 1)) + b"SECRET-ARTIST".ljust(257, b"\0")
    ape = b"SECRET-ARTIST" + b"APETAGEX" + struct.pack("<IIII", 2000, 13 + 32, 1, 0) + bytes(8)
    tagged = id3 + plain + ape + b"TAG" + b"SECRET-ARTIST".ljust(125)
    assert sniff(tagged) == "flac"
    assert strip(tagged, "flac") == plain


@pytest.mark.parametrize("frames", [1, 100, 9000])
def test_any_bytes_behind_flac_go(frames: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).standard_normal((frames, 2)) * 0.1, 48_000, format="FLAC")
    plain = strip(file.getvalue(), "flac")
    np.testing.assert_array_equal(samples_of(plain), samples_of(file.getvalue()))
    for trailer in (b"S", b"SECRET-TRAILER" * 50, bytes(500), b"\xff\xf8\xc9\xa8" * 9, plain):
        assert strip(plain + trailer, "flac") == plain


def test_a_cut_flac_is_not_made_to_look_whole() -> None:
    plain = strip(sound("FLAC"), "flac")
    for length in (len(plain) - 1, len(plain) - 2000, len(plain) // 2):
        with pytest.raises(AudioError):
            decode_audio(strip(plain[:length], "flac"))


def test_a_cover_picture_in_flac_goes() -> None:
    plain = strip(sound("FLAC"), "flac")
    cover = b"SECRET-ARTIST" * 100
    last = struct.pack(">I", 0x80000000 | 6 << 24 | len(cover)) + cover
    stream_info = b"\0" + plain[5:42]  # no longer the last block
    assert strip(b"fLaC" + stream_info + last + plain[42:], "flac") == plain


def test_chained_and_mixed_ogg_are_refused() -> None:
    one = sound("OGG", "VORBIS")
    with pytest.raises(StripError, match="another stream"):
        strip(one + one, "ogg")
    second = one.index(b"OggS", 4)
    with pytest.raises(StripError, match="another stream"):
        strip(one[:second] + strip(sound("OGG", "OPUS"), "ogg"), "ogg")


def test_a_damaged_ogg_page_is_not_made_to_look_whole() -> None:
    given = bytearray(sound("OGG", "VORBIS"))
    given[-100] ^= 1
    with pytest.raises(StripError, match="checksum"):
        strip(bytes(given), "ogg")


def test_an_ogg_that_lacks_a_page_is_not_made_to_look_whole() -> None:
    given = sound("OGG", "VORBIS")
    pages = [at for at in range(len(given)) if given.startswith(b"OggS", at)]
    with pytest.raises(StripError, match="missing"):
        strip(given[: pages[-2]] + given[pages[-1] :], "ogg")


def test_files_that_end_too_early_are_refused_or_undecodable() -> None:
    files = [picture("PNG", "RGB"), picture("WEBP", "RGB"), *(sound(*kind) for kind in SOUNDS)]
    for given in files:
        extension = str(sniff(given))
        for length in (13, 30, len(given) // 2):
            try:
                stripped = strip(given[:length], extension)
            except StripError:
                continue
            with pytest.raises(ValueError):
                (decode_image if extension in ("png", "webp") else decode_audio)(stripped)


def test_a_cut_wav_is_not_made_to_look_whole() -> None:
    with pytest.raises(StripError, match=r"announces 36000 bytes, \d+ follow"):
        strip(sound("WAV", "PCM_16")[:-5000], "wav")


@pytest.mark.parametrize(
    ("start", "extension"),
    [
        (b"GIF89a", "gif"),
        (b"ID3\4\0\0\0\0\0\0", "mp3"),
        (b"\xff\xfb\x90", "mp3"),
        (b"\0\0\0\x1cftypavif", "avif"),
        (b"\0\0\0\x1cftypisom", "mp4"),
        (b"RIFF\0\0\0\0AVI ", "avi"),
        (b"FORM\0\0\0\0AIFF", "aiff"),
        (b"<!DOCTYPE html>", "html"),
        (b"\0\0", None),
        (b"", None),
        (b"RIFF", None),
    ],
)
def test_other_formats_are_named(start: bytes, extension: str | None) -> None:
    assert sniff(start) == extension
