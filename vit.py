"""The image encoder: picture → pixels → patch features.

One class, `ViT`, reads every family in formats/encoders.py: ViT, DeiT, CLIP, SigLIP, DINOv2, SAM's encoder
and BLIP-2's. A field of `ViTConfig` says where a family differs.

Letters of shapes: B pictures, S pixels along a side, G patches along a side, N tokens, D width of the tokens,
Dv width of the features that the encoder returns, H heads, hd size of a head, C channels of SAM's neck.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.encoders import FAMILIES
from formats.files import InputError, guard, named
from formats.pixels import PROCESSORS, Preprocessor, read_preprocessor
from formats.weights import Checkpoint, collection_paused, depth, load_weights
from support.kernels import attend
from support.layers import ACTIVATIONS, FeedForward


@dataclass
class ViTConfig:
    """The sizes of an encoder, and what its family does differently. Raises ValueError if they don't fit."""
    image_size: int  # pixels along a side of the square picture
    patch_size: int  # pixels along a side of a patch
    width: int  # D, of the tokens in the blocks
    layers: int
    heads: int
    mlp: int  # hidden size of the feed-forward layers
    activation: str  # a key of ACTIVATIONS
    eps: float  # of the LayerNorms
    processor: str  # a key of PROCESSORS: image settings that preprocessor_config.json may override
    class_tokens: int = 1  # learned tokens before the patches: 1, 2 (DeiT's distillation token) or 0
    registers: int = 0  # DINOv2: learned tokens after the class token; they have no position
    patch_bias: bool = True
    qkv_bias: bool = True
    gated: bool = False  # SwiGLU feed-forward layers
    layer_scale: bool = False  # a learned factor per channel on the output of each sublayer
    pre_norm: bool = False  # a norm before the first block
    post_norm: bool = True  # a norm after the last block
    interpolation: str = "bicubic"  # of position embeddings, for pictures of another size
    antialias: bool = False  # when they are interpolated
    window: int = 0  # SAM: patches along a side of an attention window; 0: attention over the whole picture
    global_blocks: tuple[int, ...] = ()  # SAM: indices of the blocks without windows
    relative_positions: bool = False  # SAM: attention scores depend on the distance between patches
    neck: int = 0  # C, channels after SAM's convolutional neck; 0: no neck

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
        """G, the patches along one side. Pixels beyond the last whole patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Dv, the width of the features that the encoder returns."""
        return self.neck or self.width


# ---------------------------------------------------------------------------------------------------------
# The transformer

