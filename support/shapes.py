"""The built-in world: scenes of coloured shapes, whose truth is known, so that captions can be judged."""
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
SIZES = {"large": (14.5, 17.0), "small": (7.5, 9.5)}  # radius from, to, pixels
# word in a caption -> what it means
SIZE_WORDS = {"large": "large", "big": "large", "small": "small", "little": "small"}
RELATION_WORDS = {"to the left of": "left", "left of": "left", "to the right of": "right",
                  "right of": "right", "above": "above", "over": "above", "below": "below", "under": "below"}
NUMBERS = ("one", "two", "three")
STARTS = ("", "there is ", "one object: ", "a picture of ")  # of a caption of one thing
# One colour of each shape is kept out of all training scenes
UNSEEN = frozenset(zip(("green", "pink", "blue", "red", "cyan", "yellow"), SHAPES))


# ---------------------------------------------------------------------------------------------------------
# Scenes

class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float = 0.0  # centre and radius, pixels
    y: float = 0.0
    radius: float = 0.0


def draw_thing(rng: random.Random) -> Thing:
    size = rng.choice(tuple(SIZES))
    radius = rng.uniform(*SIZES[size])
    x = rng.uniform(radius + 2, SIDE - radius - 2)
    y = rng.uniform(radius + 2, SIDE - radius - 2)
    colour = rng.choice(tuple(COLOURS))
    shape = rng.choice(SHAPES)
    return Thing(size, colour, shape, x, y, radius)


def well_apart(a: Thing, b: Thing) -> bool:
    """Whether two things look different, don't touch, and have an order and a relation that are clear."""
    dx = abs(a.x - b.x)
    dy = abs(a.y - b.y)
    apart = math.hypot(dx, dy) > a.radius + b.radius + 3
    return a[:3] != b[:3] and apart and dx > 6 and abs(dx - dy) > 10


def relation(a: Thing, b: Thing) -> str:
    """Where a lies as seen from b: the longer of the two offsets decides (scenes keep them well apart)."""
    dx = a.x - b.x
    dy = a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


class Scene(NamedTuple):
    """One to three things on a background, from left to right. They differ and lie apart."""
    things: tuple[Thing, ...]
    seed: str

    @staticmethod
    def draw_from(seed: str, unseen: bool | None = False) -> "Scene":
        """Draws a scene. `unseen`: False keeps UNSEEN pairs out, True puts one in, None allows them."""
        rng = random.Random(seed)
        count = rng.choices((1, 2, 3), (1, 2, 2))[0]
        while True:
            things = [draw_thing(rng) for _ in range(count)]
            if not all(well_apart(a, b) for a, b in itertools.combinations(things, 2)):
                continue
            has_unseen = any((thing.colour, thing.shape) in UNSEEN for thing in things)
            if unseen is None or unseen == has_unseen:
                return Scene(tuple(sorted(things, key=lambda thing: thing.x)), seed)

    def picture(self) -> Image.Image:
        """Draws the scene as a SIDE × SIDE RGB picture."""
        rng = random.Random(self.seed + " picture")
        image = draw_background(rng).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for thing in self.things:
            colour = tuple(as_byte(value + rng.randint(-14, 14)) for value in COLOURS[thing.colour])
            left = int(thing.x - 1.5 * thing.radius)
            top = int(thing.y - 1.5 * thing.radius)
            image.paste(colour, (left, top), draw_mask(thing, left, top, rng))
        return image

    def captions(self) -> list[str]:
        """Words the scene in four ways. Each names every thing from left to right and, of two or more things,
        a relation."""
        rng = random.Random(self.seed + " captions")
        return [self.wording(which, rng) for which in range(4)]

    def wording(self, which: int, rng: random.Random) -> str:
        """Words the scene in one of the four ways, 0 to 3, with words that `rng` draws."""
        if len(self.things) == 1:
            return STARTS[which] + draw_name(rng, self.things[0])
        # All four are worded and one is kept: a seed's captions depend on all these draws
        return self.draw_wordings(rng)[which]

    def draw_wordings(self, rng: random.Random) -> tuple[str, ...]:
        """Words a scene of two or three things in four ways."""
        a, b = self.things[:2]
        where = rng.choice([word for word, meaning in RELATION_WORDS.items() if meaning == relation(a, b)])
        rest = ""
        if len(self.things) == 3:
            rest = f" and {draw_name(rng, self.things[2])}"

        # A list and a sentence about the first two
        names = [draw_name(rng, thing) for thing in self.things]
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        related = f"{draw_name(rng, a, 'the')} is {where} {draw_name(rng, b, 'the')}"

        # All in one
        number = NUMBERS[len(self.things) - 1]
        return (f"{listed}; {related}",
                f"{draw_name(rng, a)} {where} {draw_name(rng, b)}{rest}",
                f"there is {draw_name(rng, a)} {where} {draw_name(rng, b)}{rest}",
                f"{number} objects: {draw_name(rng, a)} {where} {draw_name(rng, b)}{rest}")


