# SPDX-License-Identifier: Apache-2.0
"""Build the quickstart's six visual tasks from real images: a PyPI package's, and ``digits.csv.gz``.

    python examples/quickstart/build_data.py --out data/quickstart

easy-VQA (MIT) brings 5,000 images of one coloured shape and 48,248 questions. The file holds the 1,797 handwritten
digits of UCI's Optical Recognition of Handwritten Digits (CC BY 4.0) as scikit-learn ships them: a row is 64 grey
levels, 0 to 16, and the digit. It lies here because transformers imports scikit-learn wherever that is installed, a
second and a half of every process. Boxes and areas are not labelled: they are measured from the pixels. Train and
validation never share a source image.

| task              | image                                              | reward topology                          |
|-------------------|----------------------------------------------------|------------------------------------------|
| general_vqa       | easy-VQA, as shipped                               | exact match: binary                      |
| spatial_grounding | easy-VQA, as shipped                               | IoU: dense                               |
| chart             | easy-VQA, as shipped (a regression in its place)   | relative accuracy: dense, heavy-tailed   |
| spatial_reasoning | two easy-VQA images in one prompt, as shipped      | per axis: 0, 1/2, 1                      |
| ocr               | made: 2 to 4 handwritten digits joined             | edit distance                            |
| math              | made: 2 handwritten digits joined                  | exact, and the operands in the thinking  |

Every sample names its source images in ``sources`` and says in ``made`` whether its image is a composition.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_g2rpo.data.shard_writer import ShardWriter

DIGITS_FILE = Path(__file__).with_name("digits.csv.gz")
SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
TRAIN_SIZES = {
    "general_vqa": 8000,
    "spatial_grounding": 4000,
    "spatial_reasoning": 6000,
    "ocr": 6000,
    "math": 6000,
    "chart": 4000,
}
VAL_SIZE = 400
VAL_DIGITS = 360
DIGIT_SIZE = 32  # pixels; four times the original, so that a digit spans whole vision patches
MASK_THRESHOLD = 10  # grey levels away from the background; finds a shape in every easy-VQA image
MIN_OFFSET = 6.0  # pixels; centres closer than this along an axis leave "left" or "above" in doubt
OPERATORS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "plus": ("+", lambda a, b: a + b),
    "minus": ("-", lambda a, b: a - b),
    "times": ("*", lambda a, b: a * b),
}


@dataclass(frozen=True)
class Picture:
    """An easy-VQA image and what is known of it. ``box`` is x1, y1, x2, y2 in pixels, the far edges exclusive."""

    source: str
    png: bytes
    pixels: np.ndarray
    colour: str
    shape: str
    box: tuple[int, int, int, int]
    area: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Digits:
    """Handwritten digits of one split: ``pixels`` uint8 ``[n, 32, 32]``, ``labels`` and ``ids`` int ``[n]``."""

    pixels: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


Fields = dict[str, Any]
Made = tuple[Fields, list[bytes]]


def response(thinking: str, answer: str) -> str:
    """The response that supervised training imitates."""
    return f"<thinking>{thinking}</thinking><answer>{answer}</answer>"


def fields(task: str, question: str, answer: str, answer_format: str, thinking: str, **more: Any) -> Fields:
    """The json of a sample, without its provenance."""
    return {
        "task": task,
        "question": question,
        "answer": answer,
        "answer_format": answer_format,
        "response": response(thinking, answer),
        **more,
    }


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 ``[height, width, 3]``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- sources ----------------------------------------------------------------------------------------------------------


def easy_vqa_directory() -> Path:
    """The data files of the installed easy-vqa package, found without importing it."""
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("easy-vqa is not installed: pip install 'megatron-g2rpo[quickstart]'")
    return Path(spec.origin).parent / "data"


def known_words(question: str, answer: str) -> set[str]:
    """Colour and shape words that this question and its true answer say the picture shows."""
    mentioned = set(re.findall("[a-z]+", question))
    if answer in ("yes", "no"):
        negated = bool(mentioned & {"not", "no"})
        return mentioned & (SHAPES | COLOURS) if (answer == "yes") != negated else set()
    return (mentioned | {answer}) & (SHAPES | COLOURS)


def measure(pixels: np.ndarray) -> tuple[tuple[int, int, int, int], int]:
    """Box and area (pixels) of the shape: what differs from the median colour of the border."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border.astype(np.int16), axis=0)
    mask = np.abs(pixels.astype(np.int16) - background).max(axis=-1) > MASK_THRESHOLD
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), int(mask.sum())


