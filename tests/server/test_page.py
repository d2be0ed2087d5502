"""The page as a file and as an answer: what its policy permits, and that it asks nobody else."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from openelm_mlx.server.page import FILE, policy

HTML = FILE.read_text(encoding="utf-8")
# attributes that name something to load, or that hold a script or a style of their own
LOADING = {"action", "background", "data", "formaction", "ping", "poster", "src", "srcset", "style"}
# ways in which a text could become HTML or a script
UNSAFE = (
    "innerHTML outerHTML insertAdjacentHTML setHTMLUnsafe document.write DOMParser srcdoc eval( "
    "createContextualFragment Function( import( javascript: .cssText"
)


class Elements(HTMLParser):
    """The elements of the page with their attributes, and the texts of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline[self.cdata_elem].append(data)


ELEMENTS = Elements()


def test_the_policy_allows_the_inline_script_and_style_by_hash_and_nothing_else(http):
    answer = http.get("/")
    assert answer.status_code == 200 and answer.text == HTML
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    sources = {
        kind: base64.b64encode(hashlib.sha256("".join(texts).encode()).digest()).decode()
        for kind, texts in ELEMENTS.inline.items()
    }
    assert dict(
        rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
    ) == {
        "default-src": "'none'",
        "script-src": f"'sha256-{sources['script']}'",
        "style-src": f"'sha256-{sources['style']}'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_another_script_has_another_hash():
    html = HTML.encode()
    assert policy(html) != policy(html.replace(b'"use strict";', b'"use strict"; alert(1);'))


def test_a_browser_that_has_the_page_is_told_so(http):
    whole = http.get("/")
    tag = whole.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = http.get("/", headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["ETag"] == tag
    assert http.get("/", headers={"If-None-Match": '"other"'}).content == whole.content
    head = http.head("/")
    assert head.status_code == 200 and head.content == b""
    assert head.headers["Content-Length"] == str(len(HTML.encode()))


def test_the_page_is_one_small_file_that_asks_for_nothing():
    assert len(HTML.encode()) <= 60_000
    assert [len(texts) for texts in ELEMENTS.inline.values()] == [1, 1]
    for tag, attributes in ELEMENTS.found:
        assert not LOADING & attributes.keys() and not any(
            name.startswith("on") for name in attributes
        ), (tag, attributes)
        assert tag not in {"base", "embed", "form", "iframe", "img", "link", "object"}
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"\w+://|@import|url\(", HTML)


def test_no_text_becomes_html():
    script = "".join(ELEMENTS.inline["script"])
    assert [way for way in UNSAFE.split() if way in script] == []


def test_ids_that_the_script_uses_are_there_once():
    ids = [attributes["id"] for _, attributes in ELEMENTS.found if "id" in attributes]
    used = set(re.findall(r'\$\("([\w-]+)"\)', HTML))
    assert len(ids) == len(set(ids)) and used <= set(ids) | {""}
    for tag, attributes in ELEMENTS.found:
        for name in (
            "for",
            "aria-controls",
            "aria-labelledby",
            "aria-describedby",
            "popovertarget",
        ):
            assert attributes.get(name, ids[0]) in ids, (tag, attributes)
