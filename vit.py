"""The image encoder: picture → pixels → patch features.

One `ViT` reads every family in formats/encoders.py: ViT, DeiT, CLIP, SigLIP, DINOv2, BLIP-2's, SAM's.
Letters of shapes: B pictures, N tokens, D width, H heads, hd a head's size, G patches along a side, S pixels.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.encoders import FAMILIES
from formats.files import InputError, guard, named
from formats.pixels import PROCESSORS, Preprocessor, read_preprocessor
from formats.weights import Checkpoint, depth, load_weights
from support.kernels import attend
from support.layers import ACTIVATIONS, FeedForward


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
    processor: str  # whose image settings hold where preprocessor_config.json is silent: a key of PROCESSORS
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
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        depth(self.layers)

    @property
    def grid(self) -> int:
        """Patches along one side. Pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Width of the features that the encoder returns."""
        return self.neck or self.width


def window_positions(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """The position (grid²,) of each patch, row by row, among the tokens of n² windows of window² tokens each,
    window by window."""
    n = -(-grid // window)  # windows along a side
    at = torch.arange(grid, device=device)
    which = at // window
    inside = at % window
    of_window = which[:, None] * n + which
    in_window = inside[:, None] * window + inside
    return (of_window * window ** 2 + in_window).flatten()


class Attention(nn.Module):
    """Self-attention over all tokens or, with `window`, within square windows of the patches."""
    attend = staticmethod(attend)

    def __init__(self, config: ViTConfig, window: int):
        super().__init__()
        self.heads = config.heads
        self.grid = config.grid
        self.window = window
        self.side = window or config.grid  # of what a patch attends to
        self.q = nn.Linear(config.width, config.width, config.qkv_bias)
        self.k = nn.Linear(config.width, config.width, config.qkv_bias)
        self.v = nn.Linear(config.width, config.width, config.qkv_bias)
        self.out = nn.Linear(config.width, config.width)

        # SAM: an embedding for each distance between two patches, along each side
        self.relative = config.relative_positions
        if self.relative:
            shape = 2 * self.side - 1, config.width // config.heads
            self.rows = nn.Parameter(torch.zeros(shape))
            self.columns = nn.Parameter(torch.zeros(shape))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,H,N,hd)

    def bias(self, q):  # (B,H,N,hd) to (B,H,N,N)
        """Decomposed relative positions (Li et al., 2022, arXiv:2112.01526): q · row distance + q · column
        distance."""
        at = torch.arange(self.side, device=q.device)
        distance = at[:, None] - at + self.side - 1  # (side,side), none below 0
        q = q.unflatten(2, (self.side, self.side))  # (B,H,y,x,hd)
        rows = torch.einsum("bhyxd,ykd->bhyxk", q, self.rows[distance])
        columns = torch.einsum("bhyxd,xkd->bhyxk", q, self.columns[distance])
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    def forward(self, x):  # (B,N,D)
        B, D = len(x), x.shape[2]
        if self.window:  # sort the patches into windows, zeros where a window leaves the picture
            n = -(-self.grid // self.window)
            positions = window_positions(self.grid, self.window, x.device)
            windows = x.new_zeros(B, (n * self.window) ** 2, D)
            windows[:, positions] = x
            x = windows.view(B * n * n, -1, D)

        q = self.split(self.q(x))
        k = self.split(self.k(x))
        v = self.split(self.v(x))
        mask = self.bias(q) if self.relative else None
        x = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)

        if self.window:  # and back
            x = x.reshape(B, -1, D)[:, positions]
        return self.out(x)


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
        self.scale1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = FeedForward(config.width, config.mlp, config.activation, gated=config.gated)
        self.scale2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x):  # (B,N,D)
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class Neck(nn.Module):
    """SAM's neck: to fewer channels, then a 3×3 convolution over the patches, each with its norm."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.grid = config.grid
        self.reduce = nn.Linear(config.width, config.neck, bias=False)
        self.norm1 = nn.LayerNorm(config.neck, 1e-6)
        self.mix = nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(config.neck, 1e-6)

    def forward(self, x):  # (B,N,D) to (B,N,C)
        x = self.norm1(self.reduce(x))
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B,C,G,G)
        return self.norm2(self.mix(x).flatten(2).transpose(1, 2))


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) of any family in FAMILIES.

    `config` holds the sizes; `preprocess(picture)` makes the pixels.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.preprocess = Preprocessor(PROCESSORS[config.processor], config.image_size)
        D, patch = config.width, config.patch_size

        # Patches to tokens: a convolution that steps from patch to patch, and an embedding of each position
        self.patches = nn.Conv2d(3, D, patch, patch, bias=config.patch_bias)
        self.positions = nn.Parameter(torch.zeros(config.grid ** 2, D))

        # Class and register tokens; their positions, if any, are added when they are loaded
        self.prefix = nn.Parameter(torch.zeros(config.class_tokens + config.registers, D))
        if not len(self.prefix):
            self.prefix = None

        # The transformer
        self.pre_norm = nn.LayerNorm(D, config.eps) if config.pre_norm else nn.Identity()
        windows = [0 if i in config.global_blocks else config.window for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, window) for window in windows)
        self.norm = nn.LayerNorm(D, config.eps) if config.post_norm else nn.Identity()
        self.neck = Neck(config) if config.neck else nn.Identity()

    def forward(self, pixels: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Pixels (B,3,S,S) to features (B,N,Dv): class and register tokens first, then patches row by row.

        `layer` None returns the reference's `last_hidden_state`, an integer its `hidden_states[layer]`: 0 is
        what enters the first block, i what leaves block i, -1 what leaves the last, without the final norm or
        neck. S is `config.image_size`; Dv is `config.hidden` or, with a `layer`, `config.width`. Raises
        InputError.
        """
        size, side = tuple(pixels.shape[-2:]), self.config.image_size
        if size != (side, side):
            raise InputError(f"the encoder takes {side} px squares, not {size}")
        self.check_layer(layer)

        # Patches to tokens
        x = self.patches(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # (B,G²,D)
        x = x + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)  # (B,N,D)

        # Through the blocks
        x = self.pre_norm(x)
        if layer is not None:
            for block in self.blocks[:layer % (len(self.blocks) + 1)]:
                x = block(x)
            return x
        for block in self.blocks:
            x = block(x)
        return self.neck(self.norm(x))

    def check_layer(self, layer: int | None) -> None:
        """Raises InputError where there is no such layer to read."""
        count = len(self.blocks)
        if layer is not None and not -count - 1 <= layer <= count:
            raise InputError(f"layer {layer} of an encoder with {count} blocks")

    def feature_shape(self, layer: int | None = None) -> tuple[int, int]:
        """(N,Dv) of the features of a picture."""
        config = self.config
        tokens = config.class_tokens + config.registers + config.grid ** 2
        return tokens, config.hidden if layer is None else config.width

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
            size = (self.config.grid, self.config.grid)
            x = F.interpolate(x, size, mode="bicubic", antialias=old.antialias)
            self.positions = nn.Parameter(x[0].flatten(1).T.to(self.positions.dtype).contiguous())

    @classmethod
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32,
                        image_size: int | None = None) -> "ViT":
        """Loads a checkpoint (a folder, a hub name, or the part of one) in eval mode. Raises InputError.

        `image_size`: pixels along a side, of what `preprocess` makes and the encoder takes. Without it, the
        size in preprocessor_config.json holds, else that in config.json. Position embeddings are interpolated
        where it isn't the size they were made for.
        """
        checkpoint = Checkpoint(name) if isinstance(name, str) else name
        family, config = checkpoint.family(FAMILIES, ViTConfig)

        # Make it without memory, then give each parameter its tensor
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            vit = cls(config)
        vit.name = checkpoint.name
        vit.family = family
        load_weights(vit, checkpoint, family, dtype)

        # How it sees pictures, which decides their size
        vit.preprocess = read_preprocessor(checkpoint, config.processor, config.image_size, image_size)
        with named(checkpoint.folder / "preprocessor_config.json"):
            vit.resize(vit.preprocess.image_size)
        return vit.eval()
