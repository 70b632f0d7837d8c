# SPDX-License-Identifier: Apache-2.0
"""Takes the pictures of ``docs/report.md`` from the page of a run: ``python -m tests.report.take_pictures RUN OUT``."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from megatron_g2rpo.report.page import write_page
from tests.report.browser import DESKTOP, PHONE, Browser

# What a user would choose in the viewer of samples: a task with boxes, if there is one, and a colour.
CHOOSE = """
const task = [...document.querySelectorAll('#f-task option')].find((each) => each.value.includes('grounding'));
for (const [id, value] of [['f-task', task?.value ?? ''], ['f-colour', 'logprob']]) {
  const field = document.getElementById(id);
  if (field) { field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})); }
}
"""
SETTLE_S = 2.0  # for charts to be drawn
COLOURS = 256  # of a picture, which keeps it below 300 kB


def take(run: Path, out: Path) -> list[Path]:
    """Write the pictures: name -> window, scheme, and what stands on top of it."""
    out.mkdir(parents=True, exist_ok=True)
    address = write_page([run]).resolve().as_uri()
    written = []
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for name, size, dark, top in (
            ("learning", DESKTOP, False, "#section-0"),
            ("samples", DESKTOP, False, "#samples"),
            ("dark", DESKTOP, True, "#section-2"),
            ("changes", (1280, 520), False, "#changes"),
            ("phone", PHONE, False, "#section-1"),
        ):
            browser.open(address, size, dark=dark)
            browser.do(CHOOSE)
            browser.do(f"report.drawAll(); document.querySelector('{top}').scrollIntoView()")
            time.sleep(SETTLE_S)
            browser.do(f"document.querySelector('{top}').scrollIntoView()")
            time.sleep(SETTLE_S)
            path = out / f"{name}.png"
            picture = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
            # Octrees keep rare colours, as those of boxes and of tokens; no dithering, which text would show.
            picture.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
            written.append(path)
    return written


if __name__ == "__main__":
    print("\n".join(map(str, take(Path(sys.argv[1]), Path(sys.argv[2])))))
