"""The page in Chromium, with a real server: what it shows is what the API says."""

from __future__ import annotations

import json
import math
import shutil

import httpx
import pytest
from chat_page import ChatPage, chromium
from serving import serving

from openelm_mlx.chat import Conversation
from openelm_mlx.engine.hub import resolve_model

pytestmark = [pytest.mark.needs("Chromium"), pytest.mark.needs("playwright")]

KEY = "open-sesame"
LONG = f"{'and so on ' * 40}\n\n{'longword' * 20}"
TURNS = [{"role": role, "content": LONG} for role in ("user", "assistant") * 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The bundled model without its chat template, which makes it a base model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    template = shutil.ignore_patterns("*.jinja")
    return shutil.copytree(resolve_model("openelm-tiny").folder, folder, ignore=template)


@pytest.fixture(scope="module")
def site(base):
    with serving("openelm-tiny", base, api_key=(KEY,)) as address:
        yield address


@pytest.fixture(scope="module")
def profile(site):
    with chromium() as browser:
        yield ChatPage(browser, site, KEY)


@pytest.fixture
def page(profile, site):
    page = profile
    page.begin_anew()
    yield page
    assert page.complaints == []
    assert all(address.startswith((site, "blob:")) for address in page.requests)


def ask_api(site, path, **body):
    bearer = {"Authorization": f"Bearer {KEY}"}
    body = {"temperature": 0, **body}
    return httpx.post(f"{site}/v1/{path}", json=body, headers=bearer, timeout=60).json()


def test_an_answer_and_its_probabilities_are_those_of_the_api(page, site):
    page.tab.get_by_role("button", name="Settings").click()
    page.tab.get_by_label("Max tokens").fill("12")
    page.tab.get_by_label("System prompt").fill("Be brief.")
    shown = page.ask("Tell me a story.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me a story."},
    ]
    more = {"max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    whole = ask_api(site, "chat/completions", messages=messages, **more)
    assert shown == whole["choices"][0]["message"]["content"]
    tokens = whole["choices"][0]["logprobs"]["content"]
    pieces = page.tab.locator("article.assistant .t")
    assert pieces.count() == len(tokens) == 12
    pieces.nth(7).hover()
    card = page.tab.get_by_role("tooltip")
    likeliest = tokens[7]["top_logprobs"]
    assert card.locator("code").all_text_contents() == [
        one["token"].replace(" ", "␣") for one in likeliest
    ]
    for text, one in zip(card.locator("span").all_text_contents(), likeliest, strict=True):
        share = 100 * math.exp(one["logprob"])
        assert text == ("< 0.1%" if share < 0.1 else f"{share:.1f}%")
    assert page.tab.inner_text("#used") == f"{whole['usage']['total_tokens']} of 1,024 tokens"
    facts = page.tab.inner_text("article.assistant .under")
    assert facts.startswith("12 tokens · ") and "tokens/s" in facts and "token limit" in facts


def test_controls_are_those_of_the_schema(page, site):
    bearer = {"Authorization": f"Bearer {KEY}"}
    schemas = httpx.get(f"{site}/openapi.json", headers=bearer).json()["components"]["schemas"]
    properties = schemas["ChatBody"]["properties"]
    wanted = {}
    for name in properties.keys() - {"n", "top_logprobs", "max_completion_tokens"}:
        kind = properties[name].get("anyOf", [{}])[0]
        if kind.get("type") in ("number", "integer"):
            whole = kind["type"] == "integer"
            most = min(kind.get("maximum", math.inf), 2.0**53 - 1 if whole else math.inf)
            wanted[f"set-{name}"] = kind.get("minimum"), most, "1" if whole else "any"
    shown = page.tab.locator("#settings input[type=number]").evaluate_all(
        "list => list.map(one => [one.id, one.min, one.max, one.step])"
    )
    assert len(wanted) > 10 and wanted == {
        name: (float(low), float(high or "inf"), step) for name, low, high, step in shown
    }
    description = properties["top_p"]["description"]
    assert page.tab.locator("#help-top_p").text_content() == f"{description.capitalize()}."


ESCAPE = """() => new MutationObserver(() => {
    const escape = new KeyboardEvent("keydown", {key: "Escape", bubbles: true});
    if (document.querySelectorAll(".t").length > 5) document.activeElement.dispatchEvent(escape);
}).observe(document.getElementById("turns"), {childList: true, subtree: true})"""


def test_an_answer_is_stopped_and_kept(page):
    page.sample(max_tokens=60, temperature=0)
    whole = page.ask("Tell me a story.")
    page.tab.get_by_role("button", name="New").click()
    page.tab.evaluate(ESCAPE)  # as soon as there are six tokens
    partial = page.ask("Tell me a story.")
    assert 0 < len(partial) < len(whole) and whole.startswith(partial)
    assert "stopped by you" in page.tab.inner_text("article.assistant .under")
    page.reload()
    page.tab.locator("article").nth(1).wait_for()
    assert page.texts == ["Tell me a story.", partial]
    page.sample(max_tokens=4)
    assert page.ask("And then?") and len(page.texts) == 4


def test_edit_regenerate_and_undo(page):
    first, second = page.ask("Hello"), page.ask("What is a tree?")
    page.tab.get_by_role("button", name="Regenerate").last.click()
    assert page.finish() == second
    assert "was replaced" in page.tab.inner_text("#notice")
    page.tab.get_by_role("button", name="Edit").first.click()
    page.tab.get_by_label("Edit your message").fill("Good night")
    page.tab.keyboard.press("Enter")
    answer = page.finish()
    assert page.texts == ["Good night", answer] and answer != first
    page.tab.get_by_role("button", name="Undo").click()
    assert page.texts == ["Hello", first, "What is a tree?", second]
    page.tab.keyboard.press("ArrowUp")  # in the empty field: edit the last message
    assert page.tab.get_by_label("Edit your message").input_value() == "What is a tree?"
    page.tab.keyboard.press("Escape")
    assert page.texts == ["Hello", first, "What is a tree?", second]


def test_conversations_are_kept_named_saved_and_read(page, tiny):
    answer = page.ask("Hello")
    page.choose("Rename")
    page.tab.keyboard.type("A *greeting*\n")
    data = page.saved("Export as JSON")
    talk = Conversation.from_json(tiny, json.loads(data))
    assert [one["content"] for one in talk.messages] == ["Hello", answer]
    markdown = page.saved("Export as Markdown")
    assert markdown == f"# A *greeting*\n\n## You\n\nHello\n\n## openelm-tiny\n\n{answer}\n"
    names = page.tab.locator("#list button")
    page.choose("Delete")
    assert page.texts == [] and names.count() == 0
    page.tab.get_by_role("button", name="Undo").click()
    assert page.texts == ["Hello", answer] and names.all_text_contents() == ["A *greeting*"]
    page.choose("Delete")
    assert page.load(data) == "Read from file.json: A *greeting*."
    assert page.texts == ["Hello", answer] and page.tab.locator(".t").count() == 8
    other = Conversation(tiny, system="Be kind.")
    list(other.send("Good night"))
    names = page.open().locator("#list button")  # of one more tab
    page.load(json.dumps(other.to_json()), "chat.json")
    names.nth(1).wait_for()
    assert sorted(names.all_text_contents()) == ["A *greeting*", "Good night"]
    assert page.texts == [one["content"] for one in other.messages]
    assert page.tab.input_value("#system") == "Be kind."


def test_files_of_another_kind_are_refused(page):
    for content, why in (
        ("{", "it is not JSON"),
        ("{}", "it has no messages"),
        ('[{"messages": [{"role": "user"}]}]', "message 1 is not a text of a user"),
        ('[{"role": "assistant", "content": "a"}]', "message 1 is of the assistant, where the"),
    ):
        assert f"file.json was not read: {why}" in page.load(content)
        page.tab.get_by_role("button", name="Dismiss").click()
    assert page.texts == []


def test_a_text_is_never_html(page):
    text = "<img src=x onerror=\"document.title='bad'\"><b>bold</b> &amp; <script>1</script>"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    page.load(json.dumps({"title": text, "messages": messages}))
    assert page.texts == [text, text] and page.tab.inner_text("#title") == text
    assert page.tab.locator("#turns :is(img, b, script), #list b, #notice b").count() == 0
    assert page.tab.title() == f"{text} · OpenELM"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.tab.evaluate("document.body.innerHTML = '<b>bold</b>'")
    page.complaints.clear()


def test_errors_are_said_with_what_to_do(page):
    page.sample(temperature=-5)
    page.send("Hello")
    field = page.tab.get_by_label("Temperature", exact=True)
    assert field.is_visible() and field.get_attribute("aria-invalid") == "true"
    assert page.texts == [] and page.tab.input_value("#prompt") == "Hello"
    page.sample(max_tokens=4, xtc_threshold=0.2)
    page.send("Hello")
    notice = page.tab.locator("#notice")
    notice.get_by_text("give xtc_probability too").wait_for()
    page.sample(max_tokens=4)
    page.send("word " * 1100)
    notice.get_by_text("the model's context is 1024").wait_for()
    page.context.set_offline(True)
    page.send("Hello")
    notice.get_by_text("The server does not answer.").wait_for()
    assert "See whether openelm serve still runs." in notice.inner_text()
    page.context.set_offline(False)
    notice.get_by_role("button", name="Try again").click()
    assert page.finish() and page.texts[0] == "Hello"
    page.complaints = [said for said in page.complaints if "Failed to load resource" not in said]


def test_the_key_is_asked_for_and_kept_as_wished(page):
    page.tab.get_by_role("button", name="Settings").click()
    page.tab.get_by_role("button", name="Forget the key").click()
    asked = page.tab.get_by_role("dialog", name="This server asks for a key")
    kept = "[localStorage, sessionStorage].map(one => one.getItem('openelm.key'))"
    for key, keep in (("wrong", False), (KEY, False), (KEY, True)):
        asked.get_by_label("API key").fill(key)
        asked.get_by_label("Keep it").set_checked(keep)
        asked.get_by_role("button", name="Use this key").click()
        if key == "wrong":
            asked.get_by_text("does not know the key").wait_for()
            continue
        asked.wait_for(state="hidden")
        assert page.tab.evaluate(kept) == ([KEY, None] if keep else [None, KEY])
        assert page.ask("Hello")
        if not keep:
            page.tab.get_by_role("button", name="Forget the key").click()
    page.complaints = [said for said in page.complaints if "401" not in said]


def test_a_base_model_continues_a_text(page, base, site):
    page.tab.select_option("#model", str(base))
    assert "base model: it continues a text" in page.tab.inner_text("#empty")
    page.send("Once upon a")
    first = page.finish()
    page.tab.press("#prompt", "Enter")  # on from where it stopped
    second = page.finish()
    for prompt, text in (("Once upon a", first), (f"Once upon a{first}", second)):
        whole = ask_api(site, "completions", model=str(base), prompt=prompt, max_tokens=8)
        assert whole["choices"][0]["text"] == text
    assert page.texts == ["Once upon a", first, second]
    assert page.tab.locator(".t").count() == 16


def test_the_keyboard_does_it_all(page):
    tab, focused = page.tab, "document.activeElement.id"
    assert tab.evaluate(focused) == "prompt"
    tab.keyboard.type("one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two?")
    assert tab.input_value("#prompt") == "one\ntwo?"
    page.load(json.dumps(TURNS))
    tab.focus("#log")
    tab.keyboard.press("s")
    assert tab.evaluate(focused) == "hide-settings"
    tab.get_by_label("Single-key shortcuts").uncheck()
    tab.keyboard.press("?")
    assert tab.get_by_role("dialog", name="Shortcuts").is_hidden()
    tab.get_by_label("Single-key shortcuts").check()
    tab.keyboard.press("?")
    assert tab.get_by_role("dialog", name="Shortcuts").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    assert tab.evaluate(focused) == "show-settings" and tab.locator("#settings").is_hidden()
    tab.keyboard.press("n")
    assert tab.evaluate(focused) == "prompt" and page.texts == []
    tab.keyboard.press("Alt+ArrowDown")
    assert len(page.texts) == 4
    skip = tab.locator("a, button, input, textarea").first
    skip.focus()
    assert skip.inner_text() == "Skip to the message field" and skip.bounding_box()["y"] > 0
    tab.keyboard.press("Enter")
    assert tab.evaluate(focused) == "prompt"


def test_a_screen_reader_hears_the_answer_once_and_each_probability(page):
    hear = "const node = document.getElementById('said'); globalThis.heard = [];"
    hear += "new MutationObserver(() => heard.push(node.textContent)).observe(node, "
    page.tab.evaluate(f"() => {{ {hear} {{childList: true}}) }}")
    answer = page.ask("Hello")
    heard = page.tab.evaluate("heard")
    assert heard == ["The model answers.", f"openelm-tiny: {answer}"]
    page.tab.locator("article.assistant .text").focus()
    page.tab.keyboard.press("Home")
    pieces = page.tab.locator(".t")
    first = page.tab.inner_text("#said")
    assert first.startswith(f"{pieces.first.text_content()}, ") and first.endswith("%")
    page.tab.keyboard.press("ArrowRight")
    assert page.tab.locator(".t.at").text_content() == pieces.nth(1).text_content()
    assert page.tab.get_by_role("tooltip").is_visible()
    page.tab.keyboard.press("Escape")
    assert page.tab.get_by_role("tooltip").is_hidden()


@pytest.mark.needs("axe-core")
def test_axe_finds_nothing_and_nothing_is_too_wide(page):
    page.load(json.dumps(TURNS))
    page.tab.focus("#log")
    page.tab.keyboard.press("s")
    page.tab.get_by_text("Further options").click()
    page.tab.get_by_label("Shade").check()
    page.tab.keyboard.press("Escape")
    for width, states in ((375, ("n", "Alt+ArrowDown", "s")), (1280, ("s", "?"))):
        page.tab.set_viewport_size({"width": width, "height": 800})
        for key in states:
            page.tab.keyboard.press(key)
            page.tab.emulate_media(color_scheme="light")
            assert page.faults() == [], (width, key)
            page.tab.emulate_media(color_scheme="dark")
            assert page.faults("color-contrast") == [], (width, key)  # all that differs
            page.tab.keyboard.press("Escape")


def test_a_panel_of_a_small_window_keeps_the_keyboard(page):
    page.tab.set_viewport_size({"width": 375, "height": 800})
    page.tab.get_by_role("button", name="Chats").click()
    state = "[document.getElementById('main').inert, document.activeElement.id]"
    assert page.tab.evaluate(state) == [True, "new"]
    page.tab.keyboard.press("Escape")
    assert page.tab.evaluate(state) == [False, "show-history"]


def test_theme_and_motion_are_those_of_the_system(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.tab.evaluate(paper)
    page.tab.emulate_media(color_scheme="dark")
    dark = page.tab.evaluate(paper)
    assert light != dark
    page.tab.get_by_role("button", name="Settings").click()
    page.tab.get_by_label("Light").check()
    page.reload()
    assert page.tab.evaluate(paper) == light
    page.load(json.dumps(TURNS))
    running = "document.querySelector('.assistant').classList.add('running')"
    page.tab.evaluate(running)
    moving = "getComputedStyle(document.querySelector('.running .text'), '::after').animationName"
    assert page.tab.evaluate(moving) == "breathe"
    page.tab.emulate_media(reduced_motion="reduce")
    assert page.tab.evaluate(moving) == "none"
