"""The language model equals the reference implementations (see fixtures/make.py), and generation is one text,
however it is batched."""
import gc
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from formats.files import InputError
from fixtures.compare import close
from llm import LLM, KVCache
from support.decoding import sample
from lora import add_lora
from support import layers

FAMILIES = ("gpt2_wide", "opt", "opt_post", "opt_plain", "llama3", "llama_linear", "smollm3",
            "smollm3_window", "mistral", "qwen2", "qwen3", "phi3", "phi3_partial", "gpt_neox",
            "gpt_neox_serial",
            "gemma3")
DECODERS = ("gpt2", "gpt2_old", "llama", "llama_wide", "llama_sharded")


def test_loading_looks_for_no_garbage(fixtures, tmp_path):
    collections = []

    def count(phase, about):
        collections.append(phase)

    threshold = gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(20, 1, 1)  # a collection is due all the time
    try:
        with pytest.raises(InputError, match="no such"):
            LLM.from_pretrained(str(tmp_path / "none"))
        assert gc.isenabled()
        collections.clear()
        loaded = LLM.from_pretrained(str(fixtures / "gpt2"))
        during_load = len(collections)
        loaded = [[] for _ in range(100)]
        assert loaded and collections
        assert during_load < 10  # those before it begins and on the way out
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(count)


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


