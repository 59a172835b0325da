"""The built-in world: scenes of coloured shapes whose truth is known, so that a caption can be judged."""
import functools
import itertools
import math
import random
import re
import zlib
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

SIDE = 96  # pixels
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {"red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (250, 214, 40), "green": (40, 150, 60),
           "cyan": (50, 200, 215), "blue": (40, 80, 200), "purple": (120, 45, 160), "pink": (245, 130, 185)}
SIZES = {"large": (14.5, 17.0), "small": (7.5, 9.5)}  # radius, pixels
SIZE_WORDS = {"large": "large", "big": "large", "small": "small", "little": "small"}
RELATION_WORDS = {"to the left of": "left", "left of": "left", "to the right of": "right",
                  "right of": "right", "above": "above", "over": "above", "below": "below", "under": "below"}
# one colour of each shape that no training scene shows
UNSEEN = frozenset(zip(("green", "pink", "blue", "red", "cyan", "yellow"), SHAPES))


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float = 0.0  # centre and radius, pixels
    y: float = 0.0
    radius: float = 0.0


def relation(a: Thing, b: Thing) -> str:
    """Where a lies as seen from b: the longer of the two offsets decides (scenes keep them well apart)."""
    dx, dy = a.x - b.x, a.y - b.y
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


class Scene(NamedTuple):
    """One to three things, all different, apart from each other, from left to right, on a background."""
    things: tuple[Thing, ...]
    seed: str

    @staticmethod
    def draw_from(seed: str, unseen: bool | None = False) -> "Scene":
        """A scene from a seed. `unseen`: False keeps UNSEEN pairs out, True puts one in, None is blind."""
        rng = random.Random(seed)
        count = rng.choices((1, 2, 3), (1, 2, 2))[0]
        while True:
            things: list[Thing] = []
            for _ in range(count):
                size = rng.choice(tuple(SIZES))
                radius = rng.uniform(*SIZES[size])
                x, y = (rng.uniform(radius + 2, SIDE - radius - 2) for _ in "xy")
                things.append(Thing(size, rng.choice(tuple(COLOURS)), rng.choice(SHAPES), x, y, radius))
            apart = all(a[:3] != b[:3] and math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 3
                        and abs(a.x - b.x) > 6 and abs(abs(a.x - b.x) - abs(a.y - b.y)) > 10
                        for a, b in itertools.combinations(things, 2))
            if apart and unseen in (None, any((t.colour, t.shape) in UNSEEN for t in things)):
                return Scene(tuple(sorted(things, key=lambda thing: thing.x)), seed)

    def picture(self) -> Image.Image:
        """The scene as a SIDE × SIDE RGB picture; edges are smooth, drawn at four times the size."""
        rng, scale = random.Random(self.seed + " picture"), 4
        image = background(rng).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for thing in self.things:
            colour = tuple(byte(c + rng.randint(-14, 14)) for c in COLOURS[thing.colour])
            left, top = (int(centre - 1.5 * thing.radius) for centre in (thing.x, thing.y))
            x, y, r = (thing.x - left) * scale, (thing.y - top) * scale, thing.radius * scale
            mask = Image.new("L", (math.ceil(3 * thing.radius + 1) * scale,) * 2)
            draw = ImageDraw.Draw(mask)
            if thing.shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), 255)
            else:
                turn = rng.uniform(-0.15, 0.15)
                draw.polygon([(x + r * d * math.cos(a + turn), y + r * d * math.sin(a + turn))
                              for d, a in OUTLINES[thing.shape]], 255)
            image.paste(colour, (left, top), mask.reduce(scale))
        return image

    def captions(self) -> list[str]:
        """Four wordings; each names every thing from left to right and, of two or more, a relation."""
        rng = random.Random(self.seed + " captions")
        return [self.caption(rng, wording) for wording in range(4)]

    def caption(self, rng: random.Random, wording: int) -> str:
        def name(thing: Thing, article: str = "a") -> str:
            size = rng.choice([word for word, size in SIZE_WORDS.items() if size == thing.size])
            return f"{article} {size} {thing.colour} {thing.shape}"

        if len(self.things) == 1:
            return ("", "there is ", "one object: ", "a picture of ")[wording] + name(*self.things)
        a, b, *others = self.things
        where = rng.choice([word for word, r in RELATION_WORDS.items() if r == relation(a, b)])
        rest = "".join(f" and {name(c)}" for c in others)
        count = ("two", "three")[len(others)]
        return (f"{', '.join(map(name, self.things[:-1]))} and {name(self.things[-1])}; "
                f"{name(a, 'the')} is {where} {name(b, 'the')}",
                f"{name(a)} {where} {name(b)}{rest}",
                f"there is {name(a)} {where} {name(b)}{rest}",
                f"{count} objects: {name(a)} {where} {name(b)}{rest}")[wording]


