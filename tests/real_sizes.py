"""Compares models of public sizes, with random weights in the public layout, with the reference
implementations, and prints one row of a Markdown table for each; measures whole VLMs. Needs transformers, and
16 GB of memory, and of disk for the while, for the largest.

    python tests/real_sizes.py [siglip-so400m-patch14-384 gpt2 …]
"""
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "fixtures")]

import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file

from adapters import PixelShuffle, VLM
from formats import encoders, languages
from formats.vlms import PUBLIC
from formats.weights import Family
from llm import LLM, LLMConfig
from make import randomise
from pictures import naflex_inputs
from start import disk
from vit import ViT, ViTConfig

# ---------------------------------------------------------------------------------------------------------
# Encoders

TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=30,
            bos_token_id=0, eos_token_id=0)  # the half that isn't read, small


def clip(**vision) -> tuple:
    return tf.CLIPModel, tf.CLIPConfig(text_config=TEXT, vision_config=vision), "vision_model"


def siglip(**vision) -> tuple:
    return tf.SiglipModel, tf.SiglipConfig(text_config=TEXT, vision_config=vision), "vision_model"


LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
             patch_size=14)
HUGE = dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120,
            patch_size=14)
SO400M = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304,
              patch_size=14)
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
    "siglip2-base-patch16-naflex": ((tf.Siglip2VisionModel, tf.Siglip2VisionConfig(), ""), 256),
    "siglip2-base-patch16-naflex at 384": ((tf.Siglip2VisionModel, tf.Siglip2VisionConfig(), ""), 384),
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
    """One row: the encoder's size, features, their scale, and the largest differences from the reference."""
    (kind, config, where), side = ENCODERS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = randomise(kind(config), 1)
        for parameter, tensor in model.named_parameters():
            if "position_embedding" in parameter or "pos_embed" in parameter:
                tensor.normal_()  # as large as what they are added to: a wrong interpolation would show
        model.save_pretrained(folder)
        tower = model.get_submodule(where)
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
        if "naflex" in name:
            inputs = naflex_inputs(pixels, config.patch_size)
        else:
            interpolate = side != tower.config.image_size and "dinov2" not in name
            inputs = dict(pixel_values=pixels, **dict(interpolate_pos_encoding=True) if interpolate else {})
        out = tower(**inputs, output_hidden_states=True)
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


# ---------------------------------------------------------------------------------------------------------
# Decoders

# name -> (config class, the published config.json, length of the prompt: past the window where there is one)
DECODERS = {
    "gpt2": (tf.GPT2Config, {}, 64),
    "opt-125m": (tf.OPTConfig, {}, 64),
    "opt-350m": (tf.OPTConfig, dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, ffn_dim=4096, word_embed_proj_dim=512,
        do_layer_norm_before=False), 64),
    "SmolLM2-360M": (tf.LlamaConfig, dict(
        vocab_size=49152, hidden_size=960, num_hidden_layers=32, intermediate_size=2560,
        num_attention_heads=15, num_key_value_heads=5,
        max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True), 64),
    "TinyLlama-1.1B": (tf.LlamaConfig, dict(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=22, intermediate_size=5632,
        num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5), 64),
    "Llama-3.2-1B": (tf.LlamaConfig, dict(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5,
        bos_token_id=128000, eos_token_id=128001, tie_word_embeddings=True, rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192)), 64),
    "SmolLM3-3B, 8 of 36 layers": (tf.SmolLM3Config, dict(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=8, intermediate_size=11008,
        num_attention_heads=16, num_key_value_heads=4,
        max_position_embeddings=65536, rope_theta=5000000.0), 64),
    "Mistral-7B-v0.1, 2 of 32 layers": (tf.MistralConfig, dict(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=2, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096,
        rms_norm_eps=1e-5), 4160),
    "Qwen2.5-0.5B": (tf.Qwen2Config, dict(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, intermediate_size=4864,
        num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=True,
        max_window_layers=24, sliding_window=32768, bos_token_id=151643, eos_token_id=151643), 64),
    "Qwen3-0.6B": (tf.Qwen3Config, dict(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=28, intermediate_size=3072,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, rope_theta=1000000.0, tie_word_embeddings=True,
        max_window_layers=28, bos_token_id=151643, eos_token_id=151645), 64),
    "Phi-3-mini-4k, 4 of 32 layers": (tf.Phi3Config, dict(
        vocab_size=32064, hidden_size=3072, num_hidden_layers=4, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=32,
        max_position_embeddings=4096, sliding_window=2047, rms_norm_eps=1e-5), 2100),
    "pythia-70m": (tf.GPTNeoXConfig, dict(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        rotary_pct=0.25, rotary_emb_base=10000, eos_token_id=0), 64),
    "gemma-3-270m": (tf.Gemma3TextConfig, dict(
        vocab_size=262144, hidden_size=640, num_hidden_layers=18, intermediate_size=2048,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        max_position_embeddings=32768, sliding_window=512, rope_theta=1000000.0,
        rope_local_base_freq=10000.0, query_pre_attn_scalar=256), 576),
}
SCALES = {"emb": 1.0, "wte": 1.0, "wpe": 1.0}  # of some weights, by a part of their names
# else, after 24 layers, all tokens look alike
POST_NORM = {"embed_positions": 10.0, "fc2": 0.1, "out_proj": 0.06}


