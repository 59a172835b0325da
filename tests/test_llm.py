"""The language model equals the reference implementations (see fixtures/make.py), and generation is one text, however it
is batched."""
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from data import InputError
from fixtures.compare import close
from llm import LLM, KVCache, sample

DECODERS = ("gpt2", "gpt2_old", "llama", "llama_wide", "llama_sharded")
FAMILIES = ("gpt2_untied", "opt", "opt_after", "opt_bare", "blip2_opt", "llama3", "llama_linear", "llama_dynamic", "smollm3",
            "mistral", "qwen2", "qwen3", "phi3", "neox", "neox_serial", "gemma3_text", "gemma3")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoder_equals_reference(name, fixtures):
    llm, golden = LLM.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
    tokens = golden["tokens"]
    close(llm(tokens), golden["logits"])
    close(llm(embeddings=llm.embed(tokens)), golden["logits"])
    rows = llm.generate([tokens[0, :3], tokens[0, :9]], max_tokens=20)  # batched, with padding
    alone = [llm.generate(tokens[:1, :n], max_tokens=20)[0] for n in (3, 9)]
    for n, row, single in zip((3, 9), rows, alone):
        reference = golden[f"greedy{n}"].tolist()
        assert row == single == [t for t in reference if t not in llm.config.end_tokens]
    with pytest.raises(InputError, match="41 tokens are more than"):
        llm.generate(tokens[:1, :9], max_tokens=64, end_tokens=())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family_equals_reference(name, fixtures):
    llm, golden = LLM.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
    tokens = golden["tokens"]
    close(llm(tokens), golden["logits"])
    close(llm(embeddings=llm.embed(tokens)), golden["logits"])
    lengths = (5, 12)
    for label, beams in (("greedy", 1), ("beam", 3)):
        reference = [[t for t in golden[f"{label}{n}"].tolist() if t not in llm.config.end_tokens] for n in lengths]
        rows = [tokens[0, :n] for n in lengths]
        assert llm.generate(rows, max_tokens=64, beams=beams) == reference  # batched, with padding
        assert llm.generate(embeddings=[llm.embed(rows[1])], max_tokens=64, beams=beams) == reference[1:]
    half = LLM.from_pretrained(str(fixtures / name), torch.bfloat16)
    assert half.dtype == half(tokens).dtype == torch.bfloat16
    assert (half(tokens).float() - golden["logits"]).std() < 0.2 * golden["logits"].std()


def test_each_row_of_a_batch_keeps_its_own_rotary_scaling(fixtures):
    # beyond the original 20 positions, the frequencies follow a row's length, not the longest's
    llm = LLM.from_pretrained(str(fixtures / "llama_dynamic"))
    tokens = load_file(fixtures / "llama_dynamic" / "golden.safetensors")["tokens"][0]
    alone = [llm.generate([tokens[:n]], max_tokens=8, end_tokens=())[0] for n in (9, 22, 30)]
    assert llm.generate([tokens[:n] for n in (9, 22, 30)], max_tokens=8, end_tokens=()) == alone


