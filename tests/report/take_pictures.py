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

SETTLE_S = 2.0  # for charts to be drawn
COLOURS = 128  # of a picture, which keeps it below 200 kB


def take(run: Path, out: Path) -> list[Path]:
    """Write the pictures: name -> window, scheme, and what stands on top of it."""
    out.mkdir(parents=True, exist_ok=True)
    address = write_page([run]).as_uri()
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
            browser.do("const field = document.getElementById('f-colour'); if (field) field.value = 'logprob'")
            browser.do("document.getElementById('f-colour')?.dispatchEvent(new Event('input', {bubbles: true}))")
            browser.do(f"report.drawAll(); document.querySelector('{top}').scrollIntoView()")
            time.sleep(SETTLE_S)
            browser.do(f"document.querySelector('{top}').scrollIntoView()")
            time.sleep(SETTLE_S)
            path = out / f"{name}.png"
            picture = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
            picture.quantize(COLOURS).save(path, optimize=True)
            written.append(path)
    return written


if __name__ == "__main__":
    print("\n".join(map(str, take(Path(sys.argv[1]), Path(sys.argv[2])))))
