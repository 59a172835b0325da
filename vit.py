"""The image encoder: picture → pixels → patch features. One `ViT` reads every family; see FAMILIES."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from data import ACTIVATIONS, Checkpoint, Family, InputError, attend, load_weights, rgb


@dataclass
class ViTConfig:
    image_size: int  # pixels, square
    patch_size: int
    hidden: int
    layers: int
    heads: int
    mlp: int  # hidden size of the feed-forward layers
    activation: str
    eps: float
    class_tokens: int = 1  # learned tokens before the patches: 1, 2 (DeiT's distillation token) or 0
    patch_bias: bool = True
    qkv_bias: bool = True
    pre_norm: bool = False  # a norm before the first block
    post_norm: bool = True  # a norm after the last block

    def __post_init__(self):
        if self.image_size % self.patch_size or self.hidden % self.heads:
            raise ValueError("image_size must be a multiple of patch_size, hidden_size of num_attention_heads")
        ACTIVATIONS[self.activation]

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(config.hidden, config.hidden, config.qkv_bias) for _ in "qkv")
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x):  # (B,N,D)
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, config.eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden, config.eps)
        self.up = nn.Linear(config.hidden, config.mlp)
        self.down = nn.Linear(config.mlp, config.hidden)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):  # (B,N,D)
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Preprocessor:
    """A Pillow picture of any size and mode to pixels (3,H,W) float32, as preprocessor_config.json (`settings`) says."""

    def __init__(self, settings: dict, image_size: int):
        self.settings, self.image_size = settings, image_size

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        p, picture = self.settings, rgb(picture)
        size, crop = p.get("size", self.image_size), p.get("crop_size", self.image_size)
        if isinstance(size, int):  # old files: the shortest edge where a crop follows, else both edges
            size = {"shortest_edge": size} if p.get("do_center_crop") else {"height": size, "width": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if p.get("do_resize", True):
            if "shortest_edge" in size:
                short, edge = min(picture.size), size["shortest_edge"]
                w, h = (max(edge, int(edge * side / short)) for side in picture.size)
            else:
                w, h = size["width"], size["height"]
            picture = picture.resize((w, h), Image.Resampling(p.get("resample", 2)))
        if p.get("do_center_crop"):  # outside the picture is black
            left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
            picture = picture.crop((left, top, left + crop["width"], top + crop["height"]))
        x = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)  # (3,H,W)
        if p.get("do_rescale", True):
            x = x * p.get("rescale_factor", 1 / 255)
        if p.get("do_normalize", True):
            mean, std = (torch.tensor(p.get(key, [0.5] * 3)).view(3, 1, 1) for key in ("image_mean", "image_std"))
            x = (x - mean) / std
        return x.contiguous()


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) of any family in FAMILIES.

    `preprocess(picture)` makes its pixels; `settings` are those of the checkpoint's preprocessor_config.json.
    """

    def __init__(self, config: ViTConfig, settings: dict | None = None):
        super().__init__()
        self.config, self.preprocess = config, Preprocessor(settings or {}, config.image_size)
        self.patches = nn.Conv2d(3, config.hidden, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.class_tokens = nn.Parameter(torch.zeros(config.class_tokens, config.hidden)) if config.class_tokens else None
        self.positions = nn.Parameter(torch.zeros(config.class_tokens + config.grid ** 2, config.hidden))
        self.pre_norm = nn.LayerNorm(config.hidden, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, config.eps) if config.post_norm else nn.Identity()

    def forward(self, pixels: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Pixels (B,3,H,W) to features (B,N,Dv): class tokens first, then the patches row by row.

        `layer=None` gives the reference's `last_hidden_state`. An integer gives its `hidden_states[layer]`:
        0 is what enters the first block, i what leaves block i, -1 the last block's output without the final norm.
        """
        if pixels.shape[-2:] != (self.config.image_size,) * 2:
            raise InputError(f"the encoder takes {self.config.image_size} px squares, not {tuple(pixels.shape[-2:])}")
        x = self.patches(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # (B,N,D)
        if self.class_tokens is not None:
            x = torch.cat([self.class_tokens.expand(len(x), -1, -1), x], 1)
        x = self.pre_norm(x + self.positions)
        if layer is None:
            for block in self.blocks:
                x = block(x)
            return self.norm(x)
        if not -len(self.blocks) - 1 <= layer <= len(self.blocks):
            raise InputError(f"layer {layer} of an encoder with {len(self.blocks)} blocks")
        for block in self.blocks[:layer % (len(self.blocks) + 1)]:
            x = block(x)
        return x

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "ViT":
        """Loads a checkpoint (a folder or a hub name) in eval mode. Raises InputError."""
        checkpoint = Checkpoint(name)
        family, config = checkpoint.family(FAMILIES)
        with torch.device("meta"):
            vit = cls(config, checkpoint.json("preprocessor_config.json"))
        load_weights(vit, checkpoint, family, dtype)
        return vit.eval()


# ---------------------------------------------------------------------------------------------------------
# Families: what differs from one to the next, as data

def reader(eps: float, activation: str, image_size: int = 224, patch_size: int = 16, **flags):
    """Makes a `Family.config`: the keys of config.json with the reference's defaults, and the family's flags."""
    def read(c: dict) -> ViTConfig:
        c = c.get("vision_config", c)  # two-tower files nest the image half
        return ViTConfig(image_size=c.get("image_size", image_size), patch_size=c.get("patch_size", patch_size),
                         hidden=c.get("hidden_size", 768), layers=c.get("num_hidden_layers", 12),
                         heads=c.get("num_attention_heads", 12), mlp=c.get("intermediate_size", 3072),
                         activation=c.get("hidden_act", activation), eps=c.get("layer_norm_eps", eps),
                         qkv_bias=c.get("qkv_bias", True), **flags)
    return read


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1,N,D), (N,D) or (D,) to (N,D)."""
    return tensor.view(-1, tensor.shape[-1])


VIT_NAMES = {
    "patches": "embeddings.patch_embeddings.projection",
    "class_tokens": (rows, "embeddings.cls_token"),
    "positions": (rows, "embeddings.position_embeddings"),
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.attention.q": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.attention.k": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.attention.v": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.attention.out": "encoder.layer.{}.attention.output.dense",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.up": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.down": "encoder.layer.{}.output.dense",
    "norm": "layernorm",
}
CLIP_NAMES = {
    "patches": "embeddings.patch_embedding",
    "class_tokens": (rows, "embeddings.class_embedding"),
    "positions": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",  # so spelled on disk
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attention.q": "encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k": "encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v": "encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.up": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.down": "encoder.layers.{}.mlp.fc2",
    "norm": "post_layernorm",
}
DEIT_NAMES = {**VIT_NAMES, "class_tokens": (lambda a, b: rows(torch.cat([a, b], 1)),
                                            "embeddings.cls_token", "embeddings.distillation_token")}

vit = Family(reader(1e-12, "gelu"), VIT_NAMES, r"(pooler|classifier)\..*")
deit = Family(reader(1e-12, "gelu", class_tokens=2), DEIT_NAMES, r"(pooler|(cls_|distillation_)?classifier)\..*")
# CLIP's last_hidden_state is taken before its post_layernorm, which serves the class token's projection alone
clip = Family(reader(1e-5, "quick_gelu", patch_size=32, patch_bias=False, pre_norm=True, post_norm=False), CLIP_NAMES,
              r"text_model\..*|(text|visual)_projection\.weight|logit_scale|post_layernorm\..*|.*\.position_ids")
siglip = Family(reader(1e-6, "gelu_pytorch_tanh", class_tokens=0), CLIP_NAMES,
                r"text_model\..*|head\..*|logit_(scale|bias)|.*\.position_ids")

FAMILIES = {  # config.json's model_type -> family
    "vit": vit, "deit": deit,
    "clip": clip, "clip_vision_model": clip,
    "siglip": siglip, "siglip_vision_model": siglip,
}
