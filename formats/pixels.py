"""Pictures to pixels, as preprocessor_config.json says."""
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from formats.files import InputError, guard, warn
from formats.pictures import rgb
from formats.weights import Checkpoint

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
OPENAI = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
# preprocessor_config.json's image_processor_type -> the reference's values for missing keys.
# `edges`: the edges that get the length of a `size` that is a plain number; height and width if missing
PROCESSORS = {
    "ViT": dict(resample=2),
    "DeiT": dict(resample=3, do_center_crop=True),
    "CLIP": dict(resample=3, do_center_crop=True, edges=("shortest_edge",), **OPENAI),
    "Bit": dict(resample=3, do_center_crop=True, edges=("shortest_edge",), **OPENAI),
    "Siglip": dict(resample=3),
    "Siglip2": dict(resample=2),
    "Blip": dict(resample=3, **OPENAI),
    **dict.fromkeys(("Idefics3", "SmolVLM"), dict(
        resample=1, edges=("longest_edge",), size=4 * 364, max_image_size=dict(longest_edge=364),
        do_image_splitting=True)),
    "GotOcr2": dict(resample=3, size=384, do_image_splitting=True, min_patches=1, max_patches=12, **OPENAI),
    "nanoVLM": dict(resample=2, do_normalize=False),
    "Sam": dict(resample=2, do_pad=True, edges=("longest_edge",), **IMAGENET),
}


