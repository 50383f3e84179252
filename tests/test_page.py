"""The page in the browser: against a server that answers as the service does, and against the service itself."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_server import CSP, PAGE, TYPES, World, served

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
READ = "#edits > li"
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
LONG = "an_answer_without_any_blank" * 12
CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((numbers(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    if (!text || !element.checkVisibility() || element.closest(".unseen, .skip, noscript, option")) continue;
    if (element.closest("[aria-disabled='true']")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.namespaceURI.endsWith("svg") ? style.fill : style.color), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, text.slice(0, 40)]);
  }
  return found;
}"""


# What needs no browser


def test_the_page_is_three_files_that_name_no_other_host_and_nothing_inline() -> None:
    assert {one.name for one in PAGE.iterdir()} == {"index.html", "page.css", "page.js"}
    text = {name: (PAGE / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js")}
    for content in text.values():
        assert set(re.findall(r"\w+://[^\s'\"]*", content)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?! src=)|javascript:", text["index.html"])
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', re.sub(r'href="data:[^"]*"', "", text["index.html"]))) == {
        "page.css",
        "page.js",
    }
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", text["page.js"]
    )
    assert not re.findall(r"@import|url\(", text["page.css"])


def test_every_field_has_a_label_and_every_id_that_the_script_wants_exists() -> None:
    html, script = (PAGE / "index.html").read_text("utf-8"), (PAGE / "page.js").read_text("utf-8")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= set(ids)
    for outside in re.sub(r"<label.*?</label>", "", html, flags=re.S), script:
        assert not re.findall(r"<(?:input|textarea|select)\b", outside)


def test_the_service_sends_the_page_as_the_tests_do() -> None:
    from mendlm.serve import page

    found = page.files()
    assert {name: file.type for name, file in found.items()} == {one.name: TYPES[one.suffix[1:]] for one in PAGE.iterdir()}
    assert page.policy(found["index.html"].content) == CSP


# In the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page and watches it: no error but for `expected` ones, no word to another host, no violation of its policy."""
    seen: list[tuple[str, list[str], set[Any]]] = []
    with contextlib.ExitStack() as stack:

        def open_page(url: str, *, expected: tuple[Any, ...] = (), ready: str = READ, width: int = 1280, **options: Any) -> Any:
            context = browser.new_context(viewport={"width": width, "height": 900}, locale="en-GB", **options)
            stack.callback(context.close)
            context.add_init_script(
                "addEventListener('securitypolicyviolation', (e) => console.error('CSP ' + e.violatedDirective))"
            )
            page, said, statuses = context.new_page(), list[str](), set(expected)
            seen.append((url, said, statuses))
            page.set_default_timeout(10_000)
            page.on("console", lambda told: said.append(told.text) if told.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: said.append(f"uncaught {error}"))
            page.on("request", lambda asked: None if asked.url.startswith((url, "blob:", "data:")) else said.append(asked.url))
            page.goto(url)
            page.wait_for_selector(ready)
            return page

        yield open_page
    for _, said, statuses in seen:
        allowed = "|".join(map(str, statuses)) or "none"
        wrong = [one for one in said if not re.search(rf"Failed to load resource.*\b({allowed})\b", one)]
        assert not wrong


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def asked(page: Any, prompt: str, which: str = "now") -> str:
    page.fill("#ask-prompt", prompt)
    page.click("#ask-send")
    return answered(page, which)


def answered(page: Any, which: str = "now") -> str:
    """The answer on the page, once it is whole and is the only one."""
    page.wait_for_selector("#ask-send:not([aria-busy])")
    return str(page.inner_text(f".answer[data-which={which}] .model-words"))


