"""What the built-in language model learned to say of scenes, besides their captions: see make.py."""
import itertools
import random

from support.shapes import COLOURS, NUMBERS, SHAPES, Scene, relation

RULES = ("list", "relation", "there is", "number", "colours", "shapes", "sizes", "count")  # see `by_rule`


def questions(scene: Scene, rng: random.Random | None = None) -> list[tuple[str, str]]:
    """Questions of the scene and their answers, one word each: how many, and the colours, shapes, sizes
    and places of things that the question names beyond doubt. `rng` draws what is asked of yes or no, by
    default from the scene's seed."""
    rng = rng or random.Random(scene.seed + " questions")
    colours, shapes = [[thing[k] for thing in scene.things] for k in (1, 2)]
    found = [("how many objects?", NUMBERS[len(scene.things) - 1])]
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:
            found.append((f"what colour is the {thing.shape}?", thing.colour))
            found.append((f"what size is the {thing.shape}?", thing.size))
        if colours.count(thing.colour) == 1:
            found.append((f"what shape is the {thing.colour} object?", thing.shape))

    # A thing that is there, and one that differs from it in a word and isn't
    thing = rng.choice(scene.things)
    other = rng.choice([(colour, shape) for colour in COLOURS for shape in SHAPES
                        if (colour == thing.colour) != (shape == thing.shape)
                        and (colour, shape) not in zip(colours, shapes)])
    found.append((f"is there any {thing.colour} {thing.shape}?", "yes"))
    found.append((f"is there any {' '.join(other)}?", "no"))

    # Where one lies as seen from another: as it does, and the other way round
    for a, b in itertools.permutations(scene.things, 2):
        if shapes.count(a.shape) == shapes.count(b.shape) == 1:
            where = {"left": "left of", "right": "right of"}.get(relation(a, b), relation(a, b))
            found.append((f"is the {a.shape} {where} the {b.shape}?", "yes"))
            found.append((f"is the {b.shape} {where} the {a.shape}?", "no"))
    return found


def by_rule(scene: Scene, rule: str, rng: random.Random | None = None) -> str:
    """Says of the scene what one of RULES asks for: all of it in one of the four ways, or the colours,
    shapes, sizes from left to right, or the number alone. `rng` draws words, by default from the scene's
    seed."""
    rng = rng or random.Random(f"{scene.seed} {rule}")
    if rule in RULES[:4]:
        return scene.wording(RULES.index(rule), rng)
    if rule == "count":
        return f"{NUMBERS[len(scene.things) - 1]} object" + "s" * (len(scene.things) > 1)
    k = ("sizes", "colours", "shapes").index(rule)
    return " and ".join(thing[k] for thing in scene.things)
