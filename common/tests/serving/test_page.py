"""The page in a real browser: Debian's Chromium, driven by Playwright, against a server with answers from a list."""

from __future__ import annotations

import re

import pytest

from common.tests.browser import PHONE, WIDE, chromium, expect  # noqa: F401  (the fixture `browser`)
from common.tests.serving.conftest import eventually
from common.tests.serving.fake import FakeServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, just opened. It must not fetch anything from elsewhere, and no script may fail."""
    context = browser.new_context(viewport=WIDE)
    context.set_default_timeout(120_000)
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: request.url.startswith((server.url, "data:")) or failures.append(request.url))
    page.goto(server.url)
    yield page
    context.close()
    assert failures == []


expect.set_options(timeout=120_000)


def send(pane, text: str) -> None:
    pane.get_by_label("Message", exact=True).fill(text)
    pane.get_by_role("button", name="Send").click()


def answers(place):
    return place.locator(".message.assistant")


def test_two_conversations_are_answered_at_once(page, server) -> None:
    page.get_by_role("button", name="+ Beside").click()
    first, second = page.locator(".pane").all()
    server.goes_on.clear()
    send(first, "60")
    send(second, "60")
    expect(page.locator("[aria-busy=true]")).to_have_count(2)
    expect(answers(first)).to_contain_text("word9")
    expect(answers(second)).to_contain_text("word9")
    server.goes_on.set()
    expect(answers(first)).to_contain_text("word59")
    expect(answers(second)).to_contain_text("word59")
    assert server.most_streams == 2
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "60"}]] * 2
    for pane in (first, second):
        figures = r"first token after \d+\.\d\d s · \d+\.\d tokens/s · 600 tokens · cut off at max_tokens"
        expect(answers(pane).locator(".foot")).to_contain_text(re.compile(figures))


def test_one_question_goes_to_all_and_no_draft_is_lost(page, server) -> None:
    page.get_by_role("button", name="+ Beside").click()
    page.get_by_label("Ask all").check()
    first, second = page.locator(".pane").all()
    second.get_by_label("Message", exact=True).fill("a draft")
    send(first, "hello")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    assert len(server.bodies) == 2
    expect(second.get_by_label("Message", exact=True)).to_have_value("a draft")


def test_an_answer_is_stopped_and_asked_for_again(page, server) -> None:
    server.goes_on.clear()
    send(page, "400")
    expect(answers(page)).to_contain_text("word5 ")
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    expect(answers(page)).to_contain_text("word5 ")
    server.goes_on.set()
    eventually(lambda: server.num_aborted == 1)
    server.bodies.clear()
    server.goes_on.clear()
    page.get_by_role("button", name="Regenerate").click()
    eventually(lambda: server.bodies)
    page.get_by_role("button", name="Stop").click()
    expect(answers(page)).to_have_count(1)
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "400"}]]


def test_a_reload_loses_nothing(page, server) -> None:
    send(page, "hello")
    expect(answers(page)).to_contain_text("word2")
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    page.locator("summary").click()
    page.get_by_label("temperature").fill("1.5")
    page.get_by_role("button", name="+ Beside").click()
    second = page.locator(".pane").nth(1)
    server.goes_on.clear()
    send(second, "400")
    expect(answers(second)).to_contain_text("word5 ")
    second.get_by_label("Message", exact=True).fill("not sent yet")
    page.reload()
    first, second = page.locator(".pane").nth(0), page.locator(".pane").nth(1)
    expect(answers(first)).to_contain_text("word2")
    expect(answers(second)).to_contain_text("word5 ")
    expect(answers(second)).to_contain_text("the page was left during this answer")
    expect(second.get_by_label("Message", exact=True)).to_have_value("not sent yet")
    expect(first.locator("summary")).to_contain_text("temperature 1.5")
    send(first, "and now?")
    expect(answers(first)).to_have_count(2)
    assert [each["role"] for each in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("problem", ["SecurityError", "QuotaExceededError"])
def test_a_browser_that_keeps_nothing_says_so_and_the_page_works(page, server, problem) -> None:
    """Where storage is forbidden, reading the property fails; where it is full, writing to it does."""
    fail = f"throw new DOMException('', '{problem}')"
    getter = f"Object.defineProperty(window, each, {{get() {{ {fail}; }}}})"
    forbid = f"for (const each of ['localStorage', 'sessionStorage']) {getter}"
    page.add_init_script(forbid if problem == "SecurityError" else f"Storage.prototype.setItem = () => {{ {fail}; }}")
    page.reload()
    server.key = "secret"
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    page.get_by_role("button", name="+ Beside").click()
    for pane in page.locator(".pane").all():
        send(pane, "hello")
        expect(answers(pane)).to_contain_text("word2")
    expect(page.locator("#trouble")).to_contain_text("reload")
    page.get_by_role("button", name="Chats").click()
    expect(page.get_by_role("button", name="hello", exact=True)).to_have_count(2)
    page.reload()
    expect(answers(page)).to_have_count(0)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("refuse", "The server answered with status 400. top_p must be above 0."),
        ("full", "The server is full; try again in 7 s. 64 requests wait."),
        ("break", "The server broke the answer off before its end."),
        ("late error", "the engine has stopped."),
    ],
)
def test_an_error_is_shown_where_the_answer_would_be(page, wish, message) -> None:
    send(page, wish)
    expect(answers(page).get_by_role("alert")).to_have_text(message)
    expect(page.get_by_role("button", name="Try again")).to_be_enabled()


def test_a_server_that_is_gone_is_named_and_found_again(page, server) -> None:
    expect(page.get_by_label("Model", exact=True)).to_have_value("fake")
    server.__exit__()
    expect(page.locator("#trouble")).to_contain_text("The server does not answer.")
    send(page, "hello")
    expect(answers(page).get_by_role("alert")).to_contain_text("The server does not answer.")


def test_a_models_text_never_becomes_html(page) -> None:
    send(page, "markup")
    expect(answers(page)).to_contain_text("<img src=x")
    expect(answers(page).locator("strong")).to_have_text("bold")
    expect(answers(page).locator("pre")).to_have_text("let a = '<b>';")
    expect(answers(page)).to_contain_text("end")
    assert answers(page).locator("img, script, b").count() == 0
    assert page.evaluate("window.harmed") is None


def test_each_line_is_written_from_its_own_side(page) -> None:
    """A line that begins with Hebrew stands at the right of the bubble, the one below it at the left."""
    send(page, "שלום\nhello")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    sides = """element => {
        const text = element.firstChild, box = element.getBoundingClientRect();
        return [[0, 4], [5, 10]].map(([start, end]) => {
            const range = document.createRange();
            range.setStart(text, start); range.setEnd(text, end);
            const line = range.getBoundingClientRect();
            return line.left - box.left > box.right - line.right ? "right" : "left";
        });
    }"""
    assert page.locator(".message.user .text").evaluate(sides) == ["right", "left"]


def test_settings_are_sent_and_a_wrong_one_is_named(page, server) -> None:
    page.locator("summary").click()
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 12, "seed": 7}
    for name, value in settings.items():
        page.get_by_label(name).fill(str(value))
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "hello")
    expect(answers(page)).to_contain_text("word2")
    [body] = server.bodies
    assert {name: body[name] for name in settings} == settings
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    page.get_by_label("max_tokens").fill("0")
    expect(page.locator(".settings .problem")).to_contain_text("max_tokens")
    send(page, "again")
    expect(answers(page).last.get_by_role("alert")).to_contain_text("Nothing was asked. max_tokens")
    assert len(server.bodies) == 1
    page.get_by_label("max_tokens").fill("")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page).last).to_contain_text("word2")
    assert "max_tokens" not in server.bodies[-1]


def test_a_message_is_edited_by_keyboard(page, server) -> None:
    send(page, "first")
    expect(answers(page)).to_contain_text("word2")
    send(page, "second")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    page.get_by_role("button", name="Edit").first.press("Enter")
    field = page.get_by_label("The message, to be edited")
    expect(field).to_be_focused()
    field.fill("other")
    field.press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("word2")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "other"}]


def test_a_key_is_asked_for_and_is_not_kept_beyond_the_tab(page, server) -> None:
    server.key = "secret"
    expect(page.locator("#trouble")).to_have_text("The server wants an API key.")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#trouble")).to_have_text("The server does not know this API key.")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    send(page, "hello")
    expect(answers(page)).to_contain_text("word2")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("fake")
    expect(page.get_by_label("API key")).to_be_hidden()


def test_conversations_are_listed_opened_and_deleted(page) -> None:
    send(page, "the oldest")
    expect(answers(page)).to_contain_text("word2")
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="New", exact=True).click()
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="the oldest", exact=True).click()
    expect(page.locator(".pane")).to_have_count(1)
    expect(answers(page)).to_contain_text("word2")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Delete: the oldest").click()
    expect(page.get_by_role("button", name="New", exact=True)).to_be_focused()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


def test_the_live_panel_shows_the_engines_metrics(page) -> None:
    for metric, text in {"running": "3", "waiting": "2", "pool": "25%", "hits": "25%", "accepted": "80%"}.items():
        expect(page.locator(f"[data-metric={metric}] dd")).to_have_text(text)
    expect(page.locator("[data-metric=rate] dd")).to_have_text("0.0")


def test_the_end_of_an_answer_stays_in_sight_unless_its_reader_has_scrolled_up(page, server) -> None:
    """Another conversation beside it makes the lines shorter, and open settings or a phone's keyboard the list."""
    send(page, "400")
    expect(answers(page)).to_contain_text("word399")
    below = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    messages = page.locator(".messages").first
    page.get_by_role("button", name="+ Beside").click()
    eventually(lambda: messages.evaluate(below) < 2)
    page.set_viewport_size(PHONE)
    eventually(lambda: messages.evaluate(below) < 2)
    page.reload()
    expect(answers(page)).to_contain_text("word399")
    eventually(lambda: messages.evaluate(below) < 2)
    messages.evaluate("e => { e.scrollTop = 100; }")
    page.locator(".pane").first.locator("summary").click()
    expect(page.get_by_label("seed").first).to_be_visible()
    assert messages.evaluate("e => e.scrollTop") == 100


