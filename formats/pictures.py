"""Picture files, as cameras, phones and others make them."""
import contextlib
import io
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageOps, features

from formats.files import InputError, guard

# What is taken for a picture: of Pillow's other formats some call programs (EPS), most hold no photographs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") + (("AVIF",) if features.check("avif") else ())


def rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, white behind what is transparent. 16- and 32-bit greys, which Pillow would clip
    at 255, are scaled instead. Raises InputError where the file, which Pillow reads no sooner, is broken."""
    with guard(getattr(picture, "filename", "") or "picture", "broken picture"):
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            picture = picture.convert("F")
            top = picture.getextrema()[1]
            scale = 1 / 257 if top > 255 else 255 if top <= 1 else 1
            picture = picture.point(lambda v: v * scale).convert("L")
        elif "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def open_picture(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Reads a picture file ("-": standard input), or the `content` of one: upright as its EXIF says, in RGB.
    Raises InputError, also above `PIL.Image.MAX_IMAGE_PIXELS` (89 million)."""
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
            if pixels > limit:
                raise InputError(f"{path}: too large: {pixels / 1e6:.0f} megapixels, the limit is "
                                 f"{limit / 1e6:.0f}")
            picture.load()  # what is broken here is the picture, not its EXIF
            with contextlib.suppress(Exception):  # broken EXIF costs the rotation alone
                picture = ImageOps.exif_transpose(picture)
            return rgb(picture)
