"""Every adapter turns features into embeddings, and those of public models equal the reference (see fixtures/make.py)."""
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from adapters import ADAPTERS, PixelShuffle, QFormer, Resampler, TwoWay, fourier_places
from data import stack
from fixtures.compare import close
from test_vlm import small

SMALL = {adapter: dict(width=16, heads=2) for adapter in ("qformer", "resampler", "twoway")}
KEEP_A_GRID = ("linear", "mlp", "pixelshuffle")


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_adapters_turn_features_into_embeddings(adapter):
    torch.manual_seed(0)
    module = ADAPTERS[adapter](12, 20, 4, **SMALL.get(adapter, {})).eval()
    features = torch.randn(4, 17, 12)  # a class token and 4 × 4 patches
    out = module(features)
    assert out.shape == (4, module.queries, 20)
    assert module.queries == {"linear": 16, "mlp": 16, "pixelshuffle": 4}.get(adapter, 32)
    assert torch.allclose(module(features[2:]), out[2:], atol=1e-6)
    for i in range(1, 17):  # every patch counts
        changed = features.clone()
        changed[:, i] += 1
        moved = (module(changed) - out).abs().amax((0, 2)) > 1e-5
        assert moved.any()
        if adapter in KEEP_A_GRID:  # and only in its own place
            side = int(module.queries ** 0.5)
            assert moved.nonzero().tolist() == [[(i - 1) // 4 * side // 4 * side + (i - 1) % 4 * side // 4]]


def load(module: torch.nn.Module, path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Gives a module the weights of a golden file, `names` leading from the beginnings of our names to theirs, "{}"
    standing for a number. What isn't named is the identity or nothing. Returns the rest of the file."""
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
def test_resampler_equals_idefics(fixtures):
    adapter = Resampler(12, 12, 3, queries=5, layers=2, width=12, heads=3)
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "output_proj"}
    golden = load(adapter, fixtures / "resampler.safetensors", {
        "query": "latents", "norm": "layer_norm",
        "blocks.{}.source_norm": "blocks.{}.0.context_layer_norm", "blocks.{}.norm1": "blocks.{}.0.latents_layer_norm",
        **{f"blocks.{{}}.attention.{ours}": f"blocks.{{}}.0.{theirs}" for ours, theirs in parts.items()},
        "blocks.{}.norm2": "blocks.{}.1.ln", "blocks.{}.mlp.up": "blocks.{}.1.fc", "blocks.{}.mlp.down": "blocks.{}.1.c_proj"})
    assert golden.keys() == {"features", "embeddings"}
    close(adapter(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_twoway_equals_sam(fixtures):
    adapter = TwoWay(12, 12, 4, queries=5, layers=3, width=12, heads=3, mlp=20)
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    attentions = {"blocks.{}.attention": "layers.{}.self_attn", "blocks.{}.to_image": "layers.{}.cross_attn_token_to_image",
                  "blocks.{}.to_tokens": "layers.{}.cross_attn_image_to_token", "to_image": "final_attn_token_to_image"}
    golden = load(adapter, fixtures / "twoway.safetensors", {
        "query": "query", "norm": "layer_norm_final_attn",
        **{f"{mine}.{ours}": f"{their}.{theirs}" for mine, their in attentions.items() for ours, theirs in parts.items()},
        **{f"blocks.{{}}.norm{i}": f"layers.{{}}.layer_norm{i}" for i in (1, 2, 3)},
        "blocks.{}.image_norm": "layers.{}.layer_norm4",
        "blocks.{}.mlp.up": "layers.{}.mlp.lin1", "blocks.{}.mlp.down": "layers.{}.mlp.lin2"})
    assert golden.keys() == {"features", "matrix", "places", "embeddings"}
    adapter.places = fourier_places(golden["matrix"], 4)
    close(adapter.places, golden["places"])
    close(adapter(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_qformer_equals_blip2(fixtures):
    qformer, golden = QFormer.from_pretrained(str(fixtures / "blip2")), load_file(fixtures / "blip2" / "golden.safetensors")
    close(qformer(golden["features"]), golden["embeddings"])


@torch.no_grad()
def test_qformer_equals_instructblip(fixtures):
    folder = fixtures / "instructblip"
    qformer, golden = QFormer.from_pretrained(str(folder)), load_file(folder / "golden.safetensors")
    prompt = golden["prompt"]
    close(qformer(golden["features"], prompt.clamp(min=0), prompt >= 0), golden["embeddings"])
    alone = qformer(golden["features"][1:], prompt[1:, :4], prompt[1:, :4] >= 0)  # without the padding
    close(alone, golden["embeddings"][1:])


@pytest.mark.parametrize("adapter", ("qformer", "twoway"))
@torch.no_grad()
def test_adapter_reads_the_prompt_and_nothing_behind_it(adapter, fixtures):
    vlm = small(fixtures, adapter, text=4)
    V, pad = vlm.llm.config.vocabulary, -1
    rows = [vlm.encode("ab", "xyz"), vlm.encode("abcdefg<image>h<image>", "z"), vlm.encode("", "p")]
    tokens, where, _ = stack(rows)
    a, b, c = [0, 20, 21, pad], [0, 20, 21, 22], [0, pad, pad, pad]  # the start token is a word too
    assert vlm.prompt(tokens, where).tolist() == [a, b, b, c]
    assert vlm.prompt(tokens[:1, :rows[0][1]]).tolist() == [a]
    features = vlm.features(torch.randn(4, 3, 30, 30))
    logits = vlm(tokens, features, where)
    changed = tokens.clone()
    changed[0, rows[0][1]:] = 7  # another caption: what is known before it stays the same
    assert torch.equal(vlm(changed, features, where)[0], logits[0])

    def embed(text: str, pad: int = 0) -> torch.Tensor:
        tokens = torch.tensor([vlm.encode(text)[0]])
        return vlm.embed(tokens, features[:1], F.pad(vlm.prompt(tokens), (0, pad), value=-1))[0, 2:7]

    assert (embed("ab") - embed("ba")).abs().max() > 1e-3
    assert torch.allclose(embed("ab"), embed("ab", 1), atol=1e-5)
    assert torch.equal(embed("abc"), embed("abcd"))  # the prompt is cut where the adapter stops reading
