"""Pictures of results: contact sheets and curves."""
import bisect
import itertools
import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from formats.files import write_file
from support.scores import references

INK, GREY, BLUE = "#1a1a1a", "#6b6b6b", "#0072b2"


def wrap(text: str, font, width: int) -> str:
    """Breaks a text in lines of at most `width` pixels, each of about as many letters as fit."""
    text = " ".join(text.split())
    most = int(2 * width * len(text) / max(1, font.getlength(text)))  # twice what fits on average
    fit = bisect.bisect_left(range(1, most + 1), True, key=lambda letters: any(
        font.getlength(line) > width for line in textwrap.wrap(text, letters)))
    return "\n".join(textwrap.wrap(text, fit)) if fit else text


def label(text: str, size: int, colour: str, width: int) -> Image.Image:
    """A text in lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    text, draw = wrap(text, font, width), ImageDraw.Draw(Image.new("L", (1, 1)))
    bottom = draw.multiline_textbbox((0, 0), text + "g", font)[3]  # as deep, whatever its letters
    image = Image.new("RGB", (width, math.ceil(bottom)), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), text, colour, font)
    return image


def join(images: list[Image.Image], gap: int, down: bool = False) -> Image.Image:
    """Images side by side, or one under the other, `gap` pixels apart."""
    places = [0, *itertools.accumulate(image.size[down] + gap for image in images)]
    size = places[-1] - gap, max(image.size[not down] for image in images)
    sheet = Image.new("RGB", size[::-1] if down else size, "white")
    for image, place in zip(images, places):
        sheet.paste(image, (0, place) if down else (place, 0))
    return sheet


def contact_sheet(sections: list[tuple[str, list]], columns: int = 4, side: int = 240) -> Image.Image:
    """Pictures, `side` pixels wide, in rows under the headings of their sections, (heading, pictures); each
    picture is (Image, lines of text), the lines (text, colour)."""
    rows, gap = [], 20
    for heading, cells in sections:
        rows.append(label(heading, 20, INK, columns * (side + gap) - gap))
        cells = [join([ImageOps.contain(picture, (side, side)),
                       *(label(text, 15, colour, side) for text, colour in lines)], 7, down=True)
                 for picture, lines in cells]
        rows += [join(cells[i:i + columns], gap) for i in range(0, len(cells), columns)]
    return ImageOps.expand(join(rows, gap, down=True), gap, "white")


# Okabe and Ito's colours, which colour-blind readers tell apart
PANELS = ({"loss": ("training loss, nats per token", BLUE),
           "val": ("validation loss, nats per token", "#d55e00")},
          {"matching": ("image-text matching, share that is right", "#009e73")})


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from `low` or below to `high` or above; about `most`."""
    rough = (high - low or abs(high) or 1) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.9g}") for i in range(first, max(last, first + 1) + 1)]


def curves(lines: list[dict], title: str, width: int = 960, height: int = 420) -> Image.Image:
    """What metrics.jsonl says over the steps: the losses in a panel, and accuracy in another if there is any.
    The training loss is a line, what is measured now and then has dots too."""
    series = {name: [*{line["step"]: line[name] for line in lines
                       if line.get(name) is not None and math.isfinite(line[name])}.items()]
              for panel in PANELS for name in panel}
    panels = [panel for panel in PANELS if any(series[name] for name in panel)] or [PANELS[0]]
    last, drawn = max((step for points in series.values() for step, _ in points), default=1), []
    px = 4  # drawn so large, then reduced: edges are smooth
    left, top, right, bottom = 76 * px, 84 * px, (width - 32) * px, (height - 60) * px
    for panel in panels:
        image = Image.new("RGB", (width * px, height * px), "white")
        draw = ImageDraw.Draw(image)
        values = [value for name in panel for _, value in series[name]] or [0, 1]
        scale = ticks(min(values), max(values))
        digits = max(len(f"{value:g}".partition(".")[2]) for value in scale)

        def place(step, value):
            return (left + (right - left) * step / last,
                    bottom - (bottom - top) * (value - scale[0]) / (scale[-1] - scale[0]))

        def write(x, y, text, anchor, colour=GREY, size=15):
            draw.text((x, y), text, colour, font := ImageFont.load_default(size * px), anchor)
            return font.getlength(text)

        write(left, 18 * px, title * (panel is panels[0]), "lt", INK, 19)
        for value in scale:
            _, y = place(0, value)
            draw.line((left, y, right, y), GREY if value == scale[0] else "#dddddd", px)
            write(left - 10 * px, y, f"{value:.{digits}f}", "rm")
        for step in ticks(0, last, 8):
            if step <= last:
                write(place(step, 0)[0], bottom + 10 * px, f"{step:g}", "mt")
        write(right, bottom + 34 * px, "steps", "rt")
        x, y = left, 60 * px  # of the legend
        for name, (label, colour) in panel.items():
            if points := [place(*point) for point in series[name]]:
                draw.line(points, colour, (3 if name == "loss" else 2) * px, "curve")
                draw.line((x, y, x + 28 * px, y), colour, 3 * px)
                for dot in [*points, (x + 14 * px, y)] if name != "loss" or len(points) == 1 else ():
                    draw.circle(dot, 4.5 * px, colour, "white", px)
                x += 76 * px + write(x + 36 * px, y, label, "lm", INK)
        drawn.append(image.reduce(px))
    return join(drawn, 0, down=True)


def best_and_worst(name: str, captions, texts: dict[int, str], ratings: dict,
                   most: int = 4) -> list[tuple[str, list]]:
    """Sections for `contact_sheet`: the best and the worst of a set's generated captions, with references."""
    order = sorted(texts, key=lambda i: -ratings[i][0])
    return [(f"{name}: the {which} of {len(order)}", [
        (captions.picture(i), [(texts[i], INK), (f"reference: {references(captions, i)[0]}", BLUE),
                               (ratings[i][1], GREY)]) for i in some])
            for which, some in (("best", order[:most]), ("worst", order[most:][:-most - 1:-1])) if some]


def write_picture(path: Path, picture: Image.Image) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))
