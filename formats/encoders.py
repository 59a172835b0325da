"""Image encoders: each family's config.json and tensor names, as data."""
import math

import torch

from formats.weights import Family, fused_names, name_table, projection_names

BASE = dict(image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            hidden_act="gelu", layer_norm_eps=1e-6)


# ---------------------------------------------------------------------------------------------------------
# config.json -> the fields of ViTConfig

def reader(defaults: dict, **fields):
    """Makes a `Family.config`, which turns config.json into the fields of ViTConfig.

    BASE and `defaults` hold the keys that the family reads, each with the reference's value for a missing
    key. `fields` are those of ViTConfig that config.json doesn't tell.
    """
    defaults = BASE | defaults

    def read(c: dict) -> dict:
        # Two-tower files nest the image half; old CLIP files do so twice, and the reference reads the second
        c = c.get("vision_config_dict") or c.get("vision_config") or c
        c = {key: c.get(key, default) for key, default in defaults.items()}
        gated = c.get("use_swiglu_ffn", False)
        return dict(
            image_size=c["image_size"], patch_size=c["patch_size"],
            width=c["hidden_size"],
            layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            eps=c["layer_norm_eps"],
            mlp=read_mlp_size(c, gated),
            gated=gated,
            activation="silu" if gated else c["hidden_act"],
            qkv_bias=c.get("qkv_bias", True),
            registers=c.get("num_register_tokens", 0),
            window=c.get("window_size", 0),
            global_blocks=tuple(c.get("global_attn_indexes", ())),
            relative_positions=c.get("use_rel_pos", False),
            neck=c.get("output_channels", 0),
            **fields,
        )
    return read


def read_mlp_size(c: dict, gated: bool) -> int:
    """The width of the hidden layer in the MLP; DINOv2 makes a gated one 2/3 as wide, a multiple of 8."""
    size = c["intermediate_size"] if "intermediate_size" in c else int(c["hidden_size"] * c["mlp_ratio"])
    size = c.get("mlp_dim") or size
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


# ---------------------------------------------------------------------------------------------------------
# Tensor names, and functions that make our tensors of theirs