@torch.inference_mode()
def decoder(name: str) -> str:
    """One row: the model's size, the prompt's length, the largest difference of the last 64 logits, and the
    greedy texts."""
    config, sizes, length = DECODERS[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32).eval()
    # none at its default, and so lively that the text doesn't settle on one token
    for key, p in model.named_parameters():
        scale = next((value for part, value in ((POST_NORM if name == "opt-350m" else {}) | SCALES).items()
                      if part in key), 2)
        if p.dim() > 1:
            p.mul_(scale * p[0].numel() ** -0.5 / p[:64].std())
        else:
            p.add_(torch.randn_like(p), alpha=0.1).add_(key.endswith(("q_norm.weight", "k_norm.weight")))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokens = torch.randint(0, model.config.vocab_size, (1, length))
    logits = model(tokens, logits_to_keep=64).logits
    greedy = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64,
                            do_sample=False)[0, length:]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        del model
        llm = LLM.from_pretrained(folder)
    error = (llm.logits(llm.hidden(llm.embed(tokens))[:, -64:]) - logits).abs().max()
    same = llm.generate(tokens, max_tokens=64)[0] == greedy.tolist()
    size = sum(p.numel() for p in llm.parameters()) / 1e6
    return (f"| {name} | {size:.0f}M | {length} | {error:.1e} | {logits.std():.2f} | "
            f"{'same' if same else 'differ'}, {len(set(greedy.tolist()))} different |")


# ---------------------------------------------------------------------------------------------------------
# Whole VLMs: how long they take, in bfloat16

SMOLLM2 = dict(vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192)
SMOLLM2_360M = SMOLLM2 | dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
                              num_attention_heads=15, num_key_value_heads=5)
BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            patch_size=16)
TILES = dict(size=dict(longest_edge=2048), max_image_size=dict(longest_edge=512))


def smolvlm(text: dict) -> tuple:
    return tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig(
        vision_config=BASE | dict(image_size=512), text_config=text | dict(model_type="llama"),
        scale_factor=4)


class NanoVLM:
    """Stands where a class of the reference does: the names of nanoVLM's files are those that we read."""

    def __init__(self, config: dict):
        vit, llm, row = encoders.FAMILIES["nanovlm"], languages.FAMILIES["nanovlm"], PUBLIC["nanovlm"]
        self.vit, self.llm = ViT(ViTConfig(**vit.config(config))), LLM(LLMConfig(**llm.config(config)))
        adapter = PixelShuffle(self.vit.config.width, self.llm.config.width, self.vit.config.grid)
        self.state = {"vision_encoder.patch_embedding.position_embedding": self.vit.positions[None],
                      **disk(self.vit, vit, "vision_encoder."), **disk(self.llm, llm, "decoder."),
                      **disk(adapter, Family(row.config, row.names, ""), "MP.")}

    def state_dict(self) -> dict:
        return self.state