def draw_name(rng: random.Random, thing: Thing, article: str = "a") -> str:
    """Names a thing, such as "a big red star"."""
    size = rng.choice([word for word, meaning in SIZE_WORDS.items() if meaning == thing.size])
    return f"{article} {size} {thing.colour} {thing.shape}"


# ---------------------------------------------------------------------------------------------------------
# Pictures

def ring(corners: int, turn: float = -90, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """A polygon's corners as (radius, angle), the radii taken in turn."""
    return [(radii[i % len(radii)], math.radians(turn + 360 / corners * i)) for i in range(corners)]


CROSS = ((-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
         (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3))
OUTLINES = {
    "square": ring(4, 45),
    "triangle": ring(3),
    "diamond": ring(4, -90, (1.1, 0.62)),
    "star": ring(10, -90, (1.05, 0.45)),
    "cross": [(math.hypot(x, y), math.atan2(y, x)) for x, y in CROSS],
}


def draw_mask(thing: Thing, left: int, top: int, rng: random.Random) -> Image.Image:
    """Draws the outline of a thing, white on black, in a square whose corner is at (left, top)."""
    scale = 4  # drawn so much larger, then reduced: edges are smooth
    x = (thing.x - left) * scale
    y = (thing.y - top) * scale
    r = thing.radius * scale
    side = math.ceil(3 * thing.radius + 1) * scale
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), 255)
    else:
        turn = rng.uniform(-0.15, 0.15)
        corners = [(x + r * radius * math.cos(angle + turn), y + r * radius * math.sin(angle + turn))
                   for radius, angle in OUTLINES[thing.shape]]
        draw.polygon(corners, 255)
    return mask.reduce(scale)


def as_byte(value: int) -> int:
    return max(0, min(255, value))


def draw_background(rng: random.Random) -> Image.Image:
    """Draws a muted plain, gradient, stripes, checks or blotches: a small picture, to be scaled up."""
    grey = rng.randint(30, 225)
    first = [as_byte(grey + rng.randint(-12, 12)) for _ in range(3)]
    second = [as_byte(value + rng.choice((-1, 1)) * rng.randint(8, 25)) for value in first]
    kind = rng.choice(("plain", "gradient", "stripes", "checks", "blotches"))
    n = rng.randint(4, 9)
    share_of_second = {
        "plain": lambda x, y: 0,
        "gradient": lambda x, y: (x + y) / (2 * n),
        "stripes": lambda x, y: y % 2,
        "checks": lambda x, y: (x + y) % 2,
        "blotches": lambda x, y: rng.random(),
    }[kind]

    # Mix the two colours, pixel by pixel
    image = Image.new("RGB", (n, n))
    for y in range(n):
        for x in range(n):
            share = share_of_second(x, y)
            image.putpixel((x, y), tuple(round(a + (b - a) * share) for a, b in zip(first, second)))
    return image


