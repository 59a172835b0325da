"""Every adapter turns features into embeddings, and those of public models equal the reference (see
fixtures/make.py)."""
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample
import train
from adapters import (ADAPTERS, IMAGE_POSITIONS, VLM, GatedBlock, PixelShuffle, QFormer, Resampler, TwoWay,
                      build, fourier_places)
from data import LAST, stack
from formats.files import InputError
from formats.vlms import QFORMER_NAMES, qformer_sizes
from formats.weights import Checkpoint, Family, load_weights
from fixtures.compare import close
from fixtures.pictures import picture
from llm import LLM
from lora import add_lora
from support.kernels import PackedLinear
from test_vlm import QUICK, Letters, command, small
from vit import ViT
from conftest import ROOT

SMALL = {adapter: dict(width=16, heads=2) for adapter in ("qformer", "resampler", "twoway", "flamingo")}
KEEP_A_GRID = ("linear", "mlp", "pixelshuffle")


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_adapters_turn_features_into_embeddings(adapter):
    torch.manual_seed(0)
    module = ADAPTERS[adapter](12, 20, 4, **SMALL.get(adapter, {})).eval()
    features = torch.randn(4, 17, 12)  # a class token and 4 × 4 patches
    out = module(features)
    assert out.shape == (4, {"linear": 16, "mlp": 16, "pixelshuffle": 4}.get(adapter, 32), 20)
    assert module.queries == out.shape[1]
    assert torch.allclose(module(features[2:]), out[2:], atol=1e-6)
    for i in range(1, 17):  # every patch counts
        changed = features.clone()
        changed[:, i] += 1
        moved = (module(changed) - out).abs().amax((0, 2)) > 1e-5
        assert moved.any()
        if adapter in KEEP_A_GRID:  # and only in its own place
            side = int(module.queries ** 0.5)
            assert moved.nonzero().tolist() == [[(i - 1) // 4 * side // 4 * side + (i - 1) % 4 * side // 4]]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_learn(adapter):
    """Four pictures, four captions: steps of the optimizer teach which belongs to which."""
    torch.manual_seed(0)
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter=adapter, prompt="",
                     adapter_sizes=SMALL.get(adapter, {}))).train()
    captions = ["a small red circle", "a large blue star", "a big pink cross", "a little green square"]
    features, optimizer = torch.randn(4, 65, 128), torch.optim.Adam(vlm.trained.values(), 5e-3)
    queries = 0 if vlm.adapter.side else vlm.adapter.queries
    batch = vlm.processor.batch([[("", text)] for text in captions], spelled=[[text] for text in captions],
                                queries=queries)
    losses = []
    for _ in range(40):
        loss, spelled = vlm(batch, features)
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        (loss.mean() + spelled.sum() / 16).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_an_adapter_without_weights_imports_no_compiler():
    """As each start does, to compare sizes: the import takes a second."""
    script = """if True:
        import sys, torch
        from adapters import ADAPTERS, LLM, ViT, make_adapter
        vit, llm = ViT.from_pretrained("assets/vit"), LLM.from_pretrained("assets/llm")
        with torch.device("meta"):
            for adapter in ADAPTERS:
                sizes = dict(text=4) if adapter in ("qformer", "twoway") else {}
                make_adapter(dict(adapter=adapter, adapter_sizes=sizes), vit, llm)
        sys.exit(bool({"torch._dynamo", "sympy"} & sys.modules.keys()))"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_a_packed_vlm_says_the_same(adapter, dtype):
    torch.manual_seed(0)
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter=adapter, prompt="",
                     adapter_sizes=SMALL.get(adapter, {})), dtype).eval()
    for name, p in vlm.trained.items():
        torch.nn.init.normal_(p, std=0.2)  # a gate too
    pictures = [picture(40, 40), picture(31, 50)]
    before, said = vlm.embed_images(vlm.features(torch.ones(1, 3, 96, 96))), vlm.caption(pictures, beams=2)
    vlm.pack()
    assert not any(type(part) is torch.nn.Linear for part in vlm.modules())
    after = vlm.embed_images(vlm.features(torch.ones(1, 3, 96, 96)))
    assert (after - before).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05) * before.abs().max()
    assert dtype == torch.bfloat16 or vlm.caption(pictures, beams=2) == said


@pytest.mark.parametrize("lora_from", (None, 1))
def test_packed_frozen_blocks_train_the_same(lora_from):
    torch.manual_seed(0)
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="mlp", prompt="",
                     adapter_sizes={}), torch.float32)
    if lora_from:
        add_lora(vlm.vit.blocks[lora_from:], 2, 4)
        for name, p in vlm.trained.items():
            torch.nn.init.normal_(p, std=0.2)  # B isn't zero
    pixels = torch.rand(2, 3, 96, 96)

    def gradients():
        features = vlm.features(pixels)
        grads = torch.autograd.grad(vlm.embed_images(features).square().mean(), [*vlm.trained.values()],
                                    allow_unused=True)
        return features.detach(), [grad for grad in grads if grad is not None]

    features, before = gradients()
    vlm.pack_frozen()
    packed = [any(type(part) is PackedLinear for part in block.modules()) for block in vlm.vit.blocks]
    assert packed == [lora_from is None or i < lora_from for i in range(len(packed))]
    again, after = gradients()
    assert torch.allclose(again, features, atol=1e-4)
    assert len(after) == len(before)
    for new, old in zip(after, before):
        assert (new - old).abs().max() <= 1e-4 * old.abs().max()


def load(module: torch.nn.Module, path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Gives a module the weights of a golden file, `names` leading from the beginnings of our names to
    theirs, "{}" standing for a number. What isn't named is the identity or nothing. Returns the rest of the
    file."""
    golden = load_file(path)
    for name, p in module.named_parameters():
        number = re.search(r"\.\d+\.", name)
        key = name.replace(number[0], ".{}.") if number else name
        ours = next((ours for ours in names if key == ours or key.startswith(ours + ".")), None)
        if ours is None:
            torch.nn.init.eye_(p) if p.dim() > 1 and p.shape[0] == p.shape[1] else torch.nn.init.zeros_(p)
        else:
            theirs = names[ours] + key.removeprefix(ours)
            p.copy_(golden.pop(theirs.replace("{}", number[0][1:-1]) if number else theirs))
    return golden