class Attention(nn.Module):
    """Multi-head self-attention over all tokens. With a `window` above 0, a patch attends only to the patches
    in its square window of `window` × `window`."""
    attend = staticmethod(attend)  # an attribute, so that kernels.watch can swap it

    def __init__(self, config: ViTConfig, window: int):
        super().__init__()
        self.heads = config.heads
        self.grid = config.grid
        self.window = window
        self.side = window or config.grid  # patches along a side of the area that a patch attends to
        self.q = nn.Linear(config.width, config.width, config.qkv_bias)
        self.k = nn.Linear(config.width, config.width, config.qkv_bias)
        self.v = nn.Linear(config.width, config.width, config.qkv_bias)
        self.out = nn.Linear(config.width, config.width)

        # SAM: an embedding for each distance between two rows and for each distance between two columns
        self.relative = config.relative_positions
        if self.relative:
            shape = 2 * self.side - 1, config.width // config.heads
            self.rows = nn.Parameter(torch.zeros(shape))
            self.columns = nn.Parameter(torch.zeros(shape))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,H,N,hd)

    def bias(self, q):  # (B,H,N,hd) to (B,H,N,N)
        """Decomposed relative positions (Li et al., 2022, arXiv:2112.01526), added to the attention scores:
        q · the embedding of the row distance + q · the embedding of the column distance."""
        # Distances between rows (or columns) i and j, shifted so that the smallest is 0
        at = torch.arange(self.side, device=q.device)
        distance = at[:, None] - at + self.side - 1  # (side,side)

        # The score of each query (y,x) for each key row and each key column k, then for each pair of them
        q = q.unflatten(2, (self.side, self.side))  # (B,H,y,x,hd)
        rows = torch.einsum("bhyxd,ykd->bhyxk", q, self.rows[distance])  # (B,H,y,x,side)
        columns = torch.einsum("bhyxd,xkd->bhyxk", q, self.columns[distance])  # (B,H,y,x,side)
        scores = rows[..., :, None] + columns[..., None, :]  # (B,H,y,x,side,side)
        return scores.flatten(4).flatten(2, 3)

    def forward(self, x):  # (B,N,D)
        # Cut the picture into windows, each a row of the batch; zeros fill those that reach beyond it
        if self.window:
            B = len(x)
            G = self.grid
            w = self.window
            n = -(-G // w)  # windows along a side, rounded up
            beyond = n * w - G
            x = F.pad(x.unflatten(1, (G, G)), (0, 0, 0, beyond, 0, beyond))  # (B,n·w,n·w,D)
            x = x.unflatten(2, (n, w)).unflatten(1, (n, w)).transpose(2, 3)  # (B,n,n,w,w,D)
            x = x.flatten(3, 4).flatten(0, 2)  # (B·n²,w²,D)

        # Attention, by head
        q = self.split(self.q(x))
        k = self.split(self.k(x))
        v = self.split(self.v(x))
        mask = self.bias(q) if self.relative else None
        x = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B,N,D)

        # Put the windows back together, without the filling
        if self.window:
            x = x.unflatten(1, (w, w)).unflatten(0, (B, n, n)).transpose(2, 3)  # (B,n,w,n,w,D)
            x = x.flatten(3, 4).flatten(1, 2)[:, :G, :G].flatten(1, 2)  # (B,G²,D)
        return self.out(x)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    """A transformer block: attention and a feed-forward layer, each with a norm before it and its input added
    to its output."""

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
    """SAM's neck (Kirillov et al., 2023, arXiv:2304.02643): a projection to fewer channels, then a 3 × 3
    convolution over the grid of patches. A norm follows each."""

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

    `config` is its ViTConfig. `preprocess(picture)` turns a PIL image into pixels (3,S,S).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.preprocess = Preprocessor(PROCESSORS[config.processor], config.image_size)
        D, patch = config.width, config.patch_size

        # Patches to tokens: a convolution that steps from patch to patch; each position has an embedding
        self.patches = nn.Conv2d(3, D, patch, patch, bias=config.patch_bias)
        self.positions = nn.Parameter(torch.zeros(config.grid ** 2, D))

        # Class and register tokens. A checkpoint's position of the class token is added to it when loaded
        self.prefix = nn.Parameter(torch.zeros(config.class_tokens + config.registers, D))
        if not len(self.prefix):
            self.prefix = None

        # The blocks, the norms around them, and SAM's neck
        self.pre_norm = nn.LayerNorm(D, config.eps) if config.pre_norm else nn.Identity()
        windows = [0 if i in config.global_blocks else config.window for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, window) for window in windows)
        self.norm = nn.LayerNorm(D, config.eps) if config.post_norm else nn.Identity()
        self.neck = Neck(config) if config.neck else nn.Identity()

    def forward(self, pixels: torch.Tensor, layer: int | list[int] | None = None) -> torch.Tensor:
        """Encodes pixels (B,3,S,S) as features (B,N,Dv).

        The N features are those of the class and register tokens, then those of the patches, row by row. S is
        `config.image_size`.

        layer: which hidden state to return, numbered as `hidden_states` in `transformers`. 0 is the input of
            the first block, i the output of the i-th block, -1 the output of the last, without the final norm
            and the neck; their width is `config.width`. Of several, each patch's features are joined in the
            order of the list. None returns `last_hidden_state`: the output of the final norm and the neck,
            of width `config.hidden`.
        Raises InputError if the pixels have another size, or if there is no such layer.
        """
        wanted = self.states_of(layer)
        states = self.run(self.patch_embeddings(pixels), 0, max(wanted), wanted)
        return self.read(states, layer)

    def begin(self, pixels: torch.Tensor, layer: int | list[int] | None, blocks: int) -> torch.Tensor:
        """Runs the first `blocks` blocks of `forward`. Returns the hidden states that `finish` needs to go on
        from there, joined: (B,N,n·D)."""
        needed = self.states_between(layer, blocks)
        states = self.run(self.patch_embeddings(pixels), 0, blocks, needed)
        return torch.cat([states[i] for i in needed], -1)

    def finish(self, begun: torch.Tensor, layer: int | list[int] | None, blocks: int) -> torch.Tensor:
        """Runs the other blocks of `forward` on what `begin` returned. Returns the features (B,N,Dv)."""
        needed = self.states_between(layer, blocks)
        states = dict(zip(needed, begun.split(self.config.width, -1)))
        wanted = self.states_of(layer)
        states |= self.run(states[blocks], blocks, max(wanted), wanted)
        return self.read(states, layer)

    def patch_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B,3,S,S) to hidden state 0 (B,N,D)."""
        size = tuple(pixels.shape[-2:])
        side = self.config.image_size
        if size != (side, side):
            raise InputError(f"the encoder takes pictures of {side} × {side} px, not {size[0]} × {size[1]}")

        # Patches to tokens
        x = self.patches(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # (B,G²,D)
        x = x + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)  # (B,N,D)
        return self.pre_norm(x)

    def run(self, x: torch.Tensor, first: int, last: int, wanted: list[int]) -> dict[int, torch.Tensor]:
        """Takes hidden state `first` through the blocks up to state `last`. Returns {number: state} of those
        that are wanted, and of the first."""
        states = {first: x}
        for i in range(first, last):
            x = self.blocks[i](x)
            if i + 1 in wanted:
                states[i + 1] = x
        return states

    def read(self, states: dict[int, torch.Tensor], layer: int | list[int] | None) -> torch.Tensor:
        """The features (B,N,Dv) of hidden states (B,N,D): see `forward`."""
        wanted = [states[i] for i in self.states_of(layer)]
        if layer is None:
            return self.neck(self.norm(wanted[0]))
        return torch.cat(wanted, -1)

    def states_between(self, layer: int | list[int] | None, blocks: int) -> list[int]:
        """The hidden states that `finish` needs: those before number `blocks` that are read, and this one."""
        read = {i for i in self.states_of(layer) if i < blocks}
        return [*sorted(read), blocks]

    def states_of(self, layer: int | list[int] | None) -> list[int]:
        """Returns the numbers of the hidden states that `layer` asks for: how many blocks lie before each.
        See `forward`. Raises InputError."""
        count = len(self.blocks)
        if layer is None:
            return [count]
        found = []
        for i in layer if isinstance(layer, list) else [layer]:
            if not -count - 1 <= i <= count:
                raise InputError(f"the encoder has no layer {i}: it has {count} blocks")
            found.append(i % (count + 1))  # there are count + 1 states: -1 is the last
        return found

    def frozen_blocks(self, layer: int | list[int] | None) -> int | None:
        """Returns how many blocks come before the first one that is trained, at most those that `layer`
        needs: training doesn't change what `begin` computes of them. None: nothing in the encoder is trained.
        -1: something before the first block is trained."""
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        if not trained:
            return None
        blocks = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
        if any(not name.startswith(("blocks.", "norm.", "neck.")) for name in trained):
            return -1
        return min([*blocks, max(self.states_of(layer))])

    def feature_shape(self, layer: int | list[int] | None = None,
                      blocks: int | None = None) -> tuple[int, int]:
        """Returns (N,Dv), the shape of one picture's features, or (N,n·D), that of what `begin` returns after
        so many `blocks`; `layer` as in `forward`. Raises InputError."""
        config = self.config
        tokens = config.class_tokens + config.registers + config.grid ** 2
        if blocks is not None:
            return tokens, config.width * len(self.states_between(layer, blocks))
        width = config.hidden if layer is None else config.width * len(self.states_of(layer))
        return tokens, width

    def resize(self, image_size: int) -> None:
        """Changes the size of the pictures that the encoder takes to `image_size` px along a side, and
        interpolates its position embeddings.

        Raises InputError if that is less than one patch, or for SAM, whose relative positions fit one size.
        """
        old = self.config
        if old.window and image_size != old.image_size:
            raise InputError(f"image_size {image_size}: the encoder takes {old.image_size} px alone")
        if image_size < old.patch_size:
            raise InputError(f"image_size {image_size}: the encoder takes {old.patch_size} px, one patch, or "
                             "more")
        self.config = replace(old, image_size=image_size)

        # The positions are a picture with D channels: resize it to the new grid
        if self.config.grid != old.grid:
            x = self.positions.detach().float().T.unflatten(1, (old.grid, old.grid))[None]  # (1,D,G,G)
            size = (self.config.grid, self.config.grid)
            x = F.interpolate(x, size, mode=old.interpolation, antialias=old.antialias)
            x = x[0].flatten(1).T  # (G²,D)
            self.positions = nn.Parameter(x.to(self.positions.dtype).contiguous())

    @classmethod
    @collection_paused()
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32,
                        image_size: int | None = None) -> "ViT":
        """Loads an encoder from a folder or a hub id, in eval mode.

        name: the folder or hub id, or a Checkpoint, such as the encoder's part of a public VLM.
        dtype: of the weights.
        image_size: pixels along a side of the pictures it shall take. By default it comes from
            preprocessor_config.json, otherwise from config.json. Position embeddings made for another size
            are interpolated.
        Raises InputError if the files are missing, of an unknown family, or not what config.json says.
        """
        checkpoint = name if isinstance(name, Checkpoint) else Checkpoint(str(name))
        family, config = checkpoint.family(FAMILIES, ViTConfig)

        # Make the modules without memory for their weights, then give each parameter its tensor
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            vit = cls(config)
        vit.name = checkpoint.name
        vit.family = family
        load_weights(vit, checkpoint, family, dtype)

        # The preprocessor's settings decide the size of the pictures
        vit.preprocess = read_preprocessor(checkpoint, config.processor, config.image_size, image_size)
        with named(checkpoint.folder / "preprocessor_config.json"):
            vit.resize(vit.preprocess.image_size)
        return vit.eval()
