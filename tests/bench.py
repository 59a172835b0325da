"""Measures this project, `load` against what a user would otherwise pick, which needs transformers.

    python tests/bench.py load [NAME ...]     # time and memory of loading checkpoints of real sizes, random weights
    python tests/bench.py stream              # speed and memory of reading pairs from tar shards
"""
import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------
# Loading

LOADS = {  # name -> (transformers' model class, its config class, config, our class)
    "CLIP ViT-L/14": ("CLIPModel", "CLIPConfig", dict(projection_dim=768, vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
        text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)), "ViT"),
    "SmolLM2-360M": ("LlamaForCausalLM", "LlamaConfig", dict(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, tie_word_embeddings=True), "LLM"),
    "Qwen2.5-1.5B": ("Qwen2ForCausalLM", "Qwen2Config", dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True), "LLM"),
}
MAKE = """
import json, sys, torch, transformers
model, config, folder = json.loads(sys.argv[1])
torch.set_default_dtype(torch.bfloat16)
model = getattr(transformers, model)(getattr(transformers, config)(**json.loads(sys.argv[2])))
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.02)
model.save_pretrained(folder)
"""
LOAD = """
import json, resource, sys, time, torch
who, model, folder, dtype = json.loads(sys.argv[1])
if who == "ours":
    import llm, vit
    load = {"ViT": vit.ViT, "LLM": llm.LLM}[model].from_pretrained
else:
    import transformers
    load = getattr(transformers, {"CLIPModel": "CLIPVisionModel"}.get(model, model)).from_pretrained
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.time()
loaded = load(folder, dtype=getattr(torch, dtype))
sum(p.sum().item() for p in loaded.parameters())  # every weight has been read
seconds = time.time() - start
print(json.dumps([seconds, peak() - before, sum(p.nbytes for p in loaded.parameters())]))
"""


def child(code: str, *arguments) -> str:
    return subprocess.run([sys.executable, "-c", code, *map(json.dumps, arguments)], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout


def load(names: list[str], runs: int = 5) -> None:
    print("| checkpoint, stored in bfloat16 | read as | ours, s | transformers, s | ratio | peak memory / weights | transformers' |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in names or LOADS:
        model, config, values, ours = LOADS[name]
        with tempfile.TemporaryDirectory() as folder:
            child(MAKE, [model, config, folder], values)
            for dtype in ("bfloat16", "float32"):
                rows = [[json.loads(child(LOAD, [who, kind, folder, dtype]).splitlines()[-1])
                         for who, kind in (("ours", ours), ("theirs", model))] for _ in range(runs)]
                mine, theirs = ([statistics.median(values) for values in zip(*column)] for column in zip(*rows))
                ratio = statistics.median(a[0] / b[0] for a, b in rows)
                print(f"| {name} | {dtype} | {mine[0]:.2f} | {theirs[0]:.2f} | {ratio:.2f} | {mine[1] / mine[2]:.2f} | "
                      f"{theirs[1] / theirs[2]:.2f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------
# Streaming

STREAM = """
import itertools, json, resource, sys, time, torch
from data import Pixels, Shards
from vit import ViT
names, pairs = json.loads(sys.argv[1])
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
shards, preprocess, start = Shards(names), ViT.from_pretrained("assets/vit").preprocess, time.time()
for batch in itertools.islice(shards.batches(100, 0), pairs // 100):
    pass
read, start = time.time() - start, time.time()
loader = torch.utils.data.DataLoader(Pixels(shards, preprocess), batch_sampler=shards.batches(100, 0),
                                     collate_fn=Pixels.collate)
seen = {name for indices, pixels, bad in itertools.islice(loader, pairs // 100) for name in map(str, indices)}
print(json.dumps([pairs / read, pairs / (time.time() - start), len(seen), peak()]))
"""


def stream(_) -> None:
    """Reads an epoch of small JPEGs, alone and with their decoding, in a process of its own."""
    from PIL import Image
    print("| pairs | read, pairs/s | and decoded, 96 px, pairs/s | different pairs | peak memory, GiB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for pairs in (10_000, 100_000):
            for shard in range(10):
                with tarfile.open(f"{folder}/{pairs}-{shard}.tar", "w") as tar:
                    for i in range(shard * pairs // 10, (shard + 1) * pairs // 10):
                        picture = io.BytesIO()
                        colour = (i % 256, i // 256 % 256, i // 65536)
                        Image.new("RGB", (96, 96), colour).save(picture, "JPEG")
                        for kind, content in (("jpg", picture.getvalue()), ("txt", f"picture {i}".encode())):
                            member = tarfile.TarInfo(f"{i:09}.{kind}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
            read, decoded, seen, peak = json.loads(child(STREAM, [f"{folder}/{pairs}-*.tar", pairs]))
            print(f"| {pairs:,} | {read:,.0f} | {decoded:,.0f} | {seen:,} | {peak:.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "stream"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    {"load": load, "stream": stream}[args.what](args.names)
