"""The page of the server in a real Chromium, driven by Playwright."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from browser import find_chromium

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
MILLISECONDS = 20_000.0  # the longest wait for anything
SHORT = json.dumps({"sampling": {"temperature": 0, "max_tokens": 8}})


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser
        browser.close()


class ChatPage:
    """A tab with the page of a server, which knows its key; answers are greedy and short.

    `complaints` has what the console was told: errors, warnings and exceptions.
    """

    def __init__(self, browser: Any, address: str, key: str) -> None:
        self.address = address
        self.context = browser.new_context()
        self.context.set_default_timeout(MILLISECONDS)
        known = f"localStorage['openelm.settings'] ??= '{SHORT}';"
        self.context.add_init_script(f"{known} sessionStorage['openelm.key'] ??= '{key}'")
        self.complaints, self.requests = list[str](), list[str]()
        self.tab = self.open()

    def begin_anew(self) -> None:
        """Forget all that was kept; a new profile for each test would take four times as long."""
        for other in self.context.pages[1:]:
            other.close()
        what = {"origin": self.address, "storageTypes": "all"}
        self.context.new_cdp_session(self.tab).send("Storage.clearDataForOrigin", what)
        self.tab.set_viewport_size({"width": 1280, "height": 800})
        self.tab.emulate_media(color_scheme="light", reduced_motion="no-preference")
        self.complaints.clear()
        self.reload()

    def reload(self) -> None:
        """Load the page again and wait until it knows the models and the options."""
        self.tab.reload()
        self.tab.locator("#set-seed").wait_for(state="attached")

    def open(self) -> Any:
        """Open one more tab with the page."""
        tab = self.context.new_page()
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("console", self._hear)
        tab.goto(self.address)
        tab.locator("#set-seed").wait_for(state="attached")
        return tab

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            self.complaints.append(message.text)

    def sample(self, **sampling: float) -> None:
        """Set controls, as if they had been set before the page was opened."""
        kept = json.dumps({"sampling": sampling})
        self.tab.evaluate("kept => localStorage.setItem('openelm.settings', kept)", kept)
        self.reload()

    def send(self, text: str) -> None:
        """Send a message by Enter."""
        self.tab.fill("#prompt", text)
        self.tab.press("#prompt", "Enter")

    def ask(self, text: str) -> str:
        """Send a message, wait for the whole answer, and return it."""
        self.send(text)
        return self.finish()

    def finish(self) -> str:
        """Wait until the answer is complete and return it."""
        self.tab.locator("#send").wait_for()
        return str(self.tab.locator("article.assistant .text").last.text_content())

    @property
    def texts(self) -> list[str]:
        """The texts of the conversation that is shown."""
        return list(self.tab.locator("article .text").all_text_contents())

    def choose(self, name: str) -> None:
        """Choose an item of the menu of this conversation."""
        self.tab.get_by_role("button", name="This conversation").click()
        self.tab.get_by_role("button", name=name, exact=True).click()

    def saved(self, name: str) -> str:
        """Choose an item that saves a file, and return what it holds."""
        with self.tab.expect_download() as download:
            self.choose(name)
        return str(download.value.path().read_text(encoding="utf-8"))

    def load(self, content: str, name: str = "file.json") -> str:
        """Import a file and return what the page says of it."""
        file = {"name": name, "mimeType": "application/json", "buffer": content.encode()}
        self.tab.set_input_files("#file", files=[file])
        self.tab.locator("#notice").get_by_text(name).wait_for()
        return str(self.tab.inner_text("#notice p"))

    def faults(self, rules: str = "") -> list[str]:
        """Return what axe-core finds by all its rules, or by one, and whether it is too wide."""
        if not self.tab.evaluate("'axe' in window"):
            package = str(find_spec("axe_playwright_python").origin)  # type: ignore[union-attr]
            self.tab.evaluate(Path(package).with_name("axe.min.js").read_text(encoding="utf-8"))
        options = {"resultTypes": ["violations"], **({"runOnly": [rules]} if rules else {})}
        found = self.tab.evaluate("options => axe.run(options)", options)["violations"]
        said = [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]
        wide = self.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        return said + [f"{wide} pixels wider than the window"] * (wide != 0)