@torch.no_grad()
def test_pixelshuffle_equals_idefics3(fixtures):
    adapter = PixelShuffle(7, 10, 6, scale=3)
    golden = load(adapter, fixtures / "pixelshuffle.safetensors", {"projection": "modality_projection.proj"})
    close(adapter(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_squares_beyond_the_grid_have_zeros():
    adapter = PixelShuffle(3, 10, 5, scale=2)
    features = torch.randn(2, 26, 3)  # a class token, 5 × 5 patches
    larger = torch.zeros(2, 6, 6, 3)
    larger[:, :5, :5] = features[:, 1:].view(2, 5, 5, 3)
    whole = PixelShuffle(3, 10, 6, scale=2)
    whole.load_state_dict(adapter.state_dict())
    assert (adapter.side, adapter.queries) == (3, 9)
    close(adapter(features), whole(larger.flatten(1, 2)))
    for scale in (0, 6):
        with pytest.raises(InputError, match="5 × 5 patches have no square of"):
            PixelShuffle(3, 10, 5, scale=scale)


@torch.no_grad()
def test_resampler_equals_idefics(fixtures):
    adapter = Resampler(12, 12, 3, queries=5, layers=2, width=12, heads=3)
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "output_proj"}
    golden = load(adapter, fixtures / "resampler.safetensors", {
        "query": "latents", "norm": "layer_norm",
        "blocks.{}.source_norm": "blocks.{}.0.context_layer_norm",
        "blocks.{}.norm1": "blocks.{}.0.latents_layer_norm",
        **{f"blocks.{{}}.attention.{ours}": f"blocks.{{}}.0.{theirs}" for ours, theirs in parts.items()},
        "blocks.{}.norm2": "blocks.{}.1.ln",
        "blocks.{}.mlp.up": "blocks.{}.1.fc", "blocks.{}.mlp.down": "blocks.{}.1.c_proj"})
    assert golden.keys() == {"features", "embeddings"}
    close(adapter(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_twoway_equals_sam(fixtures):
    adapter = TwoWay(12, 12, 4, queries=5, layers=3, width=12, heads=3, mlp=20)
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    attentions = {"blocks.{}.attention": "layers.{}.self_attn",
                  "blocks.{}.to_image": "layers.{}.cross_attn_token_to_image",
                  "blocks.{}.to_tokens": "layers.{}.cross_attn_image_to_token",
                  "to_image": "final_attn_token_to_image"}
    golden = load(adapter, fixtures / "twoway.safetensors", {
        "query": "query", "norm": "layer_norm_final_attn",
        **{f"{mine}.{ours}": f"{their}.{theirs}"
           for mine, their in attentions.items() for ours, theirs in parts.items()},
        **{f"blocks.{{}}.norm{i}": f"layers.{{}}.layer_norm{i}" for i in (1, 2, 3)},
        "blocks.{}.image_norm": "layers.{}.layer_norm4",
        "blocks.{}.mlp.up": "layers.{}.mlp.lin1", "blocks.{}.mlp.down": "layers.{}.mlp.lin2"})
    assert golden.keys() == {"features", "matrix", "places", "embeddings"}
    adapter.places = fourier_places(golden["matrix"], 4)
    close(adapter.places, golden["places"])
    close(adapter(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_qformer_equals_blip2(fixtures):
    folder = fixtures / "blip2"
    checkpoint, golden = Checkpoint(str(folder)), load_file(folder / "golden.safetensors")
    with torch.device("meta"):
        width = checkpoint.config["qformer_config"]["encoder_hidden_size"]
        qformer = QFormer(width, checkpoint.config["text_config"]["hidden_size"], 0,
                          **qformer_sizes(checkpoint.config))
    family = Family(dict, QFORMER_NAMES, r"(vision_model|language_model)\..*|.*position_ids")
    load_weights(qformer, checkpoint, family, torch.float32)
    close(qformer.eval()(golden["features"]), golden["embeddings"])


@pytest.mark.parametrize("adapter", ("qformer", "twoway"))
@torch.no_grad()
def test_adapter_reads_the_prompt_and_nothing_behind_it(adapter, fixtures):
    vlm = small(fixtures, adapter, text=4)
    pad = -1
    texts = ("ab", "xyz"), ("abcdefg<image>h<image>", "z"), ("", "p")
    rows = [vlm.processor.encode(*pair) for pair in texts]
    tokens, where, _ = stack(rows)
    before = rows[0].kinds.index(LAST)
    a, b, c = [0, 20, 21, pad], [0, 20, 21, 22], [0, pad, pad, pad]  # the start token is a word too
    prompts = vlm.processor.prompts(rows)
    assert prompts.tolist() == [a, b, b, c]
    assert vlm.processor.prompts([vlm.processor.encode("ab")]).tolist() == [a[:3]]
    features = vlm.features(torch.randn(4, 3, 30, 30))
    logits = vlm.logits(tokens, features, where, prompts)
    changed = tokens.clone()
    changed[0, before:] = 7  # another caption: what is known before it stays the same
    assert torch.equal(vlm.logits(changed, features, where, prompts)[0], logits[0])

    def embed(text: str, pad: int = 0) -> torch.Tensor:
        example = vlm.processor.encode(text)
        tokens = torch.tensor([example.ids])
        prompt = F.pad(vlm.processor.prompts([example]), (0, pad), value=-1)
        return vlm.embed(tokens, vlm.embed_images(features[:1], prompt))[0, 2:7]

    assert (embed("ab") - embed("ba")).abs().max() > 1e-3
    assert torch.allclose(embed("ab"), embed("ab", 1), atol=1e-5)
    assert torch.equal(embed("abc"), embed("abcd"))  # the prompt is cut where the adapter stops reading


# ---------------------------------------------------------------------------------------------------------
# Flamingo

@torch.no_grad()
def test_gated_block_equals_idefics(fixtures):
    block = GatedBlock(12, 10, 3, 20, 1e-6)
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    golden = load(block, fixtures / "flamingo.safetensors", {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        "alpha1": "alpha_cross_attn", "alpha2": "alpha_dense",
        **{f"attention.{ours}": f"cross_attn.{theirs}" for ours, theirs in parts.items()},
        **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}})
    assert golden.keys() == {"x", "images", "seen", "out"}
    keys = block.attention.keys_and_values(golden["images"], golden["images"])
    close(block(golden["x"], keys, golden["seen"]), golden["out"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("llama", "gpt2", "opt_post"))
@torch.no_grad()
def test_flamingo_starts_as_the_llm_it_is_put_in(name, dtype, fixtures):
    vlm = VLM(ViT.from_pretrained(str(fixtures / "clip")), LLM.from_pretrained(str(fixtures / name), dtype),
              Letters(), dict(adapter="flamingo", adapter_sizes=dict(width=16, heads=2)))
    gates = {name: p for name, p in vlm.trained.items() if "alpha" in name}
    for p in set(vlm.trained.values()) - set(gates.values()):
        torch.nn.init.normal_(p, std=0.5)
    tokens, features = torch.tensor([vlm.processor.encode("a<image>b<image>c")[0]]), torch.randn(2, 26, 24)
    inputs = vlm.llm_inputs(tokens, vlm.embed_images(features))
    plain = vlm.llm(embeddings=inputs["embeddings"])
    assert torch.equal(vlm.llm.logits(vlm.llm.hidden(**inputs)), plain)
    assert len(gates) == 4 and not any(gates.values())
    for p in gates.values():
        p.fill_(0.5)
    assert (vlm.llm.logits(vlm.llm.hidden(**inputs)) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_flamingo_sees_the_last_image_before_a_word(fixtures):
    vlm = small(fixtures, "flamingo")
    rows = ["ab<image>c<image>de", "abcdefg", "<image>abcd"]
    tokens, _, _ = stack([vlm.processor.encode(row if "<image>" in row else "<image>" + row) for row in rows])
    tokens[1, 1:3] = 5  # a row without an image
    features = torch.randn(3, 26, 24)
    x, positions = torch.randn(3, tokens.shape[1], 24), torch.arange(tokens.shape[1])[None]

    def apply(features):
        return vlm.llm_inputs(tokens, vlm.embed_images(features))["cross_attention"](0, x, positions)

    # start token, a, b; the image's two markers, c; the other's, d, e
    for image, seen in enumerate(((0, slice(3, 6)), (0, slice(6, None)), (2, slice(1, None)))):
        changed = features.clone()
        changed[image] += 1
        moved = (apply(changed) - apply(features)).abs().amax(-1) > 1e-6
        expected = torch.zeros_like(moved)
        expected[seen] = True
        assert torch.equal(moved, expected)
    between = vlm.llm_inputs(tokens, vlm.embed_images(features))["cross_attention"]
    assert torch.equal(between(1, x, positions), x)  # every second block has one
    assert not torch.equal(apply(features), x)


@pytest.mark.parametrize("mode", ("sequence", "shared"))
@pytest.mark.parametrize("name", ("llama3", "opt_post", "gemma3"))
@torch.no_grad()
def test_flamingo_generates(mode, name, fixtures):
    vlm = small(fixtures, "flamingo", llm=name, image_position=mode)
    for p in vlm.adapter.blocks.parameters():
        p.mul_(0.4)  # or one token would drown all others
    features = vlm.features(torch.randn(3, 3, 30, 30, generator=torch.Generator().manual_seed(1)))
    rows = [vlm.processor.encode(text) for text in ("<image>ab", "a<image>b<image>abcd")]
    inputs = [vlm.llm_inputs(torch.tensor([ids]), vlm.embed_images(part))
              for (ids, _), part in zip(rows, (features[:1], features[1:]))]
    batch = vlm.llm_inputs(stack(rows)[0], vlm.embed_images(features))
    for key in ("embeddings", "positions"):
        if batch[key] is not None:
            batch[key] = [row[:len(ids)] for row, (ids, _) in zip(batch[key], rows)]
    check_generation(vlm.llm, inputs, batch)
    blank = vlm.llm_inputs(torch.tensor([rows[0][0]]), vlm.embed_images(torch.zeros_like(features[:1])))
    assert (vlm.llm.hidden(**blank) - vlm.llm.hidden(**inputs[0]))[:, -1].abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------
# Positions

@torch.no_grad()
def test_rotary_positions_equal_qwen2_vl(fixtures):
    folder = fixtures / "qwen2_vl"
    llm, golden = LLM.from_pretrained(str(folder)), load_file(folder / "golden.safetensors")
    rows = [{key[:-1]: value for key, value in golden.items() if key[-1] == i} for i in "01"]
    vlm = small(fixtures, "linear", image_position="rope-xy")
    V = vlm.llm.config.vocabulary
    for row in rows:
        positions = vlm.positions(torch.where(row["words"] == 1, 5, V + 2)[None])
        assert torch.equal(positions[0], row["positions"])
        close(llm.logits(llm.hidden(row["embeddings"][None], positions)[0]), row["logits"])
    embeddings, positions = ([row[key] for row in rows] for key in ("embeddings", "positions"))
    for llm.static in (False, True):
        generated = llm.generate(embeddings=embeddings, positions=positions, max_tokens=12, end_tokens=())
        assert generated == [row["greedy"].tolist() for row in rows]
    assert generated != llm.generate(embeddings=embeddings, max_tokens=12, end_tokens=())


@pytest.mark.parametrize("name", ("llama", "llama3", "llama_linear", "phi3_partial", "gpt_neox", "gemma3"))
@torch.no_grad()
def test_rotary_positions_of_text_alone_are_plain(name, fixtures):
    llm, tokens = LLM.from_pretrained(str(fixtures / name)), torch.arange(2, 32).view(2, 15)
    positions = torch.arange(15).expand(2, 15)
    plain = llm.hidden(llm.embed(tokens))
    assert torch.allclose(llm.hidden(llm.embed(tokens), positions), plain, atol=1e-6)
    triples = positions[..., None].expand(2, 15, 3)
    assert torch.allclose(llm.hidden(llm.embed(tokens), triples), plain, atol=1e-6)


def test_positions_of_an_image(fixtures):
    row = "a<image>bc<image>"
    for mode, adapter, expected in (
            ("shared", "qformer", [0, 1, 2, *[3] * 5, 4, 5, 6, 7, *[8] * 5, 9]),
            ("xy", "qformer", [0, 1, 2, *[3] * 5, 4, 5, 6, 7, *[8] * 5, 9]),
            ("rope-xy", "mlp", [0, 1, 2, *range(3, 8), *[8, 9, 10], 11, *range(12, 17), 17])):
        vlm = small(fixtures, adapter, image_position=mode)
        tokens = torch.tensor([vlm.processor.encode(row)[0]])
        positions = vlm.positions(tokens)
        if mode == "rope-xy":  # x in the first row of each image; the fixture tells y and x apart
            places = positions[0, tokens[0] == vlm.llm.config.vocabulary + 2].view(2, 5, 5, 3)
            assert torch.equal(places[:, :, :, 0].unique(), torch.tensor([3, 12]))
            keep = [0, 1, 2, *range(3, 8), 28, 29, 30, 31, *range(32, 37), 57]
            positions = positions[:, keep, 2]
        assert positions[0].tolist() == expected
    for mode in ("sequence", "sequence+xy"):
        assert small(fixtures, "qformer", image_position=mode).positions(tokens) is None


def check_generation(llm: LLM, rows: list[dict], batch: dict) -> None:
    """Rows are continued alone as in a batch, as with a static cache or none, and with beams."""
    how = dict(max_tokens=12, end_tokens=())
    alone = [llm.generate(**row, **how)[0] for row in rows]
    for llm.static in (False, True):
        assert llm.generate(**batch, **how) == alone and len({id for ids in alone for id in ids}) > 2
    assert llm.generate(**batch, **how, beams=3) == [llm.generate(**row, **how, beams=3)[0] for row in rows]
    for row, ids in zip(rows, alone):
        row = dict(row)
        for id in ids:
            assert llm.logits(llm.hidden(**row)[:, -1]).argmax() == id
            row["embeddings"] = torch.cat([row["embeddings"], llm.embed(torch.tensor([[id]]))], 1)
            if (positions := row["positions"]) is not None:
                row["positions"] = torch.cat([positions, positions.amax().expand_as(positions[:, :1]) + 1], 1)


@pytest.mark.parametrize("mode", IMAGE_POSITIONS)
@pytest.mark.parametrize("name", ("llama3", "gpt2_wide"))
@torch.no_grad()
def test_positions_hold_in_generation(mode, name, fixtures):
    if (mode, name) == ("rope-xy", "gpt2_wide"):
        with pytest.raises(InputError, match="rope-xy needs a language model that rotates"):
            small(fixtures, "pixelshuffle", llm=name, scale=5, image_position=mode)
        return
    vlm = small(fixtures, "pixelshuffle", llm=name, scale=1 if mode == "rope-xy" else 5, image_position=mode)
    features = vlm.features(torch.randn(3, 3, 30, 30, generator=torch.Generator().manual_seed(1)))
    inputs = [vlm.llm_inputs(torch.tensor([vlm.processor.encode(text)[0]]), vlm.embed_images(part))
              for text, part in (("<image>ab", features[:1]), ("a<image>b<image>abcd", features[1:]))]
    batch = {key: [row[key][0] for row in inputs] for key, value in inputs[0].items() if value is not None}
    check_generation(vlm.llm, inputs, batch)


@torch.no_grad()
def test_places_are_added_to_the_patches(fixtures):
    plain, vlm = (small(fixtures, "linear", image_position=mode) for mode in ("sequence", "sequence+xy"))
    vlm.load_state_dict({**vlm.state_dict(), **plain.state_dict()})
    features, tokens = torch.randn(1, 26, 24), torch.tensor([vlm.processor.encode("")[0]])
    moved = features.clone()
    for y in range(5):
        for x in range(5):
            moved[:, 1 + 5 * y + x] += vlm.places[0, y] + vlm.places[1, x]
    close(vlm.embed(tokens, vlm.embed_images(features)), plain.embed(tokens, plain.embed_images(moved)), 1e-5)
    assert "places" in vlm.trained and "places" not in plain.trained


def test_image_positions_that_cannot_be(fixtures):
    with pytest.raises(InputError, match="an adapter that keeps the grid of patches, which qformer doesn't"):
        small(fixtures, "qformer", image_position="rope-xy")
    with pytest.raises(InputError, match="which flamingo doesn't"):
        small(fixtures, "flamingo", image_position="rope-xy")
    with pytest.raises(InputError, match="unknown image position 'polar'"):
        small(fixtures, "linear", image_position="polar")


@pytest.mark.slow
@pytest.mark.parametrize("mode", IMAGE_POSITIONS[1:])
def test_train_with_image_position(mode, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "pixelshuffle", "--image-position", mode, "--out", "run"]
    assert command(monkeypatch, train, *options, *QUICK) == 0
    picture(120, 80).save("a.png")
    assert command(monkeypatch, sample, "a.png", "--model", "run", "--max-tokens", "5") == 0
    assert VLM.from_pretrained("run").image_position == mode