@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_nothing_overflows_or_is_out_of_reach(page, size) -> None:
    page.set_viewport_size(size)
    page.get_by_role("button", name="+ Beside").click()
    for pane in page.locator(".pane").all():
        send(pane, "markup")
    expect(page.locator(".message pre")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("document.documentElement.scrollHeight") <= size["height"]
    for pane in page.locator(".pane").all():
        pane.scroll_into_view_if_needed()
        for button in pane.get_by_role("button").all():
            if button.is_visible():
                button.click(trial=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(360, 640), (640, 400), (320, 256)], ids=["narrow", "zoom of 200 %", "zoom of 400 %"])
def test_a_narrow_or_enlarged_page_scrolls_only_down_and_by_keyboard(page, size, scheme) -> None:
    """1280 x 800 at 200 % is a window of 640 x 400; 1280 x 1024 at 400 % one of 320 x 256 (WCAG 1.4.10)."""
    width, height = size
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    send(page, "markup")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("seed")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = set()
    measure = "e => { const b = e.getBoundingClientRect(); return [b.top, b.bottom, b.left, b.right]; }"
    page.evaluate("document.activeElement.blur()")
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if focused.count():
            names.add(focused.evaluate("e => e.textContent.trim() || e.ariaLabel || e.name"))
            top, bottom, left, right = focused.evaluate(measure)
            shown = min(bottom, height) - max(top, 0)
            assert shown >= min(bottom - top, 20) - 1 and left >= 0 and right <= width, (
                f"the last of {names} is not seen"
            )
    assert {"Chats", "+ Beside", "Edit", "Regenerate", "Send", "seed"} <= names
    assert page.locator(".messages").bounding_box()["height"] >= 50