def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1,N,D), (1,G,G,D), (N,D) or (D,) to (N,D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def take_prefix(positions: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
    """Adds to each class token its position: they have the first ones."""
    tokens = torch.cat([as_rows(token) for token in tokens]).float()
    return tokens + as_rows(positions)[:len(tokens)].float()


def take_registers(positions: torch.Tensor, token: torch.Tensor, registers: torch.Tensor) -> torch.Tensor:
    """The class token with its position, then the registers, which have none."""
    return torch.cat([take_prefix(positions, token), as_rows(registers).float()])


def skip_positions(count: int):
    """Leaves out the positions of the `count` class tokens."""
    return lambda tensor: as_rows(tensor)[count:]


def take_third(i: int):
    return lambda tensor: tensor.chunk(3)[i]


def attention_names(path: str) -> dict:
    """The names in ViT's attention: on disk, and in the reference's class, whose block is `path`."""
    return {
        "attention.q": f"attention.attention.query|{path}.attention.q_proj",
        "attention.k": f"attention.attention.key|{path}.attention.k_proj",
        "attention.v": f"attention.attention.value|{path}.attention.v_proj",
        "attention.out": f"attention.output.dense|{path}.attention.o_proj",
    }


POSITIONS = "embeddings.position_embeddings"
VIT_NAMES = name_table({
    "patches": "embeddings.patch_embeddings.projection",
    "prefix": (take_prefix, POSITIONS, "embeddings.cls_token"),
    "positions": (skip_positions(1), POSITIONS), "norm": "layernorm",
}, {
    "norm1": "layernorm_before", "norm2": "layernorm_after",
    **attention_names("layers.{}"),
    "mlp.up": "intermediate.dense|layers.{}.mlp.fc1", "mlp.down": "output.dense|layers.{}.mlp.fc2",
}, "encoder.layer.{}.")
DEIT_NAMES = VIT_NAMES | {
    "prefix": (take_prefix, POSITIONS, "embeddings.cls_token", "embeddings.distillation_token"),
    "positions": (skip_positions(2), POSITIONS),
}
DINOV2_NAMES = name_table(VIT_NAMES, {
    "norm1": "norm1", "norm2": "norm2",
    **attention_names("encoder.layer.{}"),
    "scale1.weight": "layer_scale1.lambda1", "scale2.weight": "layer_scale2.lambda1",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "encoder.layer.{}.")
REGISTERS_NAMES = DINOV2_NAMES | {
    "prefix": (take_registers, POSITIONS, "embeddings.cls_token", "embeddings.register_tokens"),
}


def dinov2_names(names: dict):
    """Makes a `Family.names`. DINOv2's SwiGLU keeps gate and up in one tensor on disk, but apart in the
    reference's class."""
    def with_gate(config: dict) -> dict:
        if not config["gated"]:
            return names

        def take_half(i: int):
            return lambda tensor: tensor if len(tensor) == config["mlp"] else tensor.chunk(2)[i]

        return name_table(names, {
            "mlp.gate": (take_half(0), "mlp.weights_in|encoder.layer.{}.mlp.gate_proj"),
            "mlp.up": (take_half(1), "mlp.weights_in|encoder.layer.{}.mlp.up_proj"),
            "mlp.down": "mlp.weights_out|encoder.layer.{}.mlp.down_proj",
        }, "encoder.layer.{}.")
    return with_gate


CLIP_NAMES = name_table({
    "patches": "embeddings.patch_embedding",
    "prefix": (take_prefix, "embeddings.position_embedding.weight", "embeddings.class_embedding"),
    "positions": (skip_positions(1), "embeddings.position_embedding.weight"),
    "pre_norm": "pre_layrnorm",  # so spelled on disk
    "norm": "post_layernorm",
}, {
    "norm1": "layer_norm1", "norm2": "layer_norm2",
    **projection_names("self_attn", "out_proj"),
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "encoder.layers.{}.")
SIGLIP_NAMES = CLIP_NAMES | {"positions": "embeddings.position_embedding.weight"}


def naflex_names(config: dict) -> dict:
    """A `Family.names`. On disk a patch's weight is a row for its pixels, line by line, each its three
    colours."""
    side = config["patch_size"]

    def as_kernel(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)

    patches = "embeddings.patch_embedding"
    names = {"patches.weight": (as_kernel, f"{patches}.weight"), "patches.bias": f"{patches}.bias"}
    return SIGLIP_NAMES | names


EVA_NAMES = name_table(CLIP_NAMES | {
    "prefix": (take_prefix, "embeddings.position_embedding", "embeddings.class_embedding"),
    "positions": (skip_positions(1), "embeddings.position_embedding"),
}, {
    **fused_names(take_third, "self_attn.qkv"),
    "attention.out": "self_attn.projection",
}, "encoder.layers.{}.")
NANOVLM_NAMES = name_table({
    "patches": "patch_embedding.conv",
    "positions": (as_rows, "patch_embedding.position_embedding"), "norm": "layer_norm",
}, {
    "norm1": "ln1", "norm2": "ln2",
    **fused_names(take_third, "attn.qkv_proj"),
    "attention.out": "attn.out_proj",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "blocks.{}.")
SAM_NAMES = name_table({
    "patches": "patch_embed.projection",
    "positions": (as_rows, "pos_embed"),
    "neck.reduce": (lambda kernel: kernel.flatten(1), "neck.conv1"),  # a 1×1 convolution
    "neck.norm1": "neck.layer_norm1", "neck.norm2": "neck.layer_norm2",
    "neck.mix": "neck.conv2",
}, {
    "norm1": "layer_norm1", "norm2": "layer_norm2",
    **fused_names(take_third, "attn.qkv"),
    "attention.out": "attn.proj",
    "attention.rows": "attn.rel_pos_h", "attention.columns": "attn.rel_pos_w",
    "mlp.up": "mlp.lin1", "mlp.down": "mlp.lin2",
}, "layers.{}.")


# ---------------------------------------------------------------------------------------------------------
# Families. Each regular expression lists tensors that we leave unread

VIT = dict(intermediate_size=3072, qkv_bias=True, layer_norm_eps=1e-12)
vit = Family(reader(VIT, processor="ViT"), VIT_NAMES, r"(pooler|classifier)\..*|embeddings\.mask_token")
deit = Family(reader(VIT, processor="DeiT", class_tokens=2), DEIT_NAMES,
              r"(pooler|(cls_|distillation_)?classifier)\..*|embeddings\.mask_token")
# CLIP's last_hidden_state comes before its post_layernorm, which only the class token's projection uses
CLIP = dict(intermediate_size=3072, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
clip = Family(reader(CLIP, processor="CLIP", patch_bias=False, pre_norm=True, post_norm=False), CLIP_NAMES,
              r"(text_model|(text|visual)_projection|classifier|post_layernorm)\..*|logit_scale"
              r"|.*\.position_ids", "vision_model.")
INTERN_NAMES = name_table(VIT_NAMES, {
    "norm1": "layernorm_before", "norm2": "layernorm_after",
    **projection_names("attention", "projection_layer"),
    "scale1.weight": "lambda_1", "scale2.weight": "lambda_2",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}, "encoder.layer.{}.")


def intern_config(c: dict) -> dict:
    """InternVL's encoder. Its file gives height and width, and the larger ones have other norms."""
    if c.get("norm_type", "layer_norm") != "layer_norm" or c.get("use_qk_norm"):
        raise ValueError("an encoder with RMS norms or norms of queries and keys is not supported")
    sizes = {"image_size": 448, "patch_size": 14}
    for key, default in sizes.items():
        size = c.get(key, default)
        size = size if isinstance(size, list) else [size, size]
        if len({*size}) != 1:
            raise ValueError(f"{key} {size} is not a square")
        sizes[key] = size[0]
    post_norm = not c.get("use_mean_pooling", True)
    return read_intern(c | sizes | {"qkv_bias": c.get("attention_bias", False)}) | {"post_norm": post_norm}


read_intern = reader(dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, qkv_bias=False,
                          intermediate_size=4096), processor="GotOcr2", layer_scale=True)
intern = Family(intern_config, INTERN_NAMES, r"embeddings\.mask_token")
SIGLIP = dict(intermediate_size=3072, hidden_act="gelu_pytorch_tanh")
siglip = Family(reader(SIGLIP, processor="Siglip", class_tokens=0), SIGLIP_NAMES,
                r"(text_model|head|classifier)\..*|logit_(scale|bias)|.*\.position_ids", "vision_model.")


def naflex_config(c: dict) -> dict:
    """SigLIP 2's NaFlex takes any number of patches up to `num_patches`: here that square of them."""
    c = c.get("vision_config") or c
    side = math.isqrt(c.get("num_patches", 256)) * c.get("patch_size", 16)
    return read_naflex(c | {"image_size": side})


read_naflex = reader(SIGLIP, processor="Siglip2", class_tokens=0, antialias=True, interpolation="bilinear")
naflex = Family(naflex_config, naflex_names, siglip.unused, "vision_model.")
IDEFICS3 = SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)
idefics3 = Family(reader(IDEFICS3, processor="Idefics3", class_tokens=0), SIGLIP_NAMES, "")


def nanovlm_config(c: dict) -> dict:
    return siglip.config(dict(
        image_size=c["vit_img_size"], patch_size=c["vit_patch_size"],
        hidden_size=c["vit_hidden_dim"],
        intermediate_size=c["vit_inter_dim"],
        num_hidden_layers=c["vit_n_blocks"],
        num_attention_heads=c["vit_n_heads"],
        layer_norm_eps=c["vit_ln_eps"],
    ))


nanovlm = Family(nanovlm_config, NANOVLM_NAMES, "")
DINOV2 = dict(mlp_ratio=4, qkv_bias=True, use_swiglu_ffn=False)
dinov2 = Family(reader(DINOV2 | dict(patch_size=14), processor="Bit", layer_scale=True),
                dinov2_names(DINOV2_NAMES), r"classifier\..*|embeddings\.mask_token")
REGISTERS = DINOV2 | dict(num_register_tokens=4)
registers = Family(reader(REGISTERS, processor="Bit", layer_scale=True, antialias=True),
                   dinov2_names(REGISTERS_NAMES), dinov2.unused)
EVA = dict(patch_size=14, hidden_size=1408, num_hidden_layers=39, num_attention_heads=16,
           intermediate_size=6144, qkv_bias=True)
eva = Family(reader(EVA, processor="Blip"), EVA_NAMES,
             r"(qformer|language_model|(language|vision|text)_projection|itm_head)\..*|query_tokens"
             r"|.*\.position_ids|embeddings\.(word|position)_embeddings\.weight", "vision_model.")
SAM = dict(image_size=1024, mlp_dim=None, mlp_ratio=4.0, qkv_bias=True, use_rel_pos=True, window_size=14,
           global_attn_indexes=(2, 5, 8, 11), output_channels=256)
sam = Family(reader(SAM, processor="Sam", class_tokens=0, post_norm=False), SAM_NAMES,
             r"(shared_image_embedding|prompt_encoder|mask_decoder)\..*", "vision_encoder.")
FAMILIES = {  # config.json's model_type -> family
    "vit": vit, "deit": deit,
    "clip": clip, "clip_vision_model": clip._replace(path=""),
    "siglip": siglip, "siglip_vision_model": siglip._replace(path=""), "idefics3_vision": idefics3,
    "nanovlm": nanovlm, "siglip2": naflex, "siglip2_vision_model": naflex._replace(path=""),
    "dinov2": dinov2, "dinov2_with_registers": registers,
    "blip-2": eva, "blip_2_vision_model": eva._replace(path=""),
    "sam": sam, "sam_vision_model": sam, "internvl_vision": intern,
}
