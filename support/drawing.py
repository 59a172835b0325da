"""Pictures of results: contact sheets and curves."""
import bisect
import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from formats.files import InputError, warn, write_file
from support.scores import references

INK = "#1a1a1a"
GREY = "#6b6b6b"
BLUE = "#0072b2"


# ---------------------------------------------------------------------------------------------------------
# Contact sheets

def wrap(text: str, font, width: int) -> str:
    """Breaks a text into lines of at most `width` pixels, each of about as many letters as fit."""
    text = " ".join(text.split())

    def too_wide(letters: int) -> bool:
        return any(font.getlength(line) > width for line in textwrap.wrap(text, letters))

    # The largest number of letters a line with which every line fits
    most = int(2 * width * len(text) / max(1, font.getlength(text)))  # twice what fits on average
    fit = bisect.bisect_left(range(1, most + 1), True, key=too_wide)
    return "\n".join(textwrap.wrap(text, fit)) if fit else text


def draw_label(text: str, size: int, colour: str, width: int) -> Image.Image:
    """Draws a text in lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    text = wrap(text, font, width)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    bottom = measure.multiline_textbbox((0, 0), text + "g", font)[3]  # as deep, whatever its letters
    image = Image.new("RGB", (width, math.ceil(bottom)), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), text, colour, font)
    return image


def join(images: list[Image.Image], gap: int, down: bool = False) -> Image.Image:
    """Puts images side by side, or one under the other, `gap` pixels apart."""
    if down:
        width = max(image.width for image in images)
        height = sum(image.height + gap for image in images) - gap
    else:
        width = sum(image.width + gap for image in images) - gap
        height = max(image.height for image in images)

    sheet = Image.new("RGB", (width, height), "white")
    place = 0
    for image in images:
        sheet.paste(image, (0, place) if down else (place, 0))
        place += gap + (image.height if down else image.width)
    return sheet


def contact_sheet(sections: list[tuple[str, list]], columns: int = 4, side: int = 240) -> Image.Image:
    """Draws sections (heading, cells), their pictures in rows of `columns`, each `side` pixels wide.

    A cell is (Image, lines of text), a line (text, colour).
    """
    gap = 20
    rows = []
    for heading, cells in sections:
        rows.append(draw_label(heading, 20, INK, columns * (side + gap) - gap))

        # Each picture with its text below
        images = []
        for picture, lines in cells:
            parts = [ImageOps.contain(picture, (side, side))]
            parts += [draw_label(text, 15, colour, side) for text, colour in lines]
            images.append(join(parts, 7, down=True))
        for i in range(0, len(images), columns):
            rows.append(join(images[i:i + columns], gap))
    return ImageOps.expand(join(rows, gap, down=True), gap, "white")


def best_and_worst(name: str, captions, texts: dict[int, str], ratings: dict,
                   most: int = 4) -> list[tuple[str, list]]:
    """Makes sections for `contact_sheet`: the best and the worst `most` of a set's generated captions
    {index: text}, with references. `ratings`: see `rate`. A picture that can't be read any more is left
    out, with a warning."""
    order = sorted(texts, key=lambda i: -ratings[i][0])
    worst = order[most:][-most:]
    worst.reverse()
    sections = []
    for which, chosen in (("best", order[:most]), ("worst", worst)):
        cells = []
        for i in chosen:
            try:
                shown = join([captions.picture(p) for p in captions.pictures(i)], 10)
            except InputError as error:
                warn(f"not drawn among the samples: {error}")
                continue
            reference = f"reference: {references(captions, i)[0]}"
            cells.append((shown, [(texts[i], INK), (reference, BLUE), (ratings[i][1], GREY)]))
        if cells:
            sections.append((f"{name}: the {which} of {len(order)}", cells))
    return sections


def write_picture(path: Path, picture: Image.Image) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------------------
# Where a model looked

WARM = torch.tensor([1.0, 0.45, 0.0])[:, None, None]
LITTLE_WORDS = "a an the of in on at to is are and with by for from its it his her their there that".split()


def spotlights(pictures: torch.Tensor, looks: list[tuple[str, torch.Tensor]],
               side: int = 150) -> list[tuple[Image.Image, list]]:
    """Cells for `contact_sheet`: the pictures (P,3,S,S), from 0 to 1, as they are, then once for each word.

    looks: the words, each with its attention (P,G,G) to the pictures.
    A word's pictures are grey, and warm where it paid a larger share than words do on average: all pay the
    most to the same few patches. All words have one scale, and those that name something come first.
    """
    size = (side, side)
    views = F.interpolate(pictures, size, mode="bilinear", antialias=True)
    cells = [(views, [("the picture", INK), ("warm: where a word looked more than the others", GREY)])]

    # How much larger than usual each word's share of its attention is, patch by patch
    shares = [at / at.sum() for _, at in looks]
    usual = torch.stack(shares).mean(0) if len(shares) > 1 else torch.tensor(0.0)
    more = [(share - usual).clamp(min=0) for share in shares]
    most = max((at.max().item() for at in more), default=0.0) or 1.0

    grey = 0.8 * views.clamp(0, 1).mean(1, keepdim=True)  # (P,1,side,side)
    words = [word for word, _ in looks]
    for i in sorted(range(len(words)), key=lambda i: words[i].lower() in LITTLE_WORDS):
        heat = F.interpolate(more[i][:, None] / most, size, mode="bicubic").clamp(0, 1).sqrt()
        colour = INK if more[i].max() > most / 4 else GREY
        cells.append((grey + (WARM - grey) * 0.8 * heat, [(words[i], colour)]))

    images = []
    for view, lines in cells:
        array = (torch.cat([*view], 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        images.append((Image.fromarray(array.numpy()), lines))
    return images


# ---------------------------------------------------------------------------------------------------------
# Curves

# Curves of each panel: name in metrics.jsonl -> (label, colour); colour-blind readers tell Okabe and Ito's
# colours apart
PANELS = ({"loss": ("training loss per token", BLUE),
           "val": ("validation loss per token", "#d55e00")},
          {"exact": ("share of scenes captioned without an error", BLUE),
           "matching": ("image-text matching, share that is right", "#009e73")})
PX = 4  # panels are drawn so much larger, then reduced: edges are smooth


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from `low` or below to `high` or above; about `most`."""
    rough = (high - low or abs(high) or 1) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{step * i:.9g}") for i in range(first, last + 1)]


