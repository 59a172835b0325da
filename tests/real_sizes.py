"""Compares models of public sizes, with random weights in the public layout, with the reference implementations, and
prints one row of a Markdown table for each. Needs transformers, and 10 GB of memory for the largest.

    python tests/real_sizes.py [siglip-so400m-patch14-384 …]
"""
import gc
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "fixtures")]

import torch
import transformers as tf

from make import randomise
from vit import ViT

# ---------------------------------------------------------------------------------------------------------
# Encoders

TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=30,
            bos_token_id=0, eos_token_id=0)  # the half that isn't read, small


def clip(**vision) -> tuple:
    return tf.CLIPModel, tf.CLIPConfig(text_config=TEXT, vision_config=vision), "vision_model"


def siglip(**vision) -> tuple:
    return tf.SiglipModel, tf.SiglipConfig(text_config=TEXT, vision_config=vision), "vision_model"


LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
HUGE = dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14)
SO400M = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14)
GIANT = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True)
DINOV2 = dict(image_size=518, patch_size=14)

ENCODERS = {  # row -> (class, config, where in the model the encoder is), pixels a side
    "vit-base-patch16-224": ((tf.ViTModel, tf.ViTConfig(), ""), 224),
    "vit-base-patch16-224 at 384": ((tf.ViTModel, tf.ViTConfig(), ""), 384),
    "deit-base-distilled-patch16-224": ((tf.DeiTModel, tf.DeiTConfig(), ""), 224),
    "clip-vit-base-patch32": (clip(), 224),
    "clip-vit-large-patch14-336": (clip(**LARGE, image_size=336), 336),
    "CLIP-ViT-H-14-laion2B": (clip(**HUGE, hidden_act="gelu"), 224),
    "siglip-base-patch16-224": (siglip(), 224),
    "siglip-so400m-patch14-384": (siglip(**SO400M, image_size=384), 384),
    "siglip2-base-patch16-256": (siglip(image_size=256), 256),
    "siglip2-base-patch16-256 at 512": (siglip(image_size=256), 512),
    "dinov2-small at 224": (
        (tf.Dinov2Model, tf.Dinov2Config(**DINOV2, hidden_size=384, num_attention_heads=6), ""), 224),
    "dinov2-base at 518": ((tf.Dinov2Model, tf.Dinov2Config(**DINOV2), ""), 518),
    "dinov2-with-registers-base at 224": (
        (tf.Dinov2WithRegistersModel, tf.Dinov2WithRegistersConfig(**DINOV2), ""), 224),
    "dinov2-with-registers-base at 714": (
        (tf.Dinov2WithRegistersModel, tf.Dinov2WithRegistersConfig(**DINOV2), ""), 714),
    "dinov2-giant at 224": ((tf.Dinov2Model, tf.Dinov2Config(**DINOV2, **GIANT), ""), 224),
    "sam-vit-base": ((tf.SamModel, tf.SamConfig(vision_config=dict(mlp_dim=3072)), "vision_encoder"), 1024),
    "blip2-opt-2.7b, vision part": ((tf.Blip2VisionModel, tf.Blip2VisionConfig(), ""), 224),
}


@torch.inference_mode()
def encoder(name: str) -> str:
    """One row: the encoder's size, its features and their scale, and the largest differences from the reference's."""
    (kind, config, where), side = ENCODERS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = randomise(kind(config), 1)
        for parameter, tensor in model.named_parameters():
            if "position_embedding" in parameter or "pos_embed" in parameter:
                tensor.normal_()  # as large as what they are added to: a wrong interpolation would show
        model.save_pretrained(folder)
        tower = model.get_submodule(where)
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
        interpolate = side != tower.config.image_size and "dinov2" not in name
        out = tower(pixels, output_hidden_states=True, **dict(interpolate_pos_encoding=True) if interpolate else {})
        last, middle = out.last_hidden_state, out.hidden_states[-2]
        if last.dim() == 4:  # SAM: (B,C,G,G) and (B,G,G,D)
            last, middle = last.flatten(2).transpose(1, 2), middle.flatten(1, 2)
        del model, tower, out
        gc.collect()
        vit = ViT.from_pretrained(folder, image_size=side)
        errors = [(ours - reference).abs().max() for ours, reference in
                  ((vit(pixels), last), (vit(pixels, layer=-2), middle))]
        millions = sum(p.numel() for p in vit.parameters()) / 1e6
    return (f"| {name} | {millions:.0f} M | {side} | {last.shape[1]} × {last.shape[2]} | {last.std():.2f} "
            f"| {errors[0]:.1e} | {middle.std():.2f} | {errors[1]:.1e} |")


if __name__ == "__main__":
    torch.set_num_threads(2)
    print("| encoder | parameters | px | features | scale | error | scale at layer -2 | error |")
    print("|---" * 8 + "|")
    for row in sys.argv[1:] or ENCODERS:
        print(encoder(row), flush=True)
