"""The language model equals the reference implementations (see fixtures/make.py), and generation is one text, however it
is batched."""
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from data import InputError
from fixtures.compare import close
from llm import LLM, KVCache, sample

DECODERS = ("gpt2", "gpt2_old", "llama", "llama_wide", "llama_sharded")


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


@torch.no_grad()
def test_prefill_in_parts_equals_prefill_at_once(fixtures):
    for name in ("gpt2", "llama"):
        llm, golden = LLM.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
        x = llm.embed(golden["tokens"])
        cache = KVCache(llm.config, 2, 17, x)
        parts = [llm.logits(llm.hidden(part, cache=cache)) for part in x.split((5, 1, 8, 3), 1)]
        close(torch.cat(parts, 1), golden["logits"])


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