# Other spellings of the same configuration: what is added to config.json, None taking an entry away
SPELLINGS = {
    "llama3": dict(rope_parameters=None, rope_theta=900.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "llama_linear": dict(rope_theta=None, rope_scaling=None, rope_parameters=dict(
        rope_type="linear", rope_theta=900.0, factor=2.5)),
    "smollm3": dict(layer_types=None),
    "phi3": dict(rope_parameters=None, partial_rotary_factor=0.5),
    "neox": dict(rotary_pct=None, rotary_emb_base=None, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
    "gemma3_text": dict(rope_parameters=None, rope_theta=900.0, rope_local_base_freq=50.0,
                        rope_scaling=dict(rope_type="linear", factor=2.0), layer_types=None, sliding_window_pattern=3),
}


@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spellings_of_a_config(name, fixtures, tmp_path):
    folder = shutil.copytree(fixtures / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | SPELLINGS[name]
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    golden = load_file(folder / "golden.safetensors")
    close(LLM.from_pretrained(str(folder))(golden["tokens"]), golden["logits"])


@pytest.mark.parametrize("name, changes, message", [
    ("phi3", dict(rope_parameters=dict(rope_type="longrope")), "rotary scaling 'longrope' is not supported"),
    ("llama3", dict(rope_parameters=None, rope_scaling=dict(type="yarn")), "rotary scaling 'yarn' is not supported"),
    ("opt", dict(layer_norm_elementwise_affine=False), "norms without a weight"),
    ("gemma3_text", dict(final_logit_softcapping=30.0), "soft-capped"),
    ("gpt2", dict(scale_attn_weights=False), "scaled by the head's size"),
    ("smollm3", dict(no_rope_layers=[1, 0], layer_types=None), "no_rope_layers are not 3"),
    ("qwen3", dict(layer_types=["full_attention", "full_attention"]), "are not 3"),
    ("qwen3", dict(layer_types=["chunked_attention"] * 3), "chunked_attention"),
    ("mistral", dict(sliding_window=0), "sliding_window is not positive"),
    ("blip2_opt", dict(text_config=dict(model_type="t5")), "its language model is 't5', not 'opt'"),
])
def test_configs_that_are_refused(name, changes, message, fixtures, tmp_path):
    folder = shutil.copytree(fixtures / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        LLM.from_pretrained(str(folder))


@torch.no_grad()
def test_prefill_in_parts_equals_prefill_at_once(fixtures):
    for name in ("gpt2", "llama", "mistral", "gemma3_text"):
        llm, golden = LLM.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
        x = llm.embed(golden["tokens"])[:, :17]
        cache = KVCache(llm.config, 2, 17, x)
        parts = [llm.logits(llm.hidden(part, cache=cache)) for part in x.split((5, 1, 8, 3), 1)]
        close(torch.cat(parts, 1), golden["logits"][:, :17])


def test_sample_narrows_the_choice():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    draw = lambda **options: torch.bincount(  # noqa: E731
        sample(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0), **options}),
        minlength=4) / 4000
    assert torch.allclose(draw(), torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.03)
    assert torch.allclose(draw(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)
    assert torch.allclose(draw(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)  # 0.4 falls short of 0.6
    assert torch.allclose(draw(top_p=0.3), torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(draw(temperature=0), torch.tensor([1.0, 0, 0, 0]))
    assert draw(temperature=0.5)[0] > 0.5


# ---------------------------------------------------------------------------------------------------------
# Real checkpoints, where they are at hand

@torch.no_grad()
def test_real_checkpoints_equal_reference(shared, fixtures):
    golden = load_file(fixtures / "real.safetensors")
    for name in ("caption-lm-llama", "caption-lm-gpt2", "stories260K"):
        llm = LLM.from_pretrained(str(shared / "checkpoints" / name))
        close(llm(golden[f"{name}.tokens"])[:, ::6, ::17], golden[f"{name}.logits"])


def test_stories_tell_the_published_text(shared, fixtures):
    # the model's tokenizer is not at hand: these pieces, one for each id, were found by aligning ids and published text;
    # 410 and above are single characters, as SentencePiece numbers them
    pieces = json.loads((fixtures / "stories260k_pieces.json").read_text())
    assert len(set(pieces.values())) == len(pieces) and all((len(p) == 1) == (int(i) in (13, *range(410, 512)))
                                                            for i, p in pieces.items())
    folder = shared / "checkpoints" / "stories260K"
    published = " " + (folder / "greedy.txt").read_text().rstrip("\n")
    ids, = LLM.from_pretrained(str(folder)).generate([torch.tensor([1])], max_tokens=256)
    assert "".join(pieces.get(str(i), "?") for i in ids).startswith(published)


@torch.no_grad()
def test_nano_sort(shared):
    folder = shared / "checkpoints" / "gpt-nano-sort"
    llm, reference = LLM.from_pretrained(str(folder)), load_file(folder / "reference_activations.safetensors")
    tokens = reference["idx"].long()
    close(llm(tokens), reference["lm_head"], 1e-5)
    x = llm.embed(tokens) + llm.positions.weight
    assert (x - reference["x"]).abs().max() < 1e-5
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    for i, block in enumerate(llm.blocks):
        x = block(x, None, mask, None, i)
        close(x, reference[f"block{i}"], 1e-5)
    inputs = list(itertools.product(range(3), repeat=6))
    assert llm.generate(torch.tensor(inputs), max_tokens=6) == [sorted(row) for row in inputs]
