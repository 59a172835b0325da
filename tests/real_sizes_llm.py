"""Compares language models of public sizes, with random weights in the public layout, with the reference implementations,
and prints one row of a Markdown table for each. Needs transformers, and 9 GB of memory for the largest.

    python tests/real_sizes_llm.py [gpt2 …]
"""
import gc
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "fixtures")]

import torch
import transformers as tf

from make import enliven, randomise
from llm import LLM

# ---------------------------------------------------------------------------------------------------------
# Decoders

OPT350M = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, ffn_dim=4096, word_embed_proj_dim=512,
               do_layer_norm_before=False)
SMOLLM2 = dict(vocab_size=49152, hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
               intermediate_size=2560, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
               rope_parameters=dict(rope_type="default", rope_theta=1e5))
LLAMA32 = dict(vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               head_dim=64, intermediate_size=8192, max_position_embeddings=131072, rms_norm_eps=1e-5,
               tie_word_embeddings=True, rope_parameters=dict(
                   rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192))
SMOLLM3 = dict(max_position_embeddings=65536, num_hidden_layers=8, rope_parameters=dict(rope_type="default", rope_theta=5e6))
MISTRAL = dict(num_hidden_layers=2, max_position_embeddings=32768, rms_norm_eps=1e-5)
QWEN25 = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
              max_position_embeddings=32768, max_window_layers=24, sliding_window=32768, tie_word_embeddings=True,
              rope_parameters=dict(rope_type="default", rope_theta=1e6))
QWEN3 = dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             intermediate_size=3072, max_position_embeddings=40960, tie_word_embeddings=True,
             rope_parameters=dict(rope_type="default", rope_theta=1e6))
PHI3 = dict(num_hidden_layers=4, sliding_window=2047, rms_norm_eps=1e-5)
PYTHIA = dict(vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
              bos_token_id=0, eos_token_id=0)
GEMMA3 = dict(vocab_size=262144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
              intermediate_size=2048, max_position_embeddings=32768, sliding_window=512)

DECODERS = {  # row -> class, config, tokens of the prompt whose logits are compared
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(), 600),
    "opt-125m": (tf.OPTForCausalLM, tf.OPTConfig(), 600),
    "opt-350m": (tf.OPTForCausalLM, tf.OPTConfig(**OPT350M), 300),
    "SmolLM2-360M": (tf.LlamaForCausalLM, tf.LlamaConfig(**SMOLLM2), 300),
    "Llama-3.2-1B": (tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA32), 60),
    "SmolLM3-3B, 8 of 36 layers": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**SMOLLM3), 60),
    "Mistral-7B-v0.1, 2 of 32 layers": (tf.MistralForCausalLM, tf.MistralConfig(**MISTRAL), 100),
    "Qwen2.5-0.5B": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**QWEN25), 200),
    "Qwen3-0.6B": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**QWEN3), 200),
    "Phi-3-mini-4k-instruct, 4 of 32 layers": (tf.Phi3ForCausalLM, tf.Phi3Config(**PHI3), 2200),
    "pythia-70m": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**PYTHIA), 600),
    "gemma-3-270m": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GEMMA3), 700),
}


@torch.inference_mode()
def decoder(name: str) -> str:
    """One row: the model's size, its logits' scale, their largest difference from the reference's, and the texts."""
    kind, config, T = DECODERS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = enliven(randomise(kind(config), 1), 0.3)
        model.save_pretrained(folder)
        tokens = torch.randint(10, config.vocab_size, (1, T), generator=torch.Generator().manual_seed(2))

        def logits(model) -> torch.Tensor:
            if isinstance(model, LLM):
                return model.logits(model.hidden(model.embed(tokens))[:, -50:])
            return model(tokens, logits_to_keep=50).logits  # of the last 50 tokens

        reference = logits(model)
        text = model.generate(tokens[:, :20], attention_mask=torch.ones(1, 20), max_new_tokens=64, do_sample=False,
                              pad_token_id=0, eos_token_id=-1)[0, 20:].tolist()
        del model
        gc.collect()
        llm = LLM.from_pretrained(folder)
        error = (logits(llm) - reference).abs().max()
        same = sum(a == b for a, b in zip(llm.generate(tokens[:, :20], max_tokens=64, end_tokens=())[0], text, strict=True))
        millions = sum(p.numel() for p in llm.parameters()) / 1e6
    return (f"| {name} | {millions:.0f} M | {T} | {reference.std():.2f} | {error:.1e} | {same} of 64, {len(set(text))} different |")


if __name__ == "__main__":
    print("| decoder | parameters | tokens | scale of logits | largest error | greedy tokens that agree |")
    print("|---" * 6 + "|")
    for row in sys.argv[1:] or DECODERS:
        print(decoder(row), flush=True)
