"""The image encoder: picture → pixels → patch features. One `ViT` reads every family; see FAMILIES."""
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import ACTIVATIONS, FeedForward, attend, rgb
from formats.files import InputError, guard, named, warn
from formats.weights import Checkpoint, Family, depth, load_weights, name_table


@dataclass
class ViTConfig:
    image_size: int  # pixels, square
    patch_size: int
    width: int  # of the tokens in the blocks
    layers: int
    heads: int
    mlp: int  # hidden size of the feed-forward layers
    activation: str
    eps: float
    processor: str  # in PROCESSORS: whose preprocessing it is where preprocessor_config.json doesn't say
    class_tokens: int = 1  # learned tokens before the patches: 1, 2 (DeiT's distillation token) or 0
    registers: int = 0  # more of them, after the class token and without a position
    patch_bias: bool = True
    qkv_bias: bool = True
    gated: bool = False  # SwiGLU feed-forward layers
    layer_scale: bool = False  # on what each sublayer adds
    pre_norm: bool = False  # a norm before the first block
    post_norm: bool = True  # a norm after the last block
    antialias: bool = False  # in the interpolation of position embeddings
    window: int = 0  # side, in patches, of the windows that attention stays in; 0: the whole picture
    global_blocks: tuple[int, ...] = ()  # blocks without windows
    relative_positions: bool = False
    neck: int = 0  # channels after SAM's convolutional neck; 0: no neck

    def __post_init__(self):
        if self.image_size < self.patch_size or self.width % self.heads:
            raise ValueError(
                "image_size must be at least patch_size, hidden_size a multiple of num_attention_heads")
        if self.window > self.grid:
            raise ValueError(f"windows of {self.window} × {self.window} patches are larger than the picture")
        ACTIVATIONS[self.activation], depth(self.layers)

    @property
    def grid(self) -> int:
        """Patches along one side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Width of the features that the encoder gives."""
        return self.neck or self.width


