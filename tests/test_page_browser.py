"""`route --html` in headless Chromium: the page looks as its text says."""

import colorsys
import shutil
import subprocess

import pytest
from vllm_adafuse.cli.colors import hue, level
from vllm_adafuse.cli.page import render_page
from vllm_adafuse.cli.tokens import RoutedToken

FOUND = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, FOUND), "")
Image = pytest.importorskip("PIL.Image")
NAMES = ("code", "prose", "<script>document.body.remove()</script>")
EDGE = 12  # pixels at the right where nothing may stand


def picture(tmp_path, width, *flags):
    """The page of a text of 60 tokens, as [height][width] of RGB."""
    text = ["def", " add", "(", "a", ")", ":", "\n", " The", " licence", "</div>"] * 6
    tokens = [RoutedToken(id=i, text=t, experts=((i % 3, 0.75), ((i + 1) % 3, 0.25)))
              for i, t in enumerate(text)]  # fmt: skip
    page, shot = tmp_path / "page.html", tmp_path / f"{width}.png"
    page.write_text(render_page("Routes", "60 tokens", NAMES, tokens), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={tmp_path}/user",
        f"--window-size={width},900", f"--screenshot={shot}", *flags, page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(shot).convert("RGB")


def share(image, wanted):
    """Pixels within a rounding of a colour, in 1/1000 of the picture."""
    pixels = list(image.getdata())
    near = sum(all(abs(a - b) <= 2 for a, b in zip(p, wanted)) for p in pixels)
    return 1000 * near / len(pixels)


def background(expert, lightness, saturation):
    red_green_blue = colorsys.hls_to_rgb(
        hue(expert) / 360, lightness + 0.06 * level(expert), saturation
    )
    return tuple(round(255 * value) for value in red_green_blue)


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1100, 500])
def test_every_expert_has_its_colour_and_nothing_runs_over_the_edge(tmp_path, width):
    image = picture(tmp_path, width)
    for expert in range(3):  # text and legend; a script in a name would have removed both
        assert share(image, background(expert, 0.82, 0.70)) > 2
    assert share(image, (26, 26, 26)) > 0.5  # ink
    edge = image.crop((width - EDGE, 0, width, 900))
    assert edge.getcolors(1) == [(EDGE * 900, (255, 255, 255))]


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
def test_dark_screens_get_dark_colours(tmp_path):
    image = picture(tmp_path, 1100, "--blink-settings=preferredColorScheme=0")
    assert share(image, (22, 24, 28)) > 500
    for expert in range(3):
        assert share(image, background(expert, 0.26, 0.55)) > 2