@cache
def load_pictures(split: str) -> tuple[dict[int, Picture], list[tuple[str, str, int]]]:
    """Pictures by number, and (question, answer, number).

    Left out are the pictures, about one in eight, whose questions do not tell both the colour and the shape.
    """
    folder = easy_vqa_directory() / split
    questions: list[tuple[str, str, int]] = [tuple(q) for q in json.loads((folder / "questions.json").read_text())]
    words: defaultdict[int, set[str]] = defaultdict(set)
    for question, answer, number in questions:
        words[number] |= known_words(question, answer)
    pictures = {}
    for number, known in sorted(words.items()):
        if len(known & SHAPES) != 1 or len(known & COLOURS) != 1:
            continue
        png = (folder / "images" / f"{number}.png").read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        box, area = measure(pixels)
        (colour,), (shape,) = known & COLOURS, known & SHAPES
        pictures[number] = Picture(f"easy-vqa/{split}/{number}", png, pixels, colour, shape, box, area)
    return pictures, [q for q in questions if q[2] in pictures]


def load_digit_splits(rng: np.random.Generator) -> tuple[Digits, Digits]:
    """(train, val): the 1,797 images, split at random."""
    rows = np.loadtxt(DIGITS_FILE, delimiter=",", dtype=np.int64)
    images, labels = rows[:, :-1], rows[:, -1]
    tiles = np.stack(
        [
            np.asarray(Image.fromarray(tile).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BILINEAR))
            for tile in np.clip(np.reshape(images, (-1, 8, 8)) * 16, 0, 255).astype(np.uint8)
        ]
    )
    order = rng.permutation(len(tiles))
    val, train = order[:VAL_DIGITS], order[VAL_DIGITS:]
    return Digits(tiles[train], labels[train], train), Digits(tiles[val], labels[val], val)


# --- tasks ------------------------------------------------------------------------------------------------------------


def general_vqa(
    pictures: dict[int, Picture], questions: list[tuple[str, str, int]], rng: np.random.Generator, size: int
) -> Iterator[Made]:
    """easy-VQA's own questions, yes/no and the rest in easy-VQA's own proportion."""
    is_yes_no = np.array([answer in ("yes", "no") for _, answer, _ in questions])
    num_yes_no = int(size * is_yes_no.mean())
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(is_yes_no), num_yes_no, replace=False),
            rng.choice(np.flatnonzero(~is_yes_no), size - num_yes_no, replace=False),
        ]
    )
    for row in rng.permutation(chosen):
        question, answer, number = questions[row]
        picture = pictures[number]
        yes_no = bool(is_yes_no[row])
        record = fields("general_vqa", question, answer, "exact", picture.name, yes_no=yes_no)
        yield record | {"sources": [picture.source], "made": False}, [picture.png]