def ring(corners: int, turn: float = -90, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """A polygon's corners as (radius, angle), the radii taken in turn."""
    return [(radii[i % len(radii)], math.radians(turn + 360 / corners * i)) for i in range(corners)]


OUTLINES = {"square": ring(4, 45), "triangle": ring(3), "diamond": ring(4, -90, (1.1, 0.62)),
            "star": ring(10, -90, (1.05, 0.45)),
            "cross": [(math.hypot(x, y), math.atan2(y, x)) for x, y in
                      ((-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                       (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3))]}


def byte(value: int) -> int:
    return max(0, min(255, value))


def background(rng: random.Random) -> Image.Image:
    """A muted plain, gradient, stripes, checks or blotches, as a small picture to be scaled up."""
    grey = rng.randint(30, 225)
    first = [byte(grey + rng.randint(-12, 12)) for _ in range(3)]
    second = [byte(c + rng.choice((-1, 1)) * rng.randint(8, 25)) for c in first]
    kind, n = rng.choice(("plain", "gradient", "stripes", "checks", "blotches")), rng.randint(4, 9)
    pattern = {"plain": lambda x, y: 0, "gradient": lambda x, y: (x + y) / (2 * n),
               "stripes": lambda x, y: y % 2, "checks": lambda x, y: (x + y) % 2,
               "blotches": lambda x, y: rng.random()}[kind]
    image = Image.new("RGB", (n, n))
    image.putdata([tuple(round(a + (b - a) * w) for a, b in zip(first, second))
                   for y in range(n) for x in range(n) for w in [pattern(x, y)]])
    return image


@functools.lru_cache(1 << 15)
def pairs_of(shapes: "Shapes", i: int) -> list[tuple[str, str]]:
    """The pairs of a scene. Drawing them takes an eighth of a millisecond, and each step asks twice."""
    return [("", caption) for caption in shapes.scene(i).captions()]


class Shapes(torch.utils.data.Dataset):
    """`size` scenes of one split: "train" and "test" without the UNSEEN pairs, "unseen" with at least one."""

    def __init__(self, size: int, split: str = "train", seed: int = 0):
        self.size, self.split, self.seed = size, split, seed

    def __len__(self) -> int:
        return self.size

    def scene(self, i: int) -> Scene:
        return Scene.draw_from(f"{self.split} {self.seed} {i}", unseen=self.split == "unseen")

    def name(self, i: int) -> str:
        return f"{self.split} scene {i} of seed {self.seed}"

    def picture(self, i: int) -> Image.Image:
        return self.scene(i).picture()

    def pairs(self, i: int) -> list[tuple[str, str]]:
        return pairs_of(self, i)

    def stamp(self) -> str:
        return f"{self.size} of {self.split} {self.seed}, drawn as {zlib.crc32(self.picture(0).tobytes())}"


THING = rf"(a|the) ({'|'.join(SIZE_WORDS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
SKILLS = ("shape", "colour", "size", "count", "relation")


def judge(caption: str, scene: Scene) -> dict[str, bool]:
    """Parses a caption back and compares it with the truth: "exact", and each of SKILLS ("relation" only
    where there are two things or more). Exact: every thing named once and nothing else, any number right,
    and, of two things or more, at least one relation stated and all stated relations true."""
    truth = {thing[:3]: thing for thing in scene.things}
    said = [(SIZE_WORDS[size], colour, shape)
            for article, size, colour, shape in re.findall(THING, caption) if article == "a"]
    number = re.search(r"\b(one|two|three) objects?\b", caption)
    result = {skill: sorted(t[k] for t in said) == sorted(t[k] for t in truth)
              for k, skill in enumerate(("size", "colour", "shape"))}
    result["count"] = len(said) == len(truth) and (
        not number or number[1] == ("one", "two", "three")[len(truth) - 1])
    if len(truth) > 1:
        def thing(article, size, colour, shape):
            return truth.get((SIZE_WORDS[size], colour, shape))

        # looked for from every thing on, so that "a … and a … above a …" is read as it is meant
        found = re.findall(rf"(?={THING} (?:is )?({'|'.join(RELATION_WORDS)}) {THING})", caption)
        stated = [(thing(*groups[:4]), RELATION_WORDS[groups[4]], thing(*groups[5:])) for groups in found]
        result["relation"] = bool(stated) and all(
            a and b and a != b and relation(a, b) == where for a, where, b in stated)
    exact = sorted(said) == sorted(truth) and result["count"] and result.get("relation", True)
    return {"exact": exact, **result}
