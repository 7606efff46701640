"""What a file is by its first bytes, and the same file without what was written beside its pixels or sound.

EXIF (with its GPS position and camera), XMP, IPTC, comments, ID3 and Vorbis tags, pictures inside of sound files,
colour profiles (decoders here ignore them, and they may carry the name of a display) and whatever follows the end of
the file are left out, part by part, by a list of parts to keep: compressed pixels and sound keep their bytes. Of EXIF
the orientation survives where there is one, or pictures would turn.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import ExifTags, Image

from data.decode import (
    IMAGE_FORMATS,
    MAX_PIXELS,
    OGG_FIRST,
    OGG_LAST,
    DecodeError,
    OggPage,
    decode_audio,
    ogg_checksum,
    ogg_pages,
    orientation,
    wav_chunks,
)

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\xff\xfb", "mp3"),
    (b"\xff\xf3", "mp3"),
    (b"\xff\xf2", "mp3"),
    (b"RF64", "rf64"),
    (b"%PDF", "pdf"),
    (b"PK\3\4", "zip"),
    (b"<!", "html"),
    (b"<h", "html"),
    (b"<svg", "svg"),
)
_CONTAINERS = {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi", b"AIFF": "aiff", b"AIFC": "aiff"}
_BRANDS = {b"avif": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"M4A ": "m4a"}


class StripError(ValueError):
    """A file whose parts can't be told apart; says where."""


def sniff(content: bytes) -> str | None:
    """The usual extension of the format that ``content`` begins like, such as ``jpg`` or ``gif``; None if unknown."""
    if content[:4] in (b"RIFF", b"RIFX", b"FORM"):
        return _CONTAINERS.get(content[8:12])
    if content[4:8] == b"ftyp":
        return _BRANDS.get(content[8:12], "mp4")
    if content.startswith(b"ID3"):  # in front of MP3 by custom, but some tools put it in front of FLAC
        return "flac" if content.startswith(b"fLaC", _id3_size(content)) else "mp3"
    return next((extension for start, extension in _SIGNATURES if content.startswith(start)), None)


def strip(content: bytes, extension: str) -> bytes:
    """``content`` without metadata; pixels and samples decode to the same values.

    Args:
        content: a file of the format ``extension``, as `sniff` says.
        extension: ``jpg jpeg png webp wav flac ogg``. Of others there is nothing to strip, and they come back.

    Raises:
        StripError: the file ends too early, or isn't made as its format demands.
    """
    return _STRIPPERS[extension](content) if extension in _STRIPPERS else content


def _turned(content: bytes) -> int | None:
    """How EXIF says that the picture is to be turned, 2..8; None if it is upright, or there is no readable EXIF."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None  # no decoder takes it
                if "exif" not in image.info:  # a PNG's may stand behind its pixels
                    image.load()
                found = orientation(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return found if found > 1 else None


def _minimal_exif(turned: int) -> bytes:
    """A TIFF header and a directory of one entry."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ExifTags.Base.Orientation, 3, 1, turned, 0, 0)


# JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annex B

_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
_JPEG_KEPT = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)}  # frames, tables, scans; neither APPn nor comments
_JPEG_BARE = {0x00, 0x01, *range(0xD0, 0xD9)}  # no length follows; between segments they mean nothing
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _strip_jpeg(content: bytes) -> bytes:
    head, body, tagged = [bytes((0xFF, _SOI))], [], False
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 1 < len(content):
        marker = content[position + 1]
        if marker == 0xFF:  # any number of these may stand before a marker
            position += 1
            continue
        if marker == _EOI:
            body.append(bytes((0xFF, _EOI)))
            break
        if marker in _JPEG_BARE:
            position += 2
            continue
        (length,) = _unpack(">H", content, position + 2, "JPEG")
        end = position + 2 + length
        if length < 2 or end > len(content):
            raise StripError(f"JPEG: segment at byte {position} reaches to byte {end} of {len(content)}")
        payload = content[position + 4 : end]
        if marker in _JPEG_KEPT:
            body.append(content[position:end])
        elif marker == _APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
            head[1:] = [_jpeg_segment(_APP0, payload[:12] + b"\0\0")]  # without its thumbnail
        elif marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
            body.append(_jpeg_segment(_APP14, payload[:12]))  # says how colours are encoded
        tagged |= marker == _APP1
        position = end
        if marker == _SOS:
            found = _JPEG_SCAN_END.search(content, end)
            position = found.start() if found else len(content)
            body.append(content[end:position])
    if tagged and (turned := _turned(content)):
        head.append(_jpeg_segment(_APP1, b"Exif\0\0" + _minimal_exif(turned)))
    return b"".join(head + body)