class Preprocessor:
    """Turns a picture of any size and mode into pixels (3,S,S) float32, as preprocessor_config.json
    (`settings`) says.

    S is `image_size` or, if that is None, the size in the settings, else `default`. An `image_size` scales
    all lengths in the settings alike, so that the same part of the picture is seen: if they resize to 256 px
    and crop to 224, S = 448 resizes to 512 and crops to 448. In a family with tiles (`has_tiles`), S is the
    side of a tile; see `tiles`. Raises ValueError if the settings don't make squares, or a length is
    above MOST.
    """
    MOST = 8192  # pixels

    def __init__(self, settings: dict, default: int, image_size: int | None = None):
        self.settings = settings
        self.mean = torch.tensor(settings.get("image_mean", [0.5] * 3), dtype=torch.float32).view(3, 1, 1)
        self.std = torch.tensor(settings.get("image_std", [0.5] * 3), dtype=torch.float32).view(3, 1, 1)
        self.factor = float(settings.get("rescale_factor", 1 / 255))
        self.resample = Image.Resampling(settings.get("resample", 2))
        square = ("height", "width")

        def lengths(key: str, edges: tuple[str, ...] = square) -> dict:
            value = settings.get(key, default)
            return dict.fromkeys(edges, value) if isinstance(value, int) else value  # a number in old files

        # The size to resize to, and the square in the end
        size = lengths("size", settings.get("edges", square))
        tile = settings.get("max_image_size", {}).get("longest_edge")
        if tile:
            last = dict.fromkeys(square, tile)
        elif settings.get("do_center_crop"):
            last = lengths("crop_size")
        elif settings.get("do_pad"):
            last = lengths("pad_size")
        else:
            last = size
        if not last.get("height") or last["height"] != last.get("width"):
            raise ValueError(f"{last} is not a square")

        # Scale all lengths so that the square's side is S
        self.image_size = image_size or last["height"]
        self.size = {edge: round(length * self.image_size / last["height"]) for edge, length in size.items()}
        edges = self.size.keys() & {"longest_edge", "shortest_edge"}
        if len(edges) > 1 or not edges and not set(square) <= self.size.keys():
            raise ValueError(f"{size} is no size")
        for length in [self.image_size] + list(self.size.values()):
            if not 0 < length <= self.MOST:
                raise ValueError(f"{length} px is not within 1 and {self.MOST}")

    @property
    def has_tiles(self) -> bool:
        return "max_image_size" in self.settings or "max_patches" in self.settings

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Turns a whole picture into pixels (3,S,S)."""
        settings = self.settings
        side = self.image_size
        picture = rgb(picture)
        if "max_image_size" in settings:
            return self.tiles(picture, split=False)[0][0]

        # Resize
        if settings.get("do_resize", True):
            w, h = self.resized(picture.width, picture.height)
            if w * h > self.MOST ** 2:  # for the sake of the square in its middle
                raise InputError(f"a picture of {picture.width} × {picture.height} px is too long and narrow")
            picture = picture.resize((w, h), self.resample)

        # Cut out the middle; outside the picture is black
        if settings.get("do_center_crop"):
            left = (picture.width - side) // 2
            top = (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))

        # Pad on the right and at the bottom with zeros, which are the mean
        x = self.pixels(picture)
        if settings.get("do_pad"):
            x = F.pad(x, (0, side - x.shape[2], 0, side - x.shape[1]))
        return x.contiguous()

    def resized(self, w: int, h: int) -> tuple[int, int]:
        """Returns the width and height, in pixels, to resize a picture of w × h to."""
        if "longest_edge" in self.size:
            scale = self.size["longest_edge"] / max(w, h)
            return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))
        if "shortest_edge" in self.size:
            shortest = self.size["shortest_edge"]
            return shortest * w // min(w, h), shortest * h // min(w, h)
        return self.size["width"], self.size["height"]

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """Returns an RGB picture's numbers (3,H,W), rescaled and normalised."""
        x = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        if self.settings.get("do_rescale", True):
            x = x * self.factor
        if self.settings.get("do_normalize", True):
            x = (x - self.mean) / self.std
        return x

    def visible(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (P,3,S,S) as colours from 0, black, to 1, white: undoes what `pixels` did."""
        black = self.pixels(Image.new("RGB", (1, 1), "black"))
        white = self.pixels(Image.new("RGB", (1, 1), "white"))
        return (pixels - black) / (white - black)

    def tiles(self, picture: Image.Image, split: bool = True) -> tuple[torch.Tensor, int, int]:
        """Returns the pixels (T,3,S,S) of all views of a picture, in the order of the prompt, and the numbers
        of rows and columns of tiles. These are 0 if the only view is the whole picture, as without `split`.

        Idefics3 and SmolVLM: the longest edge becomes `size`, then both edges are stretched to whole tiles;
        the whole picture comes last. nanoVLM (`upscale`): the longest edge becomes `size`, or, without
        `upscale`, no more than it takes to fill the tiles; the whole picture comes first. InternVL: as many
        tiles as `nearest_grid` says; the whole picture comes last.
        """
        settings = self.settings
        side = self.image_size
        if not self.has_tiles:
            return self(picture)[None], 0, 0
        nanovlm, intern = "upscale" in settings, "max_patches" in settings
        picture = shown = rgb(picture)
        longest = self.size.get("longest_edge")
        w, h = picture.size

        def oriented(longer: int, shorter: int) -> tuple[int, int]:
            return (longer, shorter) if w >= h else (shorter, longer)

        def whole_tiles(length: float) -> int:
            return max(1, math.ceil(length / side)) * side

        def shorter_edge(longer: int) -> int:  # as the reference rounds it
            return int(longer / (w / h) if w >= h else longer * (w / h))

        if not nanovlm and not intern:
            shorter = shorter_edge(longest)
            picture = picture.resize(oriented(longest, max(1, shorter + shorter % 2)), self.resample)
            w, h = picture.size
        if not split or not settings.get("do_image_splitting"):
            return self.pixels(picture.resize((side, side), self.resample))[None], 0, 0

        # Stretch to whole tiles
        if intern:
            size = tuple(count * side for count in self.nearest_grid(w, h))
        elif nanovlm:
            longer = longest if settings["upscale"] else min(longest, whole_tiles(max(w, h)))
            size = oriented(longer, whole_tiles(min(w, h) * (longer / max(w, h))))
        else:
            longer = whole_tiles(max(w, h))
            size = oriented(longer, whole_tiles(shorter_edge(longer)))
        picture = picture.resize(size, self.resample)

        # Cut into tiles
        x = self.pixels(picture)
        tiles = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (3,rows,S,columns,S)
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (T,3,S,S)
        if len(tiles) == 1:
            return tiles, 0, 0

        # Add the whole picture
        if nanovlm:
            whole = F.interpolate(x[None], (side, side), mode="bilinear", antialias=True)
            views = torch.cat([whole, tiles])
        else:
            whole = shown if intern else picture
            views = torch.cat([tiles, self.pixels(whole.resize((side, side), self.resample))[None]])
        return views, picture.height // side, picture.width // side

    def nearest_grid(self, w: int, h: int) -> tuple[int, int]:
        """The columns and rows of tiles, `min_patches` to `max_patches` of them, whose shape is nearest to
        that of a picture of w × h. Of two that are as near, the one with more tiles, unless the picture has
        less than half of their pixels."""
        least, most = self.settings["min_patches"], self.settings["max_patches"]
        grids = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if least <= x * y <= most]
        nearest, best = math.inf, (1, 1)
        for x, y in sorted(grids, key=math.prod):
            off = abs(w / h - x / y)
            if off < nearest or off == nearest and w * h > 0.5 * x * y * self.image_size ** 2:
                nearest, best = off, (x, y)
        return best


def read_preprocessor(checkpoint: Checkpoint, kind: str, default: int,
                      image_size: int | None = None) -> Preprocessor:
    """Reads the Preprocessor of a checkpoint. `kind` is a key of PROCESSORS, used if the files name none;
    `default` and `image_size`: see Preprocessor. Raises InputError."""
    # The settings are in config.json, preprocessor_config.json, or with others in processor_config.json
    path = checkpoint.folder / "preprocessor_config.json"
    settings = (checkpoint.config.get("image_processor") or checkpoint.json(path.name)
                or checkpoint.json("processor_config.json").get("image_processor") or {})

    # The family, from the name of the reference's class
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or kind
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(kind))
    if kind not in PROCESSORS:
        raise InputError(f"{path}: image processor {kind!r} is not one of {', '.join(PROCESSORS)}")

    with guard(path):
        preprocess = Preprocessor(PROCESSORS[kind] | settings, default, image_size)
    if not settings:
        mean = [round(x, 3) for x in preprocess.mean.flatten().tolist()]
        std = [round(x, 3) for x in preprocess.std.flatten().tolist()]
        warn(f"{checkpoint.folder}: no {path.name} with image settings: assuming {kind}'s, mean {mean}, "
             f"std {std}, size {preprocess.image_size} px")
    return preprocess