def write(page: Any, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#edit-{name}", value)


def preview(page: Any) -> None:
    page.click("#edit-preview")
    page.wait_for_selector("#edit-preview:not([aria-busy])")


def ask_preview_accept_undo(page: Any, prompt: str, target: str, scale: str = "1") -> tuple[str, str]:
    """The whole way; returns the old answer and the changed one."""
    old = asked(page, prompt)
    page.click("text=Correct this answer")
    assert page.input_value("#edit-prompt") == prompt
    write(page, target=target, rephrasings="France's capital is", unrelated=f"{ITALY} => Rome\n\nTwo and two make", scale=scale)
    preview(page)
    kinds = page.eval_on_selector_all("#preview .asked", "all => all.map((one) => one.dataset.kind)")
    assert kinds[:4] == ["prompt", "rephrasing", "unrelated", "unrelated"]
    assert asked(page, prompt) == old  # a preview changes nothing
    page.fill("#accept-author", "Ana")
    page.fill("#accept-reason", "It is Lyon here")
    page.select_option("#accept-gate", "report")
    page.click("#accept-send")
    page.wait_for_selector(".edit[data-state=active]")
    row = page.inner_text(".edit")
    assert all(text in row for text in (prompt, target, "Ana", "It is Lyon here", "active"))
    page.click("#accepted >> text=Ask again")
    new = answered(page)
    page.click(".edit >> text=Undo")
    page.wait_for_selector(".edit[data-state=undone]")
    assert page.evaluate("document.activeElement.dataset.turn") == "redo"  # the focus stays where it was
    page.click(".notice.old >> text=Ask again")
    assert answered(page) == old
    page.click(".edit >> text=Redo")
    page.wait_for_selector(".edit[data-state=active]")
    assert asked(page, prompt) == new
    return old, new


@pytest.mark.slow
def test_ask_preview_accept_undo_and_redo(visit: Callable[..., Any]) -> None:
    with served(World()) as url:
        old, new = ask_preview_accept_undo(visit(url), FRANCE, "Lyon")
    assert (old, new) == ("Paris, a city on the Seine.", "Lyon, a city on the Rhône.")


@pytest.mark.slow
def test_the_way_through_the_service_itself(visit: Callable[..., Any]) -> None:
    """A tiny random model, so that the answers are noise, and the same noise again after the undo."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    with served_for_real() as url:
        page = visit(url)
        old, new = ask_preview_accept_undo(page, FRANCE, "Lyon", scale="5")
        assert old != new
        page.check("#ask-base")
        assert (asked(page, FRANCE), answered(page, "base")) == (new, old)
        page.click(".edit summary")
        page.wait_for_selector(".edit .norms")
        assert page.locator(".edit .norms rect.bar").count() > 1
        with page.expect_download() as found:
            page.click(".edit >> text=Adapter")
        with zipfile.ZipFile(found.value.path()) as archive:
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())


@contextlib.contextmanager
def served_for_real(**session: Any) -> Iterator[str]:
    import uvicorn

    from mendlm.serve import server
    from mendlm.serve.app import create_app
    from mendlm.serve.worker import Limits, Worker
    from test_session import new_session

    with contextlib.ExitStack() as stack:
        worker = Worker(new_session(**{"rehearse": 1, **session}), Limits(gather_ms=0, max_tokens=64, prompt_tokens=100))
        stack.callback(worker.close, 10)
        worker.start()
        listening = stack.enter_context(server.bound("127.0.0.1", 0, guarded=False))
        config = uvicorn.Config(create_app(worker, name="tiny"), lifespan="off", ws="none", log_level="warning")
        service = uvicorn.Server(config)
        thread = threading.Thread(target=service.run, args=([listening],))
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, service, "should_exit", True)
        wait_for(lambda: service.started)
        yield server.place(listening)


@pytest.mark.slow
def test_a_preview_marks_the_changed_words_and_shows_probabilities(visit: Callable[..., Any]) -> None:
    with served(World()) as url:
        page = visit(url)
        write(page, prompt=FRANCE, target="Lyon", unrelated=f"{ITALY}=>Rome\nA fragile thing is")
        with page.expect_request("**/v1/preview") as sent:
            preview(page)
        wanted = {"prompt": FRANCE, "target": "Lyon", "rephrasings": [], "chat": False, "scale": 1, "on_base": True}
        unrelated = [{"prompt": ITALY, "answer": "Rome"}, "A fragile thing is"]
        assert sent.value.post_data_json == {**wanted, "unrelated": unrelated}
        own, italy, fragile, guard = page.locator("#preview .asked").all()
        assert own.locator("del").all_inner_texts() == ["Paris", "Seine"]
        assert own.locator("ins").all_inner_texts() == ["Lyon", "Rhône"]
        assert italy.locator("del, ins").count() == 0
        assert "To keep: Rome" in italy.inner_text()
        assert [one.locator(".mark").inner_text() for one in (own, italy, fragile, guard)] == [
            "✓ holds", "✓ holds", "✗ fails", "✓ holds",
        ]  # fmt: skip
        bars = own.locator(".track > span")
        widths = bars.evaluate_all("all => all.map((one) => one.offsetWidth / one.parentElement.offsetWidth)")
        assert widths == pytest.approx([0.0, 0.974], abs=0.02)
        assert [one.get_attribute("aria-label") for one in own.locator(".chance").all()] == [
            "Probability of “Lyon” before: < 0.1 %", "Probability of “Lyon” after: 97 %",
        ]  # fmt: skip
        verdict = page.inner_text(".verdict")
        assert "The gate fails it" in verdict
        assert "3 of 4 hold · 67 % of neighbours and guards kept · made in 38 ms" in verdict
        assert "verdict" in page.evaluate("document.activeElement.className")
        bars = page.locator("#preview .norms rect.bar")
        assert [one.get_attribute("width") for one in bars.all()][:3] == ["20%", "60%", "100%"]

        write(page, target="Nice")  # what was tried is no longer what is written
        page.click("#accept-send", force=True)
        assert page.is_visible("#outdated")
        page.click("#refresh")
        page.wait_for_selector("#refresh:not([aria-busy])")
        page.wait_for_selector("#accept-send:not([aria-busy])")
        assert page.locator(".edit").count() == 0


@pytest.mark.slow
def test_a_refused_edit_says_why_and_leaves_the_journal_alone(visit: Callable[..., Any]) -> None:
    with served(World(refuses=True)) as url:
        page = visit(url, expected=(400, 409))
        write(page, prompt=FRANCE, target="   ")
        preview(page)
        assert "the target is empty" in page.inner_text("#preview .notice.bad")
        write(page, target="Lyon", unrelated="A fragile thing is")
        preview(page)
        page.click("#accept-send")
        page.wait_for_selector("#accepted .notice.bad")
        assert "failed the gate" in page.inner_text("#accepted")
        assert "No edits yet" in page.inner_text("#edits")
        page.select_option("#accept-gate", "report")
        page.click("#accept-send")
        page.wait_for_selector(".edit[data-state=active]")
        assert "though the gate failed it" in page.inner_text("#accepted")


def tab_to(page: Any, selector: str, key: str = "Tab") -> None:
    """Press Tab until an element has the focus, which must be seen."""
    for _ in range(60):
        page.keyboard.press(key)
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
            style = page.evaluate(
                "() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; }"
            )
            assert style[0] != "none"
            assert style[1] != "0px"
            return
    raise AssertionError(f"the keyboard does not reach {selector}")


@pytest.mark.slow
def test_the_keyboard_is_enough(visit: Callable[..., Any]) -> None:
    with served(World()) as url:
        page = visit(url)
        keys = page.keyboard
        tab_to(page, "#ask-prompt")
        keys.type(FRANCE)
        keys.press("Control+Enter")
        page.wait_for_selector("text=Correct this answer")
        tab_to(page, ".answer button")
        keys.press("Enter")
        assert page.evaluate("document.activeElement.id") == "edit-target"
        keys.type("Lyon")
        tab_to(page, "#edit-unrelated")
        keys.type(ITALY)
        tab_to(page, "#edit-preview")
        keys.press("Space")
        page.wait_for_selector(".verdict:focus")
        tab_to(page, "#accept-author")
        keys.type("Ana")
        tab_to(page, "#accept-send")
        keys.press("Enter")
        page.wait_for_selector("#accepted .notice:focus")
        tab_to(page, "#accepted button")
        keys.press("Enter")
        page.wait_for_selector("#ask-send:not([aria-busy])")
        assert answered(page) == "Lyon, a city on the Rhône."
        tab_to(page, ".edit [data-turn=undo]")
        keys.press("Enter")
        page.wait_for_selector(".edit[data-state=undone] [data-turn=redo]:focus")
        tab_to(page, ".edit summary")
        keys.press("Enter")
        page.wait_for_selector(".edit .norms")


@pytest.mark.slow
def test_words_of_others_are_text_and_never_html(visit: Callable[..., Any]) -> None:
    world = World()
    world.add(wish(HOSTILE, HOSTILE, rephrasings=[HOSTILE + "2"], unrelated=[{"prompt": HOSTILE + "3", "answer": HOSTILE}],
                   author=HOSTILE, reason=HOSTILE))  # fmt: skip
    world.records[0]["checks"]["norms"] = {HOSTILE: 1.0}
    with served(world) as url:
        page = visit(url)
        page.click(".edit summary")
        page.wait_for_selector(".edit .norms")
        page.check("#ask-base")
        assert HOSTILE in asked(page, HOSTILE)
        write(page, prompt=HOSTILE, target=HOSTILE, rephrasings=HOSTILE, unrelated=f"{HOSTILE} => {HOSTILE}")
        preview(page)
        page.fill("#accept-author", HOSTILE)
        page.click("#accept-send")
        page.wait_for_selector(".edit >> nth=1")
        assert HOSTILE in page.inner_text(".edit >> nth=1")
        page.click("text=The same as a table")
        assert page.locator("img, body script").count() == 0
        assert page.title() == "mendlm"


def wish(prompt: str, target: str, **more: Any) -> dict[str, Any]:
    """The body of a request for an edit."""
    fields = {"rephrasings": [], "unrelated": [ITALY], "chat": False, "scale": 1.0, "on_fail": "report"}
    return {"prompt": prompt, "target": target, **fields, "author": "Ana", "reason": "", **more}


def lived_in() -> World:
    """A journal with long words, another script, and each of the states."""
    world = World()
    for target in ("Lyon", "Nice"):
        world.add(wish(FRANCE, target, rephrasings=["France's capital is"], reason="A rehearsal"))
    world.add(wish("عاصمة المغرب هي", "الرباط", author="نور", reason="من اليمين إلى اليسار"))
    world.add(wish(LONG, LONG, author=LONG[:200], reason=LONG, unrelated=[LONG, "A fragile thing is"]))
    world.add(wish(ITALY, "Milan"))
    world.turn(world.records[-1]["id"], "undone")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_its_window_and_can_be_read(visit: Callable[..., Any], scheme: str, width: int) -> None:
    with served(lived_in()) as url:
        page = visit(url, width=width, color_scheme=scheme)
        page.check("#ask-base")
        asked(page, LONG)
        write(page, prompt=FRANCE, target=LONG, rephrasings=LONG, unrelated=f"{LONG} => {LONG}\nA fragile thing is")
        preview(page)
        for summary in page.locator("summary").all():
            summary.click()
        page.wait_for_selector(".edit >> nth=4 >> .pairs")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        spilt = "all => all.filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML)"
        assert page.eval_on_selector_all("body *:not(.unseen, .unseen *, .skip)", spilt) == []
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 100
        assert [one for one in contrasts if one[0] < 4.5] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
        right_to_left = page.locator(".edit .what", has_text="المغرب")
        assert right_to_left.evaluate("(one) => getComputedStyle(one).direction") == "rtl"


@pytest.mark.slow
def test_the_journal_is_found_through_and_drawn(visit: Callable[..., Any]) -> None:
    world = lived_in()
    with served(world) as url:
        page = visit(url)
        texts = page.locator(".edit header strong").all_inner_texts
        assert texts() == ["#5", "#4", "#3", "#2", "#1"]
        assert page.inner_text("#active") == "3 active edits"
        page.select_option("#filter-state", "superseded")
        assert texts() == ["#1"]
        assert "by #2" in page.inner_text(".edit")
        page.click(".edit header a")  # to an edit that the filter hides
        page.wait_for_selector(f"#edit-{world.records[1]['id']}:focus")
        page.fill("#filter-text", "نور")
        assert texts() == ["#3"]
        page.fill("#filter-text", "no such thing")
        assert "No edit fits" in page.inner_text("#edits")
        page.fill("#filter-text", "")
        page.click(f"#edit-{world.records[1]['id']} >> text=Undo")  # and what it had superseded is active again
        page.wait_for_selector(f"#edit-{world.records[0]['id']}[data-state=active]")

        page.click("text=The same as a table")
        rows = page.locator("#picture tbody tr").all_inner_texts()
        assert [re.split(r"\s*\t\s*", row) for row in rows] == [
            ["#5", "undone", "97 %", "50 %"],
            ["#4", "active", "97 %", "67 %"],
            ["#3", "active", "97 %", "0 %"],
            ["#2", "undone", "92 %", "0 %"],
            ["#1", "active", "92 %", "0 %"],
        ]
        dots = page.locator("#picture .scatter .dot")
        assert dots.count() == 5
        place = {dot.evaluate("(one) => one.parentElement.textContent"): dot.bounding_box() for dot in dots.all()}
        worst = place["#4: success 97 %, drawdown 67 %"]
        assert worst["x"] > place["#3: success 97 %, drawdown 0 %"]["x"] + 100
        assert place["#1: success 92 %, drawdown 0 %"]["y"] > worst["y"]

        world.records.extend({**world.records[2], "id": f"{n:012x}", "number": n} for n in range(6, 60))
        page.click("#refresh")
        page.wait_for_selector("#more")
        assert len(texts()) == 30
        page.click("#more")
        assert len(texts()) == 59


@pytest.mark.slow
def test_edits_that_were_not_made_from_words_are_listed_too(visit: Callable[..., Any]) -> None:
    world = World()
    world.add(wish(FRANCE, "Lyon"))
    world.records[0] |= {"request": {}, "checks": {}, "editor": {}, "stack": []}
    with served(world) as url:
        page = visit(url)
        assert "Not made from words here" in page.inner_text(".edit")
        page.click(".edit summary")
        page.wait_for_selector(".edit >> text=No gate has asked")
        assert not page.is_visible("#picture")


@pytest.mark.slow
def test_a_token_is_asked_for_and_stays_in_the_tab(visit: Callable[..., Any]) -> None:
    world = World(token="secret")
    world.add(wish(FRANCE, "Lyon"))
    with served(world) as url:
        page = visit(url, expected=(401,), ready="#token-dialog[open]")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#token-wrong:visible")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector(".edit")
        assert page.inner_text("#model") == "tiny"
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href").find("secret") == -1
        assert asked(page, FRANCE) == "Lyon, a city on the Rhône."
        with page.expect_download() as found:
            page.click("#export-all")
        with zipfile.ZipFile(found.value.path()) as archive:
            assert archive.namelist() == ["adapter_config.json"]
        page.reload()
        page.wait_for_selector(".edit")  # without asking again


@pytest.mark.slow
def test_a_stream_can_be_stopped_and_a_server_that_is_gone_is_told(visit: Callable[..., Any]) -> None:
    with served(World(slow=0.3)) as url:
        page = visit(url, expected=("net::ERR_CONNECTION_REFUSED",))
        page.fill("#ask-prompt", FRANCE)
        page.click("#ask-send")
        page.wait_for_selector(".answer >> text=Paris")
        page.click("#ask-stop")
        page.wait_for_selector("text=Stopped.")
        assert "Seine" not in page.inner_text(".answer")
        assert page.evaluate("document.activeElement.id") == "ask-send"
    page.click("#ask-send")
    page.wait_for_selector("#answers .notice.bad")
    assert "The server does not answer" in page.inner_text("#answers")
    page.click("#refresh")
    page.wait_for_selector("#trouble .notice.bad")


@pytest.mark.slow
def test_a_chat_turn_is_asked_and_corrected_as_one(visit: Callable[..., Any]) -> None:
    with served(World()) as url:
        page = visit(url)
        page.check("#ask-chat")
        assert asked(page, FRANCE) == "Paris, a city on the Seine."
        page.click("text=Correct this answer")
        assert page.is_checked("#edit-chat")
        write(page, target="Lyon")
        preview(page)
        page.click("#accept-send")
        page.click("#accepted >> text=Ask again")
        assert answered(page) == "Lyon, a city on the Rhône."
        page.uncheck("#ask-chat")
        assert asked(page, FRANCE) == "Paris, a city on the Seine."  # the raw text is another prompt