def one_picture_task(
    pictures: dict[int, Picture], rng: np.random.Generator, size: int, describe: Callable[[Picture], Fields]
) -> Iterator[Made]:
    """A question about one picture; every picture is used once before any is used again."""
    numbers = sorted(pictures)
    order = np.concatenate([rng.permutation(numbers) for _ in range(-(-size // len(numbers)))])[:size]
    for number in order:
        picture = pictures[int(number)]
        yield describe(picture) | {"sources": [picture.source], "made": False}, [picture.png]


def grounding(picture: Picture) -> Fields:
    """The box of the shape, in pixels."""
    answer = f"[{', '.join(map(str, picture.box))}]"
    return fields("spatial_grounding", f"Where is the {picture.name}?", answer, "box_iou", picture.name)


def chart(picture: Picture) -> Fields:
    """The area of the shape, in pixels; the thinking takes the width and the height of its box first."""
    x1, y1, x2, y2 = picture.box
    thinking = f"{picture.shape} {x2 - x1} x {y2 - y1}"
    return fields("chart", "How many pixels does the shape cover?", str(picture.area), "relative", thinking)


def spatial_reasoning(pictures: dict[int, Picture], rng: np.random.Generator, size: int) -> Iterator[Made]:
    """Two pictures in one prompt: where is the second's shape, compared with the first's?"""
    numbers = sorted(pictures)
    made = 0
    while made < size:
        first, second = (pictures[numbers[i]] for i in rng.choice(len(numbers), 2, replace=False))
        dx, dy = (after - before for before, after in zip(first.centre, second.centre, strict=True))
        if min(abs(dx), abs(dy)) < MIN_OFFSET:
            continue
        answer = f"{'left' if dx < 0 else 'right'} {'above' if dy < 0 else 'below'}"
        spots = [f"{picture.centre[0]:.0f} {picture.centre[1]:.0f}" for picture in (first, second)]
        question = "Where is the second shape seen from the first?"
        record = fields("spatial_reasoning", question, answer, "axes", ", ".join(spots))
        yield record | {"sources": [first.source, second.source], "made": False}, [first.png, second.png]
        made += 1


def draw_strip(digits: Digits, rng: np.random.Generator, length: int) -> tuple[list[int], list[str], bytes]:
    """Handwritten digits in a row: their labels, their sources and the PNG."""
    rows = rng.integers(len(digits.labels), size=length)
    strip = np.concatenate(list(digits.pixels[rows]), axis=1)
    png = encode_png(np.repeat(strip[:, :, None], 3, axis=2))
    return digits.labels[rows].tolist(), [f"digits/{i}" for i in digits.ids[rows]], png


def ocr(digits: Digits, rng: np.random.Generator, size: int) -> Iterator[Made]:
    """Numbers of 2 to 4 handwritten digits."""
    for _ in range(size):
        labels, sources, png = draw_strip(digits, rng, int(rng.integers(2, 5)))
        text = [str(label) for label in labels]
        record = fields("ocr", "What number is written?", "".join(text), "edit_distance", " ".join(text))
        yield record | {"sources": sources, "made": True}, [png]


def arithmetic(digits: Digits, rng: np.random.Generator, size: int) -> Iterator[Made]:
    """Two handwritten digits, added, subtracted or multiplied; the thinking states what was read."""
    words = sorted(OPERATORS)
    for _ in range(size):
        (left, right), sources, png = draw_strip(digits, rng, 2)
        word = words[int(rng.integers(len(words)))]
        symbol, compute = OPERATORS[word]
        steps = f"{left} {symbol} {right}"
        question = f"What is the left digit {word} the right digit?"
        record = fields("math", question, str(compute(left, right)), "numeric", steps, reference_steps=steps)
        yield record | {"sources": sources, "made": True}, [png]


# --- the whole --------------------------------------------------------------------------------------------------------


def build_split(out: Path, split: str, digits: Digits, rng: np.random.Generator, sizes: dict[str, int]) -> list[Fields]:
    """Write one split's shards, the tasks mixed; returns the fields of every sample."""
    pictures, questions = load_pictures({"train": "train", "val": "test"}[split])
    samples = [
        *general_vqa(pictures, questions, rng, sizes["general_vqa"]),
        *one_picture_task(pictures, rng, sizes["spatial_grounding"], grounding),
        *spatial_reasoning(pictures, rng, sizes["spatial_reasoning"]),
        *ocr(digits, rng, sizes["ocr"]),
        *arithmetic(digits, rng, sizes["math"]),
        *one_picture_task(pictures, rng, sizes["chart"], chart),
    ]
    with ShardWriter(out / split) as writer:
        for number, row in enumerate(rng.permutation(len(samples))):
            record, images = samples[row]
            writer.write(f"{split}-{number:06d}", record, images)
    return [record for record, _ in samples]


def text_only_accuracy(asked: list[tuple[str, str]]) -> dict[str, float]:
    """What sight must beat: the accuracy, on (question, answer) pairs, of a question's commonest training answer."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in load_pictures("train")[1]:
        answers[question][answer] += 1
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for question, answer in asked:
        guess = max(answers[question].items(), key=lambda item: (item[1], item[0]), default=("", 0))[0]
        for part in ("all", "yes_no" if answer in ("yes", "no") else "other"):
            hits[part].append(guess == answer)
    return {part: round(sum(values) / len(values), 4) for part, values in sorted(hits.items())}


def build(out: Path, seed: int = 0, train_sizes: dict[str, int] = TRAIN_SIZES, val_size: int = VAL_SIZE) -> Fields:
    """Write ``out/train``, ``out/val`` and ``out/card.json``; returns the card."""
    rng = np.random.default_rng(seed)
    train_digits, val_digits = load_digit_splits(rng)
    train = build_split(out, "train", train_digits, rng, train_sizes)
    val = build_split(out, "val", val_digits, rng, dict.fromkeys(train_sizes, val_size))
    blind = text_only_accuracy([(r["question"], r["answer"]) for r in val if r["task"] == "general_vqa"])
    card = {
        "seed": seed,
        "samples": {
            name: dict(Counter(r["task"] for r in records)) for name, records in (("train", train), ("val", val))
        },
        "made_images": sorted({r["task"] for r in train if r["made"]}),
        # Shown beside the policy's accuracy by `megatron-g2rpo report`.
        "text_only_accuracy": {"general_vqa": blind["all"]},
        "general_vqa_text_only_accuracy": {
            "val": blind,
            "all_of_easy_vqa_test": text_only_accuracy([q[:2] for q in load_pictures("test")[1]]),
        },
        "licences": {"easy-vqa": "MIT", "digits": "CC BY 4.0 (UCI Optical Recognition of Digits)"},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def main() -> None:
    """Build, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.out / "card.json").exists():  # written last: the build is complete
        card = json.loads((arguments.out / "card.json").read_text())
        if card["seed"] != arguments.seed:
            parser.error(f"{arguments.out} was built with seed {card['seed']}: remove it, or choose another --out")
        print(f"{arguments.out} is already built")
        return
    print(json.dumps(build(arguments.out, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