@pytest.mark.parametrize("name", ("llama3", "qwen3", "gemma3"))
def test_training_keeps_less_and_finds_the_same_gradient(name, fixtures, monkeypatch):
    llm = LLM.from_pretrained(str(fixtures / name)).requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in llm.parameters()}
    torch.manual_seed(0)
    x = torch.randn(3, 17, llm.config.hidden, requires_grad=True)
    wanted = torch.randn_like(x)

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = llm.hidden(x)
        return y.detach(), *torch.autograd.grad(y, x, wanted), sum(size for size, _ in kept.values())

    y, gradient, bytes = run()
    monkeypatch.setattr(layers, "spares", lambda x: False)
    plain_y, plain_gradient, plain_bytes = run()
    assert torch.equal(y, plain_y)
    close(gradient / plain_gradient.std(), plain_gradient / plain_gradient.std())
    assert bytes < 0.9 * plain_bytes

    # A gradient of this gradient would be wrong: it is refused
    monkeypatch.undo()
    [first] = torch.autograd.grad(llm.hidden(x), x, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family_equals_reference(name, fixtures):
    llm, golden = LLM.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
    tokens = golden["tokens"]
    close(llm(tokens), golden["logits"])
    close(llm(tokens[:, :8]), golden["logits8"])
    # batched, with padding; the longer one alone, and from embeddings
    prompts = [tokens[0, :13], tokens[0, :21]]
    starts = {"tokens": prompts}, {"tokens": prompts[1:]}, {"embeddings": [llm.embed(prompts[1])]}
    greedy, beam = ([golden[f"{how}{n}"].tolist() for n in (13, 21)] for how in ("greedy", "beam"))
    beam = [row[:-1] if row[-1] in llm.config.end_tokens else row for row in beam]
    for start in starts:
        rows = len(*start.values())
        for llm.static in (None, True):
            assert llm.generate(**start, max_tokens=64, end_tokens=()) == greedy[-rows:]
        assert llm.generate(**start, max_tokens=64, beams=3) == beam[-rows:]
    half = LLM.from_pretrained(str(fixtures / name), torch.bfloat16)(tokens)
    assert half.dtype == torch.bfloat16
    assert (half - golden["logits"]).abs().mean() < 0.2 * golden["logits"].abs().mean()


@pytest.mark.parametrize("penalty, wanted", (
    (0.0, [12]), (0.5, [48, 51, 18, 48, 54, 48, 10]),
    (2.0, [48, 51, 18, 48, 54, 48, 48, 48, 58, 20, 20, 48, 48, 48, 50])))
def test_a_length_penalty_is_the_reference_s(penalty, wanted, fixtures):
    """What transformers 5.24 gives for generate(num_beams=3, length_penalty=…)."""
    llm = LLM.from_pretrained(str(fixtures / "qwen2"))
    found = llm.generate(torch.tensor([[26, 60, 25, 9, 44]]), beams=3, length_penalty=penalty, max_tokens=15,
                         end_tokens=(41, 12, 1, 10, 4), keep_end=True)
    assert found == [wanted]


TIED = {"gpt2": ("transformer.wte", "lm_head"), "opt": ("model.decoder.embed_tokens", "lm_head"),
        "llama": ("model.embed_tokens", "lm_head"), "gemma3": ("model.embed_tokens", "lm_head"),
        "gpt_neox_serial": ("gpt_neox.embed_in", "embed_out")}


@pytest.mark.parametrize("name", TIED)
@torch.no_grad()
def test_a_tied_pair_is_one_tensor_under_either_name(name, fixtures, tmp_path, capsys):
    embedding, head = (f"{module}.weight" for module in TIED[name])
    state, golden = (load_file(fixtures / name / f"{file}.safetensors") for file in ("model", "golden"))
    (tmp_path / "config.json").write_bytes((fixtures / name / "config.json").read_bytes())

    def logits(**changes) -> torch.Tensor:
        tensors = {key: tensor for key, tensor in (state | changes).items() if tensor is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        return LLM.from_pretrained(str(tmp_path))(golden["tokens"])

    words = state[embedding]
    close(logits(**{embedding: None, head: words}), golden["logits"])
    close(logits(**{head: words.clone()}), golden["logits"])
    assert not capsys.readouterr().err
    # a head of its own is read as one, whatever config.json says, and that is said
    other = logits(**{head: words.flip(0)})
    close(other, golden["logits"].flip(-1))
    assert f"'{head}' differs from '{embedding}'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("gpt2", "qwen2"))  # tied, with biases; grouped keys
@torch.no_grad()
def test_packed_weights_say_the_same(name, dtype, fixtures):
    llm, packed = (LLM.from_pretrained(str(fixtures / name), dtype) for _ in range(2))
    packed.pack()
    tokens = load_file(fixtures / name / "golden.safetensors")["tokens"][:, :20]
    assert not any(type(part) is torch.nn.Linear for part in packed.modules())
    assert torch.allclose(packed(tokens), llm(tokens), atol=1e-4 if dtype == torch.float32 else 0.02)
    assert packed.generate(tokens, max_tokens=8) == llm.generate(tokens, max_tokens=8)


@pytest.mark.parametrize("name", ("llama", "gpt2"))  # heads share keys, and don't
@torch.no_grad()
def test_attention_may_come_in_the_layout_of_a_gpus_kernel(name, fixtures, monkeypatch):
    """With a mask CUDA takes a kernel whose result is (B,T,H,hd) in memory, seen as (B,H,T,hd)."""
    llm, fused = LLM.from_pretrained(str(fixtures / name)), F.scaled_dot_product_attention
    prompts = [torch.arange(3, 8), torch.arange(2, 14)]
    wanted, calls = llm.generate(prompts, max_tokens=6, end_tokens=()), []

    def transposed(*inputs, **options) -> torch.Tensor:
        calls.append(inputs[0].shape)
        return fused(*inputs, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert llm.generate(prompts, max_tokens=6, end_tokens=()) == wanted and calls
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_packing_leaves_a_gate_its_activation(fixtures):
    """Also where the gate, having a LoRA, can't be packed, and what it gates can."""
    llm, packed = (LLM.from_pretrained(str(fixtures / "gemma3")) for _ in range(2))
    for one in (llm, packed):
        torch.manual_seed(0)
        add_lora(one, 2, 2, ["gate"])
    packed.pack()
    tokens = load_file(fixtures / "gemma3" / "golden.safetensors")["tokens"][:, :20]
    assert torch.allclose(packed(tokens), llm(tokens), atol=1e-4)


def old_rope(c, **names):
    """config.json before `rope_parameters`: `rope_scaling`, and keys of config.json itself."""
    r = c.pop("rope_parameters")
    c |= {names.get(key, key): r.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in r}
    r["type"] = r.pop("rope_type")
    return c | {"rope_scaling": None if r["type"] == "default" else r}


def old_gemma(c):
    r = c.pop("rope_parameters")
    del c["layer_types"]
    return {"model_type": "gemma3", "text_config": c | {
        "sliding_window_pattern": 2, "rope_local_base_freq": r["sliding_attention"]["rope_theta"],
        "rope_theta": r["full_attention"].pop("rope_theta"), "rope_scaling": r["full_attention"]}}


# How public files differ from what the reference writes today: fixture, config.json, a tensor's name, tensors
# besides
OLD = {
    "opt": ("opt", dict, lambda name: name.removeprefix("model."), {"lm_head.weight": "embed_tokens"}),
    "blip-2": ("opt", lambda c: {"model_type": "blip-2", "text_config": c},
               lambda name: "language_model." + name,
               {"language_model.lm_head.weight": "embed_tokens", "query_tokens": "norm",
                "qformer.layernorm.weight": "norm",
                "vision_model.post_layernorm.weight": "norm", "language_projection.bias": "norm"}),
    "llama3": ("llama3", old_rope, str, {"lm_head.weight": "embed_tokens"}),
    "llama linear": ("llama_linear", old_rope, str,
                     {"model.layers.0.self_attn.rotary_emb.inv_freq": "norm"}),
    "smollm3": ("smollm3", lambda c: old_rope(c | {"no_rope_layers": None, "layer_types": None}), str, {}),
    "phi3": ("phi3_partial", old_rope, str, {}),
    "gpt_neox": ("gpt_neox",
                 lambda c: old_rope(c, rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct"), str,
                 {f"gpt_neox.layers.0.attention.{name}": "norm"
                  for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}),
    "gemma3": ("gemma3", old_gemma, lambda name: "language_model." + name,
               {"vision_tower.vision_model.post_layernorm.weight": "norm",
                "multi_modal_projector.mm_soft_emb_norm.weight": "norm"}),
}


@pytest.mark.parametrize("name", OLD)
@torch.no_grad()
def test_public_files_as_they_were_written(name, fixtures, tmp_path):
    fixture, config, rename, more = OLD[name]
    state = load_file(fixtures / fixture / "model.safetensors")
    more = {key: next(t.clone() for n, t in state.items() if part in n) for key, part in more.items()}
    save_file({rename(key): tensor for key, tensor in state.items()} | more, tmp_path / "model.safetensors")
    old = config(json.loads((fixtures / fixture / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(old))
    golden = load_file(fixtures / fixture / "golden.safetensors")
    llm = LLM.from_pretrained(str(tmp_path))
    assert llm.config.end_tokens == LLM.from_pretrained(str(fixtures / fixture)).config.end_tokens
    close(llm(golden["tokens"]), golden["logits"])


def test_language_model_of_blip2(fixtures):
    llm = LLM.from_pretrained(str(fixtures / "blip2"))
    row, = llm.generate(torch.ones(1, 3, dtype=torch.long), max_tokens=4, beams=2, end_tokens=())
    assert llm.config.hidden == 16 and len(row) == 4


def test_what_cannot_be_is_said(fixtures, tmp_path):
    llm = LLM.from_pretrained(str(fixtures / "phi3"))
    with pytest.raises(InputError, match="temperature"):
        llm.generate(torch.arange(1, 9)[None], beams=2, temperature=1.0)
    with pytest.raises(InputError, match="101 tokens are more than the language model's 100"):
        llm(torch.ones(1, 101, dtype=torch.long))
    with pytest.raises(InputError, match="101 tokens are more than the language model's 100"):
        llm.generate(torch.arange(1, 9)[None], max_tokens=10 ** 12, end_tokens=())  # without their memory
    config = json.loads((fixtures / "llama3" / "config.json").read_text())
    for change, message in (*(({"rope_parameters": {"rope_type": kind, "factor": 4.0}},
                               f"'{kind}' is not supported") for kind in ("yarn", "dynamic", "longrope")),
                            ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
                            ({"layer_types": ["full_attention"] * 2}, "3 layers")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        (tmp_path / "model.safetensors").write_bytes((fixtures / "llama3" / "model.safetensors").read_bytes())
        with pytest.raises(InputError, match=message):
            LLM.from_pretrained(str(tmp_path))


@torch.no_grad()
def test_prefill_in_parts_equals_prefill_at_once(fixtures):
    for name in ("gpt2", "llama", "mistral", "gemma3"):
        llm = LLM.from_pretrained(str(fixtures / name))
        golden = load_file(fixtures / name / "golden.safetensors")
        x = llm.embed(golden["tokens"])
        cache = KVCache(llm.config, 2, x.shape[1], x)
        parts = [llm.logits(llm.hidden(part, cache=cache)) for part in x.split((5, 1, 8, x.shape[1] - 14), 1)]
        close(torch.cat(parts, 1), golden["logits"])


def test_sample_narrows_the_choice():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    draw = lambda **options: torch.bincount(  # noqa: E731
        sample(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0,
                          "generator": torch.Generator().manual_seed(0), **options}),
        minlength=4) / 4000
    assert torch.allclose(draw(), torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.03)
    assert torch.allclose(draw(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)
    # 0.4 falls short of 0.6
    assert torch.allclose(draw(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03)
    assert torch.allclose(draw(top_p=0.3), torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(draw(temperature=0), torch.tensor([1.0, 0, 0, 0]))
    assert draw(temperature=0.5)[0] > 0.5
    assert (sample(logits.flip(-1), 1e-45, 0, 1.0) == 3).all()


# ---------------------------------------------------------------------------------------------------------
# Real checkpoints, where they are at hand

@torch.no_grad()
def test_real_checkpoints_equal_reference(shared, fixtures):
    golden = load_file(fixtures / "real.safetensors")
    for name in ("caption-lm-llama", "caption-lm-gpt2", "stories260K"):
        llm = LLM.from_pretrained(str(shared / "checkpoints" / name))
        close(llm(golden[f"{name}.tokens"])[:, ::6, ::17], golden[f"{name}.logits"])


def test_stories_tell_the_published_text(shared, fixtures):
    # the model's tokenizer is not at hand: these pieces, one for each id, were found by aligning ids and
    # published text; 410 and above are single characters, as SentencePiece numbers them
    pieces = json.loads((fixtures / "stories260k_pieces.json").read_text())
    assert len(set(pieces.values())) == len(pieces)
    assert all((len(p) == 1) == (int(i) in (13, *range(410, 512))) for i, p in pieces.items())
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
        x = block(x, None, mask, None)
        close(x, reference[f"block{i}"], 1e-5)
    inputs = list(itertools.product(range(3), repeat=6))
    assert llm.generate(torch.tensor(inputs), max_tokens=6) == [sorted(row) for row in inputs]