def places(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """Where each of grid² tokens, row by row, stands in n² windows of window² tokens each: (grid²,)."""
    at, n = torch.arange(grid, device=device), -(-grid // window)
    of, inside = at // window, at % window
    return ((of[:, None] * n + of) * window ** 2 + inside[:, None] * window + inside).flatten()


class Attention(nn.Module):
    """Self-attention over all tokens or, with `window`, within square windows of the patches."""

    def __init__(self, config: ViTConfig, window: int):
        super().__init__()
        self.heads, self.grid, self.window = config.heads, config.grid, window
        self.side = window or config.grid
        self.q, self.k, self.v = (nn.Linear(config.width, config.width, config.qkv_bias) for _ in "qkv")
        self.out = nn.Linear(config.width, config.width)
        shape = 2 * self.side - 1, config.width // config.heads
        self.rows, self.columns = (nn.Parameter(torch.zeros(shape)) if config.relative_positions else None
                                   for _ in "yx")

    def bias(self, q):  # (B,H,N,hd) to (B,H,N,N)
        """Decomposed relative positions (Li et al., 2022, arXiv:2112.01526): q · (row + column distance)."""
        at = torch.arange(self.side, device=q.device)
        distance = at[:, None] - at + self.side - 1  # (side,side), none below 0
        q = q.unflatten(2, (self.side, self.side))  # (B,H,y,x,hd)
        rows = torch.einsum("bhyxd,ykd->bhyxk", q, self.rows[distance])
        columns = torch.einsum("bhyxd,xkd->bhyxk", q, self.columns[distance])
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    def forward(self, x):  # (B,N,D)
        B, D = len(x), x.shape[2]
        if self.window:
            place, n = places(self.grid, self.window, x.device), -(-self.grid // self.window)
            windows = x.new_zeros(B, (n * self.window) ** 2, D)  # zeros where a window leaves the picture
            windows[:, place] = x
            x = windows.view(B * n * n, -1, D)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q, self.k, self.v))  # (B,H,N,hd)
        x = attend(q, k, v, None if self.rows is None else self.bias(q)).transpose(1, 2).flatten(2)
        return self.out(x.reshape(B, -1, D)[:, place] if self.window else x)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    def __init__(self, config: ViTConfig, window: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attention = Attention(config, window)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = FeedForward(config.width, config.mlp, config.activation, gated=config.gated)
        self.scale1, self.scale2 = (
            LayerScale(config.width) if config.layer_scale else nn.Identity() for _ in "12")

    def forward(self, x):  # (B,N,D)
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class Neck(nn.Module):
    """SAM's neck: to fewer channels, then a 3×3 convolution over the patches, each with its norm."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.grid = config.grid
        self.reduce = nn.Linear(config.width, config.neck, bias=False)
        self.mix = nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(config.neck, 1e-6), nn.LayerNorm(config.neck, 1e-6)

    def forward(self, x):  # (B,N,D) to (B,N,C)
        x = self.norm1(self.reduce(x)).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B,C,G,G)
        return self.norm2(self.mix(x).flatten(2).transpose(1, 2))


class Preprocessor:
    """Pictures of any size and mode to pixels (3,S,S) float32, as preprocessor_config.json (`settings`) says.

    S is `image_size` where given, else what the settings make, `default` where they don't say. Another S than
    theirs scales all their lengths alike, so that the same part of the picture is seen: where they resize to
    256 px and crop to 224, S = 448 resizes to 512 and crops to 448. Where a family has tiles
    (`max_image_size`), these are the squares; see `tiles`. Raises ValueError where the settings don't make
    squares, or a length is above MOST.
    """
    MOST = 8192  # pixels

    def __init__(self, settings: dict, default: int, image_size: int | None = None):
        self.settings, square = settings, ("height", "width")
        self.mean, self.std = (torch.tensor(settings.get(key, [0.5] * 3), dtype=torch.float32).view(3, 1, 1)
                               for key in ("image_mean", "image_std"))
        self.factor = float(settings.get("rescale_factor", 1 / 255))
        self.resample = Image.Resampling(settings.get("resample", 2))

        def lengths(key: str, edges: tuple[str, ...] = square) -> dict:
            value = settings.get(key, default)
            return dict.fromkeys(edges, value) if isinstance(value, int) else value  # a number in old files

        size, tile = lengths("size", settings.get("edges", square)), settings.get("max_image_size", {})
        last = (dict.fromkeys(square, tile["longest_edge"]) if tile.get("longest_edge")
                else lengths("crop_size") if settings.get("do_center_crop")
                else lengths("pad_size") if settings.get("do_pad") else size)
        if not last.get("height") or last["height"] != last.get("width"):
            raise ValueError(f"{last} is not a square")
        self.image_size = image_size or last["height"]
        self.size = {edge: round(length * self.image_size / last["height"]) for edge, length in size.items()}
        if not any({*edges} <= self.size.keys() for edges in (["longest_edge"], ["shortest_edge"], square)):
            raise ValueError(f"{size} is no size")
        for length in (self.image_size, *self.size.values()):
            if not 0 < length <= self.MOST:
                raise ValueError(f"{length} px is not within 1 and {self.MOST}")

    def tiles(self, picture: Image.Image, split: bool = True) -> tuple[torch.Tensor, int, int]:
        """Pixels (T,3,S,S) of the views that a family has of a picture, in the order of its prompt, and the
        rows and columns of tiles among them: 0 and 0 where it is seen as a whole alone, as it is without
        `split`.

        Idefics3 and SmolVLM: the longest edge becomes `size`, then both are stretched to whole tiles; last
        comes the whole. nanoVLM (`upscale`): the longest edge becomes `size`, or if not `upscale` no more
        than it takes to fill its tiles; the whole comes first, where `whole` says that it comes.
        """
        p, side = self.settings, self.image_size
        if "max_image_size" not in p:
            return self(picture)[None], 0, 0
        picture, resample = rgb(picture), self.resample
        longest, (w, h) = self.size["longest_edge"], picture.size

        def oriented(longer: int, shorter: int) -> tuple[int, int]:
            return (longer, shorter) if w >= h else (shorter, longer)

        def tiled(length: float) -> int:
            return max(1, math.ceil(length / side)) * side

        def scaled(longer: int) -> int:  # the shorter edge, as the reference rounds it
            return int(longer / (w / h) if w >= h else longer * (w / h))

        if "upscale" not in p:
            shorter = scaled(longest)
            picture = picture.resize(oriented(longest, max(1, shorter + shorter % 2)), resample)
            w, h = picture.size
        if not split or not p.get("do_image_splitting"):
            return self.pixels(picture.resize((side, side), resample))[None], 0, 0
        if "upscale" in p:
            longer = longest if p["upscale"] else min(longest, tiled(max(w, h)))
            shorter = tiled(min(w, h) * (longer / max(w, h)))
        else:
            longer = tiled(max(w, h))
            shorter = tiled(scaled(longer))
        picture = picture.resize(oriented(longer, shorter), resample)
        x = self.pixels(picture)
        cut = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (3,rows,S,columns,S)
        cut = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (T,3,S,S)
        if len(cut) == 1:
            return cut, 0, 0
        if "upscale" in p:
            whole = F.interpolate(x[None], (side, side), mode="bilinear", antialias=True)
            views = [whole, cut] if p["whole"] else [cut]
        else:
            views = [cut, self.pixels(picture.resize((side, side), resample))[None]]
        return torch.cat(views), picture.height // side, picture.width // side

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """An RGB picture as it is to numbers (3,H,W)."""
        p = self.settings
        x = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        if p.get("do_rescale", True):
            x = x * self.factor
        if p.get("do_normalize", True):
            x = (x - self.mean) / self.std
        return x

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        p, picture, side = self.settings, rgb(picture), self.image_size
        if "max_image_size" in p:
            return self.tiles(picture, split=False)[0][0]
        if p.get("do_resize", True):
            if "longest_edge" in self.size:
                scale = self.size["longest_edge"] / max(picture.size)
                w, h = (max(1, int(edge * scale + 0.5)) for edge in picture.size)
            elif "shortest_edge" in self.size:
                w, h = (self.size["shortest_edge"] * edge // min(picture.size) for edge in picture.size)
            else:
                w, h = self.size["width"], self.size["height"]
            if w * h > self.MOST ** 2:  # for the sake of the square in its middle
                raise InputError(f"a picture of {picture.width} × {picture.height} px is too long and narrow")
            picture = picture.resize((w, h), self.resample)
        if p.get("do_center_crop"):  # outside the picture is black
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        x = self.pixels(picture)
        if p.get("do_pad"):  # right and bottom, with zeros, that is the mean
            x = F.pad(x, (0, side - x.shape[2], 0, side - x.shape[1]))
        return x.contiguous()


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) of any family in FAMILIES.

    `config` tells the sizes; `preprocess(picture)` makes the pixels.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.preprocess = config, Preprocessor(PROCESSORS[config.processor], config.image_size)
        D, size, prefix = config.width, config.patch_size, config.class_tokens + config.registers
        self.patches = nn.Conv2d(3, D, size, size, bias=config.patch_bias)
        self.positions = nn.Parameter(torch.zeros(config.grid ** 2, D))
        # class and register tokens; their positions, if any, are added at load
        self.prefix = nn.Parameter(torch.zeros(prefix, D)) if prefix else None
        self.pre_norm = nn.LayerNorm(D, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, 0 if i in config.global_blocks else config.window)
                                    for i in range(config.layers))
        self.norm = nn.LayerNorm(D, config.eps) if config.post_norm else nn.Identity()
        self.neck = Neck(config) if config.neck else nn.Identity()

    def forward(self, pixels: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Pixels (B,3,S,S) to features (B,N,Dv): class and register tokens first, then patches row by row.

        `layer=None` gives the reference's `last_hidden_state`, an integer its `hidden_states[layer]`: 0 is
        what enters the first block, i what leaves block i, -1 what leaves the last, without the final norm or
        neck. S is `config.image_size`, Dv `config.hidden` (`config.width`, where `layer` is given). Raises
        InputError.
        """
        size, S, blocks = tuple(pixels.shape[-2:]), self.config.image_size, self.blocks
        if size != (S, S):
            raise InputError(f"the encoder takes {S} px squares, not {size}")
        if layer is not None and not -len(blocks) - 1 <= layer <= len(blocks):
            raise InputError(f"layer {layer} of an encoder with {len(blocks)} blocks")
        x = self.patches(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # (B,G²,D)
        x = x + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)  # (B,N,D)
        x = self.pre_norm(x)
        for block in blocks if layer is None else blocks[:layer % (len(blocks) + 1)]:
            x = block(x)
        return self.neck(self.norm(x)) if layer is None else x

    def resize(self, image_size: int) -> None:
        """Makes the encoder take squares of `image_size` px: interpolates the positions of its patches.
        Raises InputError below one patch, and for SAM, whose relative positions are made for one size."""
        old = self.config
        if image_size < old.patch_size or image_size != old.image_size and old.window:
            least = f"{old.image_size} px alone" if old.window else f"{old.patch_size} px, one patch, or more"
            raise InputError(f"image_size {image_size}: the encoder takes {least}")
        self.config = replace(old, image_size=image_size)
        if self.config.grid != old.grid:
            x = self.positions.detach().float().T.unflatten(1, (old.grid, old.grid))[None]  # (1,D,G,G)
            x = F.interpolate(x, (self.config.grid,) * 2, mode="bicubic", antialias=old.antialias)
            self.positions = nn.Parameter(x[0].flatten(1).T.to(self.positions.dtype).contiguous())

    @classmethod
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32,
                        image_size: int | None = None) -> "ViT":
        """Loads a checkpoint (a folder, a hub name, or the part of one) in eval mode. Raises InputError.

        `image_size`, pixels along a side: what `preprocess` makes and the encoder takes, unless given the
        size that preprocessor_config.json states, else config.json's. Position embeddings are interpolated
        where it isn't theirs.
        """
        checkpoint = Checkpoint(name) if isinstance(name, str) else name
        family, config = checkpoint.family(FAMILIES)
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            vit = cls(config)
        vit.name, vit.family = checkpoint.name, family
        load_weights(vit, checkpoint, family, dtype)
        # image settings are in config.json, preprocessor_config.json, or with others in processor_config.json
        path = checkpoint.folder / "preprocessor_config.json"
        settings = (checkpoint.config.get("image_processor") or checkpoint.json(path.name)
                    or checkpoint.json("processor_config.json").get("image_processor") or {})
        kind = (settings.get("image_processor_type") or settings.get("feature_extractor_type")
                or config.processor)
        kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(kind))
        if kind not in PROCESSORS:
            raise InputError(f"{path}: image processor {kind!r} is not one of {', '.join(PROCESSORS)}")
        with guard(path):
            vit.preprocess = Preprocessor(PROCESSORS[kind] | settings, config.image_size, image_size)
        with named(path):
            vit.resize(vit.preprocess.image_size)
        if not settings:
            mean, std = vit.preprocess.mean.flatten().tolist(), vit.preprocess.std.flatten().tolist()
            warn(f"{checkpoint.folder}: no {path.name} with image settings: assuming {kind}'s, mean "
                 f"{[round(x, 3) for x in mean]}, std {[round(x, 3) for x in std]}, "
                 f"size {vit.preprocess.image_size} px")
        return vit.eval()