def _jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


# PNG: https://www.w3.org/TR/png-3/

_PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"sBIT", b"bKGD", b"pHYs"}
_PNG_KEPT |= {b"acTL", b"fcTL", b"fdAT"}  # animation


def _strip_png(content: bytes) -> bytes:
    kept, tagged = [content[:8]], False
    position, kind = 8, b""
    while kind != b"IEND":
        (length,) = _unpack(">I4x", content, position, "PNG")
        kind = content[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(content):
            raise StripError(f"PNG: chunk {kind!r} at byte {position} reaches to byte {end} of {len(content)}")
        if kind in _PNG_KEPT:
            kept.append(content[position:end])
        tagged |= kind == b"eXIf"
        position = end
    if tagged and (turned := _turned(content)):
        kept.insert(2, _png_chunk(b"eXIf", _minimal_exif(turned)))
    return b"".join(kept)


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


# RIFF: WebP (https://developers.google.com/speed/webp/docs/riff_container) and WAV

_WEBP_KEPT = {b"VP8 ", b"VP8L", b"ALPH", b"ANIM"}
_WEBP_PROFILE, _WEBP_EXIF, _WEBP_XMP = 0x20, 0x08, 0x04
_PCM, _MS_ADPCM = 1, 2
# Kind of sound -> bytes that follow its two bytes for their number: float, A-law, µ-law, IMA ADPCM, GSM, extensible.
_WAV_EXTRA = {3: 0, 6: 0, 7: 0, 0x11: 2, 0x31: 2, 0xFFFE: 22}


class _Chunk(NamedTuple):
    kind: bytes
    payload: bytes

    def packed(self, order: str = "<") -> bytes:
        return self.kind + struct.pack(f"{order}I", len(self.payload)) + self.payload + b"\0" * (len(self.payload) % 2)


def _chunks(content: bytes, start: int, end: int) -> Iterator[_Chunk]:
    """The chunks of a WebP between two positions."""
    content, position = content[:end], start
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", content, position)
        position += 8
        yield _chunk(kind, content, position, length)
        position += length + length % 2


def _chunk(kind: bytes, content: bytes, start: int, length: int) -> _Chunk:
    if start + length > len(content):
        there = len(content) - start
        raise StripError(f"RIFF: {kind!r} at byte {start - 8} announces {length} bytes, {there} follow")
    return _Chunk(kind, content[start : start + length])


def _strip_webp(content: bytes) -> bytes:
    end = _unpack("<I", content, 4, "WebP")[0] + 8
    if end > len(content):
        raise StripError(f"WebP: announces {end} bytes, holds {len(content)}")
    kept, tagged = [], False
    for chunk in _chunks(content, 12, end):
        if chunk.kind in _WEBP_KEPT or chunk.kind == b"VP8X":
            kept.append(chunk)
        elif chunk.kind == b"ANMF":  # a frame: 16 bytes about its place, then chunks of its own
            frame = [
                inner.packed() for inner in _chunks(chunk.payload, 16, len(chunk.payload)) if inner.kind in _WEBP_KEPT
            ]
            kept.append(_Chunk(b"ANMF", chunk.payload[:16] + b"".join(frame)))
        tagged |= chunk.kind == b"EXIF"
    if kept and kept[0].kind == b"VP8X" and kept[0].payload:  # the extended header; without it there is no EXIF
        flags = kept[0].payload[0] & ~(_WEBP_PROFILE | _WEBP_EXIF | _WEBP_XMP)
        if tagged and (turned := _turned(content)):
            flags |= _WEBP_EXIF
            kept.append(_Chunk(b"EXIF", _minimal_exif(turned)))
        kept[0] = _Chunk(b"VP8X", bytes((flags,)) + kept[0].payload[1:])
    body = b"WEBP" + b"".join(chunk.packed() for chunk in kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_wav(content: bytes) -> bytes:
    order = ">" if content.startswith(b"RIFX") else "<"
    kept = []
    for kind, start, length in wav_chunks(content):
        chunk = _chunk(kind, content, start, length)
        if kind == b"fmt ":
            kept.append(_Chunk(kind, _wav_format(chunk.payload, order)))
        elif kind == b"fact":
            kept.append(_Chunk(kind, chunk.payload[:4]))  # number of samples
        elif kind == b"data":
            kept.append(chunk)
            break
    else:
        raise StripError("WAV: holds no sound")
    body = b"WAVE" + b"".join(chunk.packed(order) for chunk in kept)
    return content[:4] + struct.pack(f"{order}I", len(body)) + body


def _wav_format(payload: bytes, order: str) -> bytes:
    """What a ``fmt`` chunk says of its kind of sound, without other bytes that were put behind it."""
    kind = _unpack(f"{order}H", payload, 0, "WAV")[0]
    if kind == _PCM or len(payload) < 18:
        return payload[:16]
    announced = _unpack(f"{order}H", payload, 16, "WAV")[0]
    if kind == _MS_ADPCM:  # a length, a number of pairs of coefficients, and these
        announced = 4 + 4 * _unpack(f"{order}H", payload, 20, "WAV")[0]
    extra = payload[18 : 18 + _WAV_EXTRA.get(kind, announced)]
    return payload[:16] + struct.pack(f"{order}H", len(extra)) + extra


# FLAC: RFC 9639

_FLAC_STREAMINFO, _FLAC_SEEKTABLE = 0, 3
_FLAC_LAST = 0x80


def _strip_flac(content: bytes) -> bytes:
    position = (_id3_size(content) if content.startswith(b"ID3") else 0) + 4
    kept: list[tuple[int, bytes]] = []
    last = False
    while not last:
        (header,) = _unpack(">I", content, position, "FLAC")
        kind, length, last = header >> 24 & 0x7F, header & 0xFFFFFF, bool(header >> 31)
        end = position + 4 + length
        if end > len(content):
            raise StripError(f"FLAC: block at byte {position} reaches to byte {end} of {len(content)}")
        if kind in (_FLAC_STREAMINFO, _FLAC_SEEKTABLE):
            kept.append((kind, content[position + 4 : end]))
        position = end
    if not kept:
        raise StripError("FLAC: no stream info")
    blocks = [
        struct.pack(">I", (kind | (_FLAC_LAST if number == len(kept) else 0)) << 24 | len(block)) + block
        for number, (kind, block) in enumerate(kept, 1)
    ]
    return _without_trailer(b"".join([b"fLaC", *blocks, content[position:]]))


def _id3_size(content: bytes) -> int:
    """Bytes of the ID3v2 tag that ``content`` begins with."""
    (flags, *digits) = _unpack(">B4B", content, 5, "ID3")
    size = 0
    for digit in digits:  # of 7 bits each
        size = size << 7 | digit & 0x7F
    return size + (20 if flags & 0x10 else 10)


def _without_trailer(flac: bytes) -> bytes:
    """``flac`` up to the end of its last frame; as it is if it can't be decoded.

    Frames don't say how long they are, but with less than all of the last one the sound isn't whole.
    """
    if not _decodes(flac[:-1]):
        return flac
    less, enough = 0, len(flac) - 1
    while less + 1 < enough:
        middle = (less + enough) // 2
        less, enough = (less, middle) if _decodes(flac[:middle]) else (middle, enough)
    return flac[:enough]


def _decodes(content: bytes) -> bool:
    try:
        decode_audio(content)
    except DecodeError:
        return False
    return True


# Ogg: RFC 3533, with Vorbis or Opus (RFC 7845) in it

_VORBIS, _OPUS = b"\x01vorbis", b"OpusHead"  # what the first packet begins with
_NO_COMMENTS = bytes(8)  # an encoder without a name, and no comments


def _strip_ogg(content: bytes) -> bytes:
    pages = _ogg_stream(content)
    (first, _, *setup), used = _ogg_headers(pages)
    bare = b"OpusTags" + _NO_COMMENTS if first.startswith(_OPUS) else b"\x03vorbis" + _NO_COMMENTS + b"\1"
    stream = pages[0].stream
    headers = [_header_page([first], stream, OGG_FIRST), _header_page([bare, *setup], stream, 0)]
    return b"".join(_packed(page, number) for number, page in enumerate([*headers, *pages[used:]]))


def _ogg_stream(content: bytes) -> list[OggPage]:
    """The pages of the one stream in ``content``; what follows its last page is left out."""
    pages: list[OggPage] = []
    try:
        for page in ogg_pages(content):
            if pages and (page.stream != pages[0].stream or pages[-1].flags & OGG_LAST):
                raise StripError(f"Ogg: another stream begins at byte {page.at}: only files with a single one are read")
            pages.append(page)
    except DecodeError as error:
        raise StripError(str(error)) from error
    return pages


def _packed(page: OggPage, number: int) -> bytes:
    header = struct.pack("<4sBBQII", b"OggS", 0, page.flags, page.position, page.stream, number)
    rest = bytes((len(page.lengths),)) + page.lengths + page.payload
    return header + struct.pack("<I", ogg_checksum(header + bytes(4) + rest)) + rest


def _ogg_headers(pages: list[OggPage]) -> tuple[list[bytes], int]:
    """The packets before the sound (what it is, comments, and Vorbis's code books), and how many pages they fill."""
    packets: list[bytes] = []
    packet = bytearray()
    for number, page in enumerate(pages, 1):
        at = 0
        for length in page.lengths:
            packet += page.payload[at : at + length]
            at += length
            if length < 255:
                packets.append(bytes(packet))
                packet.clear()
        if packets and not packets[0].startswith((_VORBIS, _OPUS)):
            raise StripError("Ogg: holds neither Vorbis nor Opus")
        expected = 2 if packets and packets[0].startswith(_OPUS) else 3
        if len(packets) > expected or (len(packets) == expected and packet):
            raise StripError("Ogg: its headers share a page with the sound")
        if len(packets) == expected:
            return packets, number
    raise StripError("Ogg: ends before its sound")


def _header_page(packets: list[bytes], stream: int, flags: int) -> OggPage:
    """One page with ``packets``, of which none goes on in the next."""
    lengths = b"".join(b"\xff" * (len(packet) // 255) + bytes((len(packet) % 255,)) for packet in packets)
    if len(lengths) > 255:  # code books of 64 kB, where a few are usual
        raise StripError("Ogg: its headers are too long for a page")
    return OggPage(0, flags, 0, stream, lengths, b"".join(packets))


def _unpack(layout: str, content: bytes, position: int, name: str) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, content, position)
    except struct.error as error:
        raise StripError(f"{name}: ends at byte {len(content)}, in the middle") from error


_STRIPPERS = {
    "jpg": _strip_jpeg,
    "jpeg": _strip_jpeg,
    "png": _strip_png,
    "webp": _strip_webp,
    "wav": _strip_wav,
    "flac": _strip_flac,
    "ogg": _strip_ogg,
}