def finite_points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """The (step, value) of each line that has a finite value of this name; the last one of a step."""
    points = {}
    for line in lines:
        value = line.get(name)
        if value is not None and math.isfinite(value):
            points[line["step"]] = value
    return list(points.items())


def curves(lines: list[dict], title: str, width: int = 960, height: int = 420) -> Image.Image:
    """Draws the lines of metrics.jsonl over the steps: the losses in a panel and accuracy, if there is
    any, in another, each `width` × `height` pixels."""
    # The points of each curve, and the panels that have some
    points = {}
    panels = []
    last_step = 0
    for panel in PANELS:
        for name in panel:
            points[name] = finite_points(lines, name)
            last_step = max([last_step] + [step for step, _ in points[name]])
        if any(points[name] for name in panel):
            panels.append(panel)
    if not panels:
        panels = [PANELS[0]]
        last_step = 1

    images = []
    for panel in panels:
        images.append(draw_panel(panel, points, last_step, "" if images else title, width, height))
    return join(images, 0, down=True)


def draw_panel(panel: dict, points: dict[str, list], last_step: int, title: str,
               width: int, height: int) -> Image.Image:
    """Draws the curves of a panel, the training loss as a line, the others with dots too."""
    image = Image.new("RGB", (width * PX, height * PX), "white")
    draw = ImageDraw.Draw(image)
    left = 76 * PX
    top = 84 * PX
    right = (width - 32) * PX
    bottom = (height - 60) * PX
    values = []
    for name in panel:
        values += [value for _, value in points[name]]
    scale = ticks(min(values), max(values)) if values else ticks(0, 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / last_step
        y = bottom - (bottom - top) * (value - scale[0]) / (scale[-1] - scale[0])
        return x, y

    def write(x: float, y: float, text: str, anchor: str, colour: str = GREY, size: int = 15) -> float:
        """Writes a text in one line; returns its width."""
        text = " ".join(text.split())
        font = ImageFont.load_default(size * PX)
        draw.text((x, y), text, colour, font, anchor)
        return font.getlength(text)

    # Title, and the axes with their numbers
    write(left, 18 * PX, title, "lt", INK, 19)
    digits = max(len(f"{value:g}".partition(".")[2]) for value in scale)
    for value in scale:
        y = place(0, value)[1]
        draw.line((left, y, right, y), GREY if value == scale[0] else "#dddddd", PX)
        write(left - 10 * PX, y, f"{value:.{digits}f}", "rm")
    for step in ticks(0, last_step, 8):
        if step <= last_step:
            write(place(step, 0)[0], bottom + 10 * PX, f"{step:g}", "mt")
    write(right, bottom + 34 * PX, "steps", "rt")

    # Each curve, and its line in the legend
    legend_x = left
    legend_y = 60 * PX
    for name, (label, colour) in panel.items():
        curve = [place(step, value) for step, value in points[name]]
        if not curve:
            continue
        draw.line(curve, colour, (3 if name == "loss" else 2) * PX, "curve")
        draw.line((legend_x, legend_y, legend_x + 28 * PX, legend_y), colour, 3 * PX)
        if name != "loss" or len(curve) == 1:
            for dot in curve + [(legend_x + 14 * PX, legend_y)]:
                draw.circle(dot, 4.5 * PX, colour, "white", PX)
        legend_x += 76 * PX + write(legend_x + 36 * PX, legend_y, label, "lm", INK)
    return image.reduce(PX)