def test_everything_is_reached_with_the_tabulator(page) -> None:
    send(page, "hello")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.ariaLabel"))
    assert {"Chats", "+ Beside", "Edit", "Regenerate", "Send", "✕", "Message"} <= reached


def test_the_real_server_and_the_page_understand_each_other(browser, url) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme="dark")
    page = context.new_page()
    page.goto(url)
    expect(page.get_by_label("Model", exact=True)).to_have_value("tales")
    page.locator("summary").click()
    page.get_by_label("max_tokens").fill("24")
    page.get_by_label("seed").fill("1")
    page.locator("summary").click()
    send(page, "Tell me a tale.")
    figures = r"first token after \d+\.\d\d s · \d+\.\d tokens/s · 24 tokens · cut off at max_tokens"
    expect(answers(page).locator(".foot")).to_contain_text(re.compile(figures))
    first = answers(page).locator(".text").inner_text()
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page).locator(".foot")).to_contain_text("24 tokens")
    assert answers(page).locator(".text").inner_text() == first  # the same seed
    for metric, text in {"running": "0", "waiting": "0", "pool": "0.0%"}.items():
        expect(page.locator(f"[data-metric={metric}] dd")).to_have_text(text)
    expect(page.locator("[data-metric=hits] dd")).to_have_text(re.compile(r"\d%"))
    page.locator("summary").click()
    page.get_by_label("top_p").fill("0")
    send(page, "Another one.")
    expect(answers(page).last.get_by_role("alert")).to_contain_text("The server answered with status 400. top_p")
    context.close()
