"""Image encoders: how each family's config.json, tensor names and image settings become ours, as data."""
import torch

from formats.weights import Family, name_table

BASE = dict(image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            hidden_act="gelu", layer_norm_eps=1e-6)


def reader(defaults: dict, **fields):
    """Makes a `Family.config`: config.json to the fields of ViTConfig.

    BASE and `defaults` name the keys that the family reads, each with the value that the reference takes
    where the key is missing. `fields` are those of ViTConfig that no key tells.
    """
    defaults = BASE | defaults

    def read(c: dict) -> dict:
        # two-tower files nest the image half, old CLIP files twice: the reference follows the second
        c = c.get("vision_config_dict") or c.get("vision_config") or c
        c = {key: c.get(key, default) for key, default in defaults.items()}
        mlp = c["intermediate_size"] if "intermediate_size" in c else int(c["hidden_size"] * c["mlp_ratio"])
        mlp, gated = c.get("mlp_dim") or mlp, c.get("use_swiglu_ffn", False)
        return dict(
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
    def gated(config: dict) -> dict:
        def part(i: int):
            return lambda tensor: tensor if len(tensor) == config["mlp"] else tensor.chunk(2)[i]
        return names if not config["gated"] else name_table(names, {
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
