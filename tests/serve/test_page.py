"""The page in a real browser: Debian's chromium, headless, against the embedded model."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.server import SAMPLES, Running, running

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromium-driver (Debian's packages)"
)
STAR = "A small red star at the top."


class Page:
    """The page as a person sees and uses it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> None:
        self.driver.get(self.url)
        self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, "body[data-ready]"))

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(StaleElementReferenceException):  # redrawn in between
                if found := condition():
                    return found
            time.sleep(0.05)
        raise AssertionError(f"nothing after {seconds} s; the page says {self.text!r}")

    @property
    def text(self) -> str:
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def attach(self, *paths: Path) -> None:
        self.one("#files").send_keys("\n".join(map(str, paths)))

    def ask(self, text: str) -> None:
        self.one("#question").send_keys(text, Keys.ENTER)

    def replies(self) -> list[str]:
        return [node.text for node in self.all(".assistant .body")]

    def idle(self) -> bool:
        return bool(self.one("#send").is_displayed())

    def click(self, text: str) -> None:
        next(b for b in self.all("button") if b.text == text and b.is_displayed()).click()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield found
    found.quit()


@pytest.fixture
def page(driver: Any, server: Running) -> Iterator[Page]:
    found = Page(driver, server.url)
    found.open()
    driver.execute_script("indexedDB.deleteDatabase('qvl'); sessionStorage.clear()")
    driver.get_log("browser")
    driver.get("about:blank")
    found.open()
    yield found
    problems = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems


def test_a_picture_is_asked_about_and_its_box_drawn(page: Page) -> None:
    page.attach(SAMPLES / "one.png")
    cost = page.wait(lambda: [n.text for n in page.all("#attachments .cost") if "tokens" in n.text])
    assert "35 tokens" in cost[0]
    page.ask("Find the red star.")
    page.wait(lambda: page.idle() and page.all(".assistant .actions"))
    (rect,) = page.all("[data-picture='0:0'] rect")
    x, y, width, height = (float(rect.get_attribute(name)) for name in ("x", "y", "width", "height"))
    found = [x, y, x + width, y + height]
    assert max(abs(a - b) for a, b in zip(found, [94, 12, 126, 47], strict=True)) <= 8
    # on the screen it lies where it does in the picture, whatever the picture's size there
    image = page.one("[data-picture='0:0'] img").rect
    natural = page.driver.execute_script(
        "return document.querySelector('[data-picture=\"0:0\"] img').naturalWidth"
    )
    scale = image["width"] / natural
    assert rect.rect["x"] == pytest.approx(image["x"] + x * scale, abs=3)
    assert rect.rect["y"] == pytest.approx(image["y"] + y * scale, abs=3)
    # pointing at the text lights up the box
    mention = page.one(".box-ref")
    webdriver.ActionChains(page.driver).move_to_element(mention).perform()
    page.wait(lambda: "lit" in page.one("g.mark").get_attribute("class"))
    page.one("[data-picture='0:0']").click()
    page.wait(lambda: page.all("#zoom[open] rect"))
    page.one("[data-zoom=close]").click()


def test_a_dropped_picture_is_attached(page: Page) -> None:
    page.driver.execute_script(
        """const data = atob(arguments[0]), bytes = Uint8Array.from(data, (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "one.png", {type: "image/png"}));
        const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
        document.dispatchEvent(new DragEvent("drop", options));""",
        base64.b64encode((SAMPLES / "one.png").read_bytes()).decode(),
    )
    page.wait(lambda: page.all("#attachments img"))
    page.ask("Describe this image.")
    page.wait(lambda: page.idle() and page.replies() == [STAR])


def test_a_reply_streams_and_can_be_stopped(page: Page, server: Running) -> None:
    page.attach(SAMPLES / "one.png")
    page.wait(lambda: page.all("#attachments img"))
    server.pause = 1.0  # a token a second: time to see the reply grow and to stop it, on a busy machine too
    page.ask("Describe this image.")
    page.wait(lambda: any(0 < len(text) < len(STAR) for text in page.replies()))
    page.click("Stop")
    page.wait(lambda: page.idle() and "stopped" in page.text)
    assert 0 < len(page.replies()[0]) < len(STAR)
    server.pause = 0.0
    page.click("Retry")
    page.wait(lambda: page.idle() and page.replies() == [STAR])


