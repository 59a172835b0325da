"""Every adapter turns features into embeddings, and those of public models equal the reference (see fixtures/make.py)."""
import pytest
import torch
from safetensors.torch import load_file

from adapters import ADAPTERS, PixelShuffle, QFormer
from data import stack
from fixtures.compare import close
from test_vlm import small

SMALL = {"qformer": dict(width=16, heads=2)}  # sizes of those that have any
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


def load(module: torch.nn.Module, path, names: dict[str, str]):
    """Gives a module the weights of a golden file, `names` leading from our modules to theirs; the rest is returned."""
    golden = load_file(path)
    module.load_state_dict({ours: golden.pop(next(
        theirs + ours.removeprefix(mine) for mine, theirs in names.items() if ours.startswith(mine))) for ours in module.state_dict()})
    return golden


@torch.no_grad()
def test_pixelshuffle_equals_idefics3(fixtures):
    adapter = PixelShuffle(7, 10, 6, scale=3)
    golden = load(adapter, fixtures / "pixelshuffle.safetensors", {"projection": "modality_projection.proj"})
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


@torch.no_grad()
def test_adapter_reads_the_prompt_and_nothing_behind_it(fixtures):
    vlm = small(fixtures, text=4)
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
    embed = lambda text: vlm.embed(torch.tensor([vlm.encode(text)[0]]), features[:1],  # noqa: E731
                                   vlm.prompt(torch.tensor([vlm.encode(text)[0]])))[0, 2:7]
    assert torch.equal(embed("ab"), embed("ab")) and (embed("ab") - embed("ba")).abs().max() > 1e-3
    assert torch.allclose(embed("abc"), embed("abcd"), atol=1e-6)  # the prompt is cut where the adapter stops reading