# name -> (class, config), the fixture whose tokenizer it takes, what preprocessor_config.json says
VLMS = {
    "SmolVLM-256M": (smolvlm(SMOLLM2), "smolvlm", TILES),
    "SmolVLM-256M --no-split": (smolvlm(SMOLLM2), "smolvlm", TILES),
    "SmolVLM-500M": (smolvlm(SMOLLM2_360M), "smolvlm", TILES),
    "llava-interleave-qwen-0.5b": ((tf.LlavaForConditionalGeneration, tf.LlavaConfig(
        vision_config=tf.SiglipVisionConfig(**SO400M | dict(num_hidden_layers=26), image_size=384,
                                            vision_use_head=False),
        text_config=dict(model_type="qwen2", vocab_size=152000, hidden_size=1024, intermediate_size=2816,
                         num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
                         tie_word_embeddings=True),
        vision_feature_select_strategy="full", vision_feature_layer=-1)),
        "llava_qwen", dict(size=dict(height=384, width=384))),
    "blip2-opt-2.7b": ((tf.Blip2ForConditionalGeneration, tf.Blip2Config(text_config=dict(
        model_type="opt", hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
        word_embed_proj_dim=2560))), "blip2_opt", dict(size=dict(height=224, width=224))),
    "nanoVLM-222M": ((NanoVLM, dict(
        vit_hidden_dim=768, vit_inter_dim=3072, vit_patch_size=16, vit_img_size=224, vit_n_heads=12,
        vit_n_blocks=12, vit_ln_eps=1e-6, lm_hidden_dim=576, lm_inter_dim=1536, lm_rms_eps=1e-5,
        lm_re_base=100000,
        lm_max_position_embeddings=8192, lm_vocab_size=49152, lm_n_heads=9, lm_n_kv_heads=3, lm_n_blocks=30,
        lm_tie_weights=True, lm_tokenizer="", mp_pixel_shuffle_factor=2)), "nanovlm_first", {}),
    "llava-1.5-7b": ((tf.LlavaForConditionalGeneration, tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                          num_attention_heads=16, image_size=336, patch_size=14),
        text_config=dict(model_type="llama", vocab_size=32064), tie_word_embeddings=False)),
        "llava", dict(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))),
}


def write_random(folder: Path, name: str) -> None:
    """A checkpoint of a VLM with random weights, shard by shard, never whole in memory."""
    (kind, config), fixture, settings = VLMS[name]
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in kind(config).state_dict().items()}
    if getattr(config, "tie_word_embeddings", True):
        shapes = {key: shape for key, shape in shapes.items() if not key.endswith("lm_head.weight")}
    where, shard, size = {}, {}, 0
    for i, (key, shape) in enumerate(shapes.items()):
        scale = 0.02 if len(shape) > 1 else 0.1
        shard[key] = torch.randn(shape, dtype=torch.bfloat16) * scale + ("norm" in key)
        size += shard[key].nbytes
        if size > 1 << 30 or i == len(shapes) - 1:
            file = f"model-{len(set(where.values())) + 1}.safetensors"
            save_file(shard, folder / file)
            where |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    source = HERE / "fixtures" / fixture
    small = json.loads((source / "config.json").read_text())
    image = {key: small[key] for key in ("image_token_id", "image_token_index") if key in small}
    (folder / "config.json").write_text(json.dumps((config if kind is NanoVLM else config.to_dict()) | image))
    if settings:
        processor = json.loads((source / "processor_config.json").read_text())["image_processor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    shutil.copy(source / "tokenizer.json", folder)


def whole(name: str) -> str:
    """One row: size, ids of a prompt with a picture of 1024 × 768 px, seconds from picture to first token,
    tokens per second after it, and what memory it took at most."""
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), name)
        start = time.time()
        vlm = VLM.from_pretrained(folder, torch.bfloat16)
        loaded, vlm.processor.ends = time.time() - start, ()
        picture = [Image.effect_noise((1024, 768), 60).convert("RGB")]
        vlm.processor.split = not name.endswith("--no-split")
        question = "What is this?"
        prompt = len(vlm.processor.ask(picture, question)[0][0].ids)
        seconds = []
        for tokens in (1, 33):
            start = time.time()
            vlm.caption(picture, question, max_tokens=tokens)
            seconds.append(time.time() - start)
    millions = sum(p.numel() for p in vlm.parameters()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # KiB
    return (f"| {name} | {millions:.0f} M | {loaded:.0f} s | {prompt} | {seconds[0]:.1f} s | "
            f"{32 / (seconds[1] - seconds[0]):.1f} | {peak:.1f} GiB |")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for rows, row, header in (
            (ENCODERS, encoder,
             "| encoder | parameters | px | features | scale | error | scale at layer -2 | error |"),
            (DECODERS, decoder,
             "| decoder | parameters | prompt | error | scale of logits | 64 greedy tokens |"),
            (VLMS, whole, "| VLM | parameters | loaded in | prompt | first token | tokens/s | memory |")):
        names = [name for name in rows if name in sys.argv[1:] or len(sys.argv) == 1]
        if names:
            print(f"{header}\n{'|---' * (header.count('|') - 1)}|")
        for name in names:
            print(row(name), flush=True)