# ---------------------------------------------------------------------------------------------------------
# Families: what differs from one to the next, as data

BASE = dict(image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            hidden_act="gelu", layer_norm_eps=1e-6)


def reader(defaults: dict, **fields):
    """Makes a `Family.config`. BASE and `defaults` tell which keys of config.json the family reads, and what
    the reference takes for one that isn't there; `fields` are those of ViTConfig that no key tells."""
    defaults = BASE | defaults

    def read(c: dict) -> ViTConfig:
        # two-tower files nest the image half, old CLIP files twice: the reference follows the second
        c = c.get("vision_config_dict") or c.get("vision_config") or c
        c = {key: c.get(key, default) for key, default in defaults.items()}
        mlp = c["intermediate_size"] if "intermediate_size" in c else int(c["hidden_size"] * c["mlp_ratio"])
        mlp, gated = c.get("mlp_dim") or mlp, c.get("use_swiglu_ffn", False)
        return ViTConfig(
            image_size=c["image_size"], patch_size=c["patch_size"], width=c["hidden_size"],
            layers=c["num_hidden_layers"], heads=c["num_attention_heads"], eps=c["layer_norm_eps"],
            mlp=(int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp, gated=gated,
            activation="silu" if gated else c["hidden_act"], qkv_bias=c.get("qkv_bias", True),
            registers=c.get("num_register_tokens", 0), window=c.get("window_size", 0),
            global_blocks=tuple(c.get("global_attn_indexes", ())),
            relative_positions=c.get("use_rel_pos", False), neck=c.get("output_channels", 0), **fields)
    return read


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1,N,D), (1,G,G,D), (N,D) or (D,) to (N,D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def prefix(positions: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
    """Class tokens, each with its position: the first ones."""
    tokens = torch.cat([rows(token) for token in tokens]).float()
    return torch.stack([tokens, rows(positions)[:len(tokens)].float()]).sum(0)


def fused(qkv: str) -> dict:
    """The names of q, k and v where a file keeps the three in one."""
    return {f"attention.{q}": (lambda tensor, i=i: tensor.chunk(3)[i], qkv) for i, q in enumerate("qkv")}


def attention(path: str) -> dict:
    """The names in ViT's attention: on disk, and in the reference's class, where a block is `path`."""
    pairs = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "output.dense"}
    return {f"attention.{ours}": f"attention.{disk}|{path}.attention.{ours[0]}_proj"
            for ours, disk in pairs.items()}


VIT_NAMES = name_table({
    "patches": "embeddings.patch_embeddings.projection",
    "prefix": (prefix, "embeddings.position_embeddings", "embeddings.cls_token"),
    "positions": (lambda tensor: rows(tensor)[1:], "embeddings.position_embeddings"),
    "norm": "layernorm",
}, {
    "norm1": "layernorm_before", "norm2": "layernorm_after", **attention("layers.{}"),
    "mlp.up": "intermediate.dense|layers.{}.mlp.fc1", "mlp.down": "output.dense|layers.{}.mlp.fc2",
}, "encoder.layer.{}.")
DEIT_NAMES = VIT_NAMES | {
    "prefix": (prefix, "embeddings.position_embeddings", "embeddings.cls_token",
               "embeddings.distillation_token"),
    "positions": (lambda tensor: rows(tensor)[2:], "embeddings.position_embeddings"),
}
DINOV2_NAMES = name_table(VIT_NAMES, {
    "norm1": "norm1", "norm2": "norm2", **attention("encoder.layer.{}"),
    "scale1.weight": "layer_scale1.lambda1", "scale2.weight": "layer_scale2.lambda1",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "encoder.layer.{}.")
REGISTERS_NAMES = DINOV2_NAMES | {"prefix": (
    lambda positions, token, registers: torch.cat([prefix(positions, token), rows(registers).float()]),
    "embeddings.position_embeddings", "embeddings.cls_token", "embeddings.register_tokens")}


def dinov2_names(names: dict):
    """DINOv2's SwiGLU keeps the gate and its input in one on disk, apart in the reference's class."""
    def gated(config: ViTConfig) -> dict:
        def part(i: int):
            return lambda tensor: tensor if len(tensor) == config.mlp else tensor.chunk(2)[i]
        return names if not config.gated else name_table(names, {
            "mlp.gate": (part(0), "mlp.weights_in|encoder.layer.{}.mlp.gate_proj"),
            "mlp.up": (part(1), "mlp.weights_in|encoder.layer.{}.mlp.up_proj"),
            "mlp.down": "mlp.weights_out|encoder.layer.{}.mlp.down_proj"}, "encoder.layer.{}.")
    return gated


CLIP_NAMES = name_table({
    "patches": "embeddings.patch_embedding",
    "prefix": (prefix, "embeddings.position_embedding.weight", "embeddings.class_embedding"),
    "positions": (lambda tensor: rows(tensor)[1:], "embeddings.position_embedding.weight"),
    "pre_norm": "pre_layrnorm",  # so spelled on disk
    "norm": "post_layernorm",
}, {
    "norm1": "layer_norm1", "norm2": "layer_norm2",
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "encoder.layers.{}.")
SIGLIP_NAMES = CLIP_NAMES | {"positions": "embeddings.position_embedding.weight"}
EVA_NAMES = name_table(CLIP_NAMES | {
    "prefix": (prefix, "embeddings.position_embedding", "embeddings.class_embedding"),
    "positions": (lambda tensor: rows(tensor)[1:], "embeddings.position_embedding"),
}, fused("self_attn.qkv") | {"attention.out": "self_attn.projection"}, "encoder.layers.{}.")
NANOVLM_NAMES = name_table({
    "patches": "patch_embedding.conv", "positions": (rows, "patch_embedding.position_embedding"),
    "norm": "layer_norm",
}, {
    "norm1": "ln1", "norm2": "ln2", **fused("attn.qkv_proj"), "attention.out": "attn.out_proj",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "blocks.{}.")
SAM_NAMES = name_table({
    "patches": "patch_embed.projection", "positions": (rows, "pos_embed"),
    "neck.reduce": (lambda kernel: kernel.flatten(1), "neck.conv1"),  # a 1×1 convolution
    "neck.norm1": "neck.layer_norm1", "neck.norm2": "neck.layer_norm2", "neck.mix": "neck.conv2",
}, {
    "norm1": "layer_norm1", "norm2": "layer_norm2", **fused("attn.qkv"), "attention.out": "attn.proj",
    "attention.rows": "attn.rel_pos_h", "attention.columns": "attn.rel_pos_w",
    "mlp.up": "mlp.lin1", "mlp.down": "mlp.lin2",
}, "layers.{}.")

VIT = dict(intermediate_size=3072, qkv_bias=True, layer_norm_eps=1e-12)
vit = Family(reader(VIT, processor="ViT"), VIT_NAMES, r"(pooler|classifier)\..*|embeddings\.mask_token")
deit = Family(reader(VIT, processor="DeiT", class_tokens=2), DEIT_NAMES,
              r"(pooler|(cls_|distillation_)?classifier)\..*|embeddings\.mask_token")
# CLIP's last_hidden_state is taken before its post_layernorm, which serves the class token's projection alone
CLIP = dict(intermediate_size=3072, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
clip = Family(reader(CLIP, processor="CLIP", patch_bias=False, pre_norm=True, post_norm=False), CLIP_NAMES,
              r"(text_model|(text|visual)_projection|classifier|post_layernorm)\..*|logit_scale"
              r"|.*\.position_ids", "vision_model.")
SIGLIP = dict(intermediate_size=3072, hidden_act="gelu_pytorch_tanh")
siglip = Family(reader(SIGLIP, processor="Siglip", class_tokens=0), SIGLIP_NAMES,
                r"(text_model|head|classifier)\..*|logit_(scale|bias)|.*\.position_ids", "vision_model.")
idefics3 = Family(reader(SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32),
                         processor="Idefics3", class_tokens=0), SIGLIP_NAMES, "")
nanovlm = Family(lambda c: siglip.config(dict(
    image_size=c["vit_img_size"], patch_size=c["vit_patch_size"], hidden_size=c["vit_hidden_dim"],
    intermediate_size=c["vit_inter_dim"], num_hidden_layers=c["vit_n_blocks"],
    num_attention_heads=c["vit_n_heads"], layer_norm_eps=c["vit_ln_eps"])), NANOVLM_NAMES, "")
DINOV2 = dict(mlp_ratio=4, qkv_bias=True, use_swiglu_ffn=False)
dinov2 = Family(reader(DINOV2 | dict(patch_size=14), processor="Bit", layer_scale=True),
                dinov2_names(DINOV2_NAMES), r"classifier\..*|embeddings\.mask_token")
registers = Family(reader(DINOV2 | dict(num_register_tokens=4), processor="Bit", layer_scale=True,
                          antialias=True), dinov2_names(REGISTERS_NAMES), dinov2.unused)
eva = Family(reader(dict(patch_size=14, hidden_size=1408, num_hidden_layers=39, num_attention_heads=16,
                         intermediate_size=6144, qkv_bias=True), processor="Blip"), EVA_NAMES,
             r"(qformer|language_model|(language|vision|text)_projection|itm_head)\..*|query_tokens"
             r"|.*\.position_ids|embeddings\.(word|position)_embeddings\.weight", "vision_model.")
sam = Family(reader(dict(image_size=1024, mlp_dim=None, mlp_ratio=4.0, qkv_bias=True, use_rel_pos=True,
                         window_size=14, global_attn_indexes=(2, 5, 8, 11), output_channels=256),
                    processor="Sam", class_tokens=0, post_norm=False), SAM_NAMES,
             r"(shared_image_embedding|prompt_encoder|mask_decoder)\..*", "vision_encoder.")

FAMILIES = {  # config.json's model_type -> family
    "vit": vit, "deit": deit,
    "clip": clip, "clip_vision_model": clip._replace(path=""),
    "siglip": siglip, "siglip_vision_model": siglip._replace(path=""), "idefics3_vision": idefics3,
    "nanovlm": nanovlm,
    "dinov2": dinov2, "dinov2_with_registers": registers,
    "blip-2": eva, "blip_2_vision_model": eva._replace(path=""),
    "sam": sam, "sam_vision_model": sam,
}

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
OPENAI = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])

# preprocessor_config.json's image_processor_type -> what the reference takes where a key isn't there.
# `edges`: which ones a plain number as `size` is the length of, both unless given
PROCESSORS = {
    "ViT": dict(resample=2),
    "DeiT": dict(resample=3, do_center_crop=True),
    "CLIP": dict(resample=3, do_center_crop=True, edges=("shortest_edge",), **OPENAI),
    "Bit": dict(resample=3, do_center_crop=True, edges=("shortest_edge",), **OPENAI),
    "Siglip": dict(resample=3),
    "Blip": dict(resample=3, **OPENAI),
    **dict.fromkeys(("Idefics3", "SmolVLM"), dict(
        resample=1, edges=("longest_edge",), size=4 * 364, max_image_size=dict(longest_edge=364),
        do_image_splitting=True)),
    "nanoVLM": dict(resample=2, do_normalize=False),
    "Sam": dict(resample=2, do_pad=True, edges=("longest_edge",), **IMAGENET),
}