def test_the_history_outlives_a_reload(page: Page) -> None:
    page.attach(SAMPLES / "one.png")
    page.wait(lambda: page.all("#attachments img"))
    page.ask("Describe this image.")
    page.wait(lambda: page.idle() and page.replies() == [STAR])
    page.driver.refresh()
    page.wait(lambda: page.replies() == [STAR])
    assert page.all("[data-picture='0:0'] img")
    page.ask("What color is the star?")
    page.wait(lambda: page.idle() and len(page.replies()) == 2 and page.replies()[1])
    page.click("New conversation")
    page.wait(lambda: not page.replies())
    page.one("#menu").click()
    page.wait(lambda: page.all("#history .open"))
    page.all("#history .open")[0].click()
    page.wait(lambda: len(page.replies()) == 2)


def test_a_question_is_edited(page: Page) -> None:
    page.attach(SAMPLES / "number.png")
    page.wait(lambda: page.all("#attachments img"))
    page.ask("Describe this image.")
    page.wait(lambda: page.idle() and page.all(".assistant .actions"))
    page.click("Edit")
    box = page.one("#question")
    assert box.get_attribute("value") == "Describe this image." and page.all("#attachments img")
    box.clear()
    page.ask("Read the text.")
    page.wait(lambda: page.idle() and page.replies() and page.replies()[0].isdigit())
    assert len(page.replies()) == 1


def test_what_a_model_writes_runs_nothing(page: Page) -> None:
    evil = "<img src=x onerror=window.hit=1> <script>window.hit=1</script> [a](javascript:window.hit=1) ![b](http://x/y)"
    page.driver.execute_script(
        """const done = indexedDB.open("qvl", 1);
        return new Promise((resolve) => { done.onsuccess = () => {
          const store = done.result.transaction("conversations", "readwrite").objectStore("conversations");
          store.put({id: "evil", title: "<b>evil</b>", changed: Date.now() + 1e6, turns: [
            {role: "user", text: arguments[0], files: []},
            {role: "assistant", text: arguments[0], boxes: []}]});
          store.transaction.oncomplete = resolve; }; });""",
        evil,
    )
    page.driver.refresh()
    page.wait(page.replies)
    time.sleep(0.3)
    assert page.driver.execute_script("return window.hit") is None
    assert not page.all(".assistant img, .assistant script, #history b")
    assert not [a for a in page.all(".assistant a") if "javascript" in (a.get_attribute("href") or "")]


def test_a_server_that_goes_away_is_said_and_found_again(driver: Any) -> None:
    with running(n_ctx=512, parallel=1) as first:
        page = Page(driver, first.url)
        page.open()
        first.pause = 0.3
        page.ask("Hello")
        page.wait(lambda: page.one("#stop").is_displayed())
        worker = first.state.worker
        assert worker is not None
        first.state.worker = None  # as while a model loads: every request gets 503
        for ticket in list(worker._active):
            ticket.cancel()
        page.wait(lambda: page.idle())
        page.ask("Are you there?")
        page.wait(lambda: "loading" in page.text)
        first.state.worker = worker
        first.pause = 0.0
        page.click("Retry")
        page.wait(lambda: page.idle() and page.replies()[-1])
    driver.get_log("browser")


def test_a_key_is_asked_for(driver: Any) -> None:
    with running(n_ctx=512, parallel=1, api_key="sesame") as found:
        page = Page(driver, found.url)
        driver.get(found.url)
        page.wait(lambda: page.all("#key-dialog[open]"))
        page.one("#key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.one("#model").text == "nano")
    driver.get_log("browser")


def test_the_api_is_described(page: Page) -> None:
    page.driver.get(f"{page.url}/docs")
    page.wait(lambda: "/v1/chat/completions" in page.text and "/v1/responses" in page.text)


def test_it_fits_a_phone(page: Page) -> None:
    page.driver.set_window_size(390, 800)
    try:
        page.attach(SAMPLES / "wide.png")
        page.wait(lambda: page.all("#attachments img"))
        page.ask("Describe this image.")
        page.wait(lambda: page.idle() and page.replies())
        wide = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
    finally:
        page.driver.set_window_size(1100, 900)
