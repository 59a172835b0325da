"""Ranks an encoder's layers by how much of a caption set's words they tell.

    python tests/layers.py --vit google/siglip-base-patch16-224 --data captions.csv --images photos/

Each layer's features are averaged over a picture's patches. From these means a ridge regression (Hoerl and
Kennard, 1970) guesses which words a picture's captions have. A layer's score is the share of the words'
variance that it explains on pictures that it wasn't fitted to. Then layers are joined as `train.py --layer`
joins them: the best one, and with it each time the layer that adds most.
"""
import collections
import itertools
import math
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import chunks, read_pictures  # noqa: E402
from formats.captions import Captions  # noqa: E402
from formats.files import InputError  # noqa: E402
from formats.shards import caption_data  # noqa: E402
from support.console import MANY, PROCESSES, Number, Parser, check_meaning, run  # noqa: E402
from support.kernels import pack  # noqa: E402
from support.shapes import Shapes  # noqa: E402
from support.words import words  # noqa: E402
from vit import ViT  # noqa: E402

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the ridge, in means of the eigenvalues


class Encoder:
    """What `read_pictures` asks of a VLM."""

    def __init__(self, vit: ViT):
        self.vit = vit
        self.processor = types.SimpleNamespace(split=False)
        self.device = torch.device("cpu")


def bags(texts: list[set[str]], most: int = 1000) -> torch.Tensor:
    """Which of the commonest words each of P texts has (P,W); not those that few have, or all. Raises
    InputError."""
    least = max(2, min(10, len(texts) // 50))
    counts = collections.Counter(word for text in texts for word in text)
    kept = [word for word, count in counts.most_common(most) if least <= count < len(texts)]
    if not kept:
        raise InputError(f"{len(texts)} pictures whose captions have no common words")
    return torch.tensor([[float(word in text) for word in kept] for text in texts])


def explained(features: torch.Tensor, said: torch.Tensor, held: int) -> float:
    """The share of the variance of words (P,W) that features (P,D) explain on the last `held` pictures."""
    fitted, rest = features[:-held], features[-held:]
    std, mean = torch.std_mean(fitted, 0)
    fitted, rest = [(x - mean) / std.clamp(min=1e-6) for x in (fitted, rest)]
    average = said[:-held].mean(0)
    y, truth = said[:-held] - average, said[-held:] - average

    # The ridge of each strength, by the products of pictures with each other: there are fewer of them
    values, vectors = torch.linalg.eigh(fitted @ fitted.T)
    projected, toward = vectors.T @ y, rest @ fitted.T @ vectors
    best = -math.inf
    for strength in STRENGTHS:
        guess = toward @ (projected / (values + strength * features.shape[1])[:, None])
        best = max(best, 1 - ((truth - guess) ** 2).sum().item() / (truth ** 2).sum().item())
    return best


def rank(states: torch.Tensor, said: torch.Tensor, most: int = 4) -> list[tuple[list[int], float]]:
    """Layers and what they explain: each alone, the best first; then two, three, … joined. states:
    (L,P,D)."""
    held = max(1, len(said) // 4)

    def score(layers: list[int]) -> float:
        return explained(torch.cat([states[i] for i in layers], -1), said, held)

    found = sorted((([i], score([i])) for i in range(len(states))), key=lambda row: -row[1])
    joined = found[0][0]
    while len(joined) < min(most, len(states)):
        trials = [[*joined, i] for i in range(len(states)) if i not in joined]
        joined, best = max(((layers, score(layers)) for layers in trials), key=lambda row: row[1])
        found.append((joined, best))
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--vit", required=True, metavar="NAME", help="encoder: a folder or a hub id")
    parser.add_argument("--data", required=True, metavar="FILE", help="captions, as for train.py; or shapes")
    parser.add_argument("--images", metavar="DIR", help="where their pictures lie")
    parser.add_argument("--image-size", type=Number(int, 1, 4096), metavar="PX",
                        help="side of the squares the encoder sees (default: its own)")
    parser.add_argument("--pictures", type=MANY, default=2000, metavar="N", help="how many (default: 2000)")
    parser.add_argument("--workers", type=PROCESSES, default=0, metavar="N",
                        help="processes that read pictures (default: this one)")
    args = parser.parse_args()
    check_meaning(args, parser, [("images", args.data != "shapes", "with --data shapes")])

    if args.data == "shapes":
        captions = Shapes(args.pictures)
    else:
        captions = caption_data(args.data, args.images)
        if not isinstance(captions, Captions):
            raise InputError(f"{args.data}: shards can't be ranked by, a caption file can")
        _, captions = captions.held_out(args.pictures, 0)  # drawn, for files may be in an order
    vit = ViT.from_pretrained(args.vit, image_size=args.image_size)
    pack(vit, vit.positions.dtype)
    every = list(range(len(vit.blocks) + 1))
    means, texts, bad = [], [], {}
    batches = chunks(range(len(captions)), 32)
    with torch.inference_mode():
        for indices, views in read_pictures(Encoder(vit), captions, batches, bad, args.workers):
            if not indices:
                continue
            patches = vit(views.x, every)[:, -vit.config.grid ** 2:]  # (V,G²,L·D)
            for i, seen in zip(indices, patches.split(views.counts)):
                means.append(seen.mean((0, 1)).unflatten(0, (len(every), -1)))
                turns = itertools.chain(*captions.conversations(i))
                texts.append({word for _, said in turns for word in words(said)})
        states = torch.stack(means, 1)  # (L,P,D)
        ranks = rank(states, bags(texts))
        if ranks[0][1] <= 0:
            raise InputError(f"{args.data}: {len(texts)} pictures are too few: of no layer do they tell more "
                             "than how often a word comes")
        print(f"{len(texts)} pictures, {len(bad)} that can't be read")
        print("--layer          words' variance explained")
        for layers, share in ranks:
            print(f"{','.join(map(str, layers)):16} {100 * share:.2f} %")


if __name__ == "__main__":
    run(main, "fewer --pictures")