# ---------------------------------------------------------------------------------------------------------
# The data set

@functools.lru_cache(1 << 15)
def captions_of(shapes: "Shapes", i: int) -> list[list[tuple[str, str]]]:
    """A scene's captions, kept: drawing them takes an eighth of a millisecond, and each step asks twice."""
    return [[("", caption)] for caption in shapes.scene(i).captions()]


class Shapes(torch.utils.data.Dataset):
    """`size` scenes of one split: "train" and "test" without the UNSEEN pairs, "unseen" with at least one."""

    def __init__(self, size: int, split: str = "train", seed: int = 0):
        self.size = size
        self.split = split
        self.seed = seed
        self.label = f"shapes ({split})"

    def __len__(self) -> int:
        return self.size

    def scene(self, i: int) -> Scene:
        return Scene.draw_from(f"{self.split} {self.seed} {i}", unseen=self.split == "unseen")

    def name(self, i: int) -> str:
        return f"{self.split} scene {i} of seed {self.seed}"

    def picture(self, i: int) -> Image.Image:
        return self.scene(i).picture()

    @property
    def count(self) -> int:
        return self.size

    def pictures(self, i: int) -> tuple[int]:
        return (i,)

    def conversations(self, i: int) -> list[list[tuple[str, str]]]:
        """[(question, caption)] of each caption; the questions are empty."""
        return captions_of(self, i)

    def stamp(self) -> str:
        """Text that differs between sets, and between versions of Pillow that draw differently."""
        return f"{self.size} of {self.split} {self.seed}, drawn as {zlib.crc32(self.picture(0).tobytes())}"


# ---------------------------------------------------------------------------------------------------------
# The judge

THING = rf"(a|the) ({'|'.join(SIZE_WORDS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
SKILLS = ("shape", "colour", "size", "count", "relation")


def judge(caption: str, scene: Scene) -> dict[str, bool]:
    """Parses a caption and compares it with the scene. Returns "exact" and each of SKILLS ("relation" only
    if there are two things or more).

    Exact: the caption names every thing once and nothing else, any number is right and, of two things or
    more, it states at least one relation and states none that is false.
    """
    truth = {thing[:3]: thing for thing in scene.things}
    named = []
    for article, size, colour, shape in re.findall(THING, caption):
        if article == "a":
            named.append((SIZE_WORDS[size], colour, shape))

    # Each attribute, whichever thing has it
    result = {}
    for k, skill in enumerate(("size", "colour", "shape")):
        result[skill] = sorted(thing[k] for thing in named) == sorted(thing[k] for thing in truth)

    # The count, and the number if it is written out
    number = re.search(r"\b(one|two|three) objects?\b", caption)
    number_right = not number or number[1] == NUMBERS[len(truth) - 1]
    result["count"] = len(named) == len(truth) and number_right

    if len(truth) > 1:
        result["relation"] = relations_right(caption, truth)
    exact = sorted(named) == sorted(truth) and result["count"] and result.get("relation", True)
    return {"exact": exact, **result}


def relations_right(caption: str, truth: dict[tuple, Thing]) -> bool:
    """Whether a caption states relations, and only true ones, between the things {(size, colour, shape)}."""
    # (?=…) looks at each thing anew, so that "a … and a … above a …" is read as it is meant
    stated = re.findall(rf"(?={THING} (?:is )?({'|'.join(RELATION_WORDS)}) {THING})", caption)
    for _, size_a, colour_a, shape_a, where, _, size_b, colour_b, shape_b in stated:
        a = truth.get((SIZE_WORDS[size_a], colour_a, shape_a))
        b = truth.get((SIZE_WORDS[size_b], colour_b, shape_b))
        if not a or not b or a == b or relation(a, b) != RELATION_WORDS[where]:
            return False
    return bool(stated)
