"""The HTML page: what it says, that it trusts nobody, and how it looks in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_document import NASTY, rich_document, sparse_document
from browser import Browser
from optional import hide

from openelm_mlx.benchmarks.results.page import render, write_page
from openelm_mlx.errors import BenchmarkError

pytestmark = pytest.mark.needs("matplotlib")


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(rich_document())


def test_the_page_says_what_was_measured_on_what_by_which_command(html):
    text = re.sub(r"\s+", " ", Reader(html).text)
    for wanted in (
        "openelm benchmark --suite quick",
        "Made-up chip",
        "24 GiB",
        "12.5 GB/s",
        "0.32.4",
        "Linux CPU result, not Apple silicon",
        "the machine was busy",
        "640 (3%)",
        "parts at 17",
        "quartiles 14 % of the median apart",
        "1.09 (1.07-1.11)",
        "share of the rate at which a copy moves",
        "2026-01-02 03:04:05 UTC",
    ):
        assert wanted in text, wanted
    assert "interrupted" not in text and "commit" not in text


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(html):
    tags = Reader(html).tags
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "embed")]
    links = [
        value
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset")
    ]
    assert len(links) == 11 and all(link.startswith("data:") for link in links)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\(|@import", html)


def test_names_notes_and_commands_are_escaped():
    """A name that closes the title and brings an image: the page shows it as it is and has no such
    image.
    """
    reader = Reader(render(sparse_document()))
    assert not [
        attributes
        for tag, attributes in reader.tags
        if attributes.get("src") == "x" or "onerror" in attributes
    ]
    assert reader.text.count(NASTY) >= 6
    assert [tag for tag, _ in reader.tags].count("title") == 1
    assert "Partial run" in reader.text


def test_without_matplotlib_the_page_has_tables_and_says_what_to_install(monkeypatch):
    hide(monkeypatch, "matplotlib")
    reader = Reader(render(rich_document()))
    assert "No pictures: pictures need matplotlib: `pip install 'openelm-mlx[plot]'`" in reader.text
    assert [tag for tag, _ in reader.tags].count("table") == 3 and not [
        tag for tag, _ in reader.tags if tag == "img"
    ]


def test_an_empty_result_is_a_page_too_and_a_bad_path_an_error(tmp_path):
    assert "Nothing was measured." in render(replace(rich_document(), rows=(), ratios=()))
    with pytest.raises(
        BenchmarkError, match="cannot write .*; give a file in a folder that exists"
    ):
        write_page(sparse_document(), tmp_path / "none" / "a.html")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(html, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "rich.html").write_text(html, encoding="utf-8")
    write_page(sparse_document(), folder / "sparse.html")
    return folder


LAYOUT = """({
  page: document.documentElement.scrollWidth, window: innerWidth,
  pictures: [...document.images].map(
    i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width),
  small: [...document.querySelectorAll("body *")].filter(
    e => parseFloat(getComputedStyle(e).fontSize) < 12).length,
  beyond: [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre")
           && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName),
  boxes: [...document.querySelectorAll(".scroll")].map(box => [box.scrollWidth, box.clientWidth]),
  ink: getComputedStyle(document.body).color,
  paper: getComputedStyle(document.body).backgroundColor,
})"""


def contrast(one: str, other: str) -> float:
    """Return the contrast of two CSS colours, 1 to 21, as WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.needs("Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("page", ["rich", "sparse"])
def test_the_page_in_a_browser(browser, pages, page, width, dark):
    path = pages / f"{page}.html"
    browser.open(path, width, dark=dark)
    found = browser.value(LAYOUT)
    assert browser.complaints == [] and browser.requests == [path.as_uri()]
    assert found["page"] == found["window"] == width and found["beyond"] == []
    assert len(found["pictures"]) == (5 if page == "rich" else 1) and all(
        size > 300 for size in found["pictures"]
    )
    assert found["small"] == 0
    assert contrast(found["ink"], found["paper"]) > 7
    if page == "rich":
        # what is wider than a telephone scrolls in its own box; a desk shows it whole
        assert [inner > outer for inner, outer in found["boxes"]] == [width == 375] * 3
    assert (
        browser.value("document.images[0].currentSrc != document.images[0].src") == dark
    )  # the dark source was taken


@pytest.mark.needs("Chromium")
def test_the_browser_would_have_complained(browser, tmp_path):
    """What the test above relies on: errors, broken pictures and requests do reach it."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src=missing.png><script>console.error('one'); throw new Error('two')</script>"
    )
    browser.open(page, 375)
    said = " ".join(browser.complaints)
    assert "one" in said and "two" in said and len(browser.requests) == 2
    assert browser.value("document.images[0].naturalWidth") == 0
