"""Picture files, as cameras, phones and others make them."""
import contextlib
import io
import re
import sys
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, features

from formats.files import InputError, guard

# What is taken for a picture: of Pillow's other formats some call programs (EPS), most hold no photographs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") + (("AVIF",) if features.check("avif") else ())

MOST_SCANS = 100  # of a JPEG; progressive ones have about 10, and each goes over the whole picture
MOST_LOOKED_AT = 1 << 28  # bytes of a JPEG, in which its scans are counted; no photograph has more
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a JPEG's segments; coded data has none of these


def rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, upright as its EXIF says, white behind what is transparent. Greys of 16 bits,
    which Pillow would clip at 255, are scaled instead, and those from 0 to 1. Raises InputError where the
    file, which Pillow reads no sooner, is broken."""
    with guard(getattr(picture, "filename", "") or "picture", "broken picture"):
        picture.load()  # what is broken here is the picture, not its EXIF
        with contextlib.suppress(Exception):  # broken EXIF costs the rotation alone
            if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            picture = picture.convert("F")
            top = picture.getextrema()[1]
            if top > 255:
                scale = 1 / 257
            elif top < 2:  # from 0 to 1, or a little above
                scale = 255
            else:
                scale = 1
            picture = picture.point(lambda v: v * scale).convert("L")
        elif "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def scans(content: bytes) -> int:
    """Counts the scans of a JPEG file without decoding it."""
    count = 0
    at = 2
    while marker := MARKER.search(content, at):
        kind = marker[0][1]
        if kind == 0xd9:  # the end; a phone may add a video behind it
            break
        count += kind == 0xda
        at = marker.end() + int.from_bytes(content[marker.end():marker.end() + 2], "big")
    return count


def open_picture(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Reads a picture file ("-": standard input), or the `content` of one, and makes it RGB, upright. Of an
    animation, reads the first picture alone. Raises InputError, also above `PIL.Image.MAX_IMAGE_PIXELS`
    (89 million) and for a JPEG of more than MOST_SCANS scans."""
    limit = Image.MAX_IMAGE_PIXELS
    with guard(path, "broken picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of faults that Pillow reads past
        if path == "-":
            content = sys.stdin.buffer.read()
        try:
            picture = Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
        except FileNotFoundError:
            raise InputError(f"{path}: no such picture") from None
        except Image.UnidentifiedImageError:
            raise InputError(f"{path}: not a picture") from None
        except Image.DecompressionBombError:  # Pillow's own limit is twice as high
            raise InputError(f"{path}: too large: more than {limit / 5e5:.0f} megapixels, the limit is "
                             f"{limit / 1e6:.0f}") from None
        with picture:
            pixels = picture.width * picture.height
            if picture.format == "TIFF":  # a tile, which is unpacked whole, may be larger than the picture
                pixels = max(pixels, picture.tag_v2.get(322, 0) * picture.tag_v2.get(323, 0))
            if pixels > limit:
                raise InputError(f"{path}: too large: {pixels / 1e6:.0f} megapixels, the limit is "
                                 f"{limit / 1e6:.0f}")
            if picture.format in ("JPEG", "MPO"):
                picture.fp.seek(0)
                if (count := scans(picture.fp.read(MOST_LOOKED_AT))) > MOST_SCANS:
                    raise InputError(f"{path}: too slow to read: a JPEG of {count:,} scans, the limit is "
                                     f"{MOST_SCANS}")
            return rgb(picture)
