"""The page, in a real headless Chromium, against a stand-in for the endpoint."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.chromium import Tab, browser, chromium, new_tab
from tests.serving.conftest import picture
from tests.serving.stand_in import Refused, StandIn, rollout_at, stand_in

SCORES = {"ape": 0.00001, "ant": 0.02, "bee": 0.9, "cat": 0.0002, "dog": 0.05, "elk": 0.01979, "fox": 0.01}
MANY = {f"{number:04}_" + "class_name_of_forty_characters_abcd"[:35]: 0.001 for number in range(1000)}
NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if chromium() is None:
        pytest.skip("there is no Chromium on this machine: install Debian's package chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def endpoint() -> Iterator[StandIn]:
    with stand_in(SCORES) as running:
        yield running


@pytest.fixture
def tab(address: str, endpoint: StandIn) -> Iterator[Tab]:
    """A tab for the page, which must leave no error on the console and ask no other host."""
    with new_tab(address) as opened:
        yield opened
    assert complaints(opened) == []
    asked = {event["request"]["url"] for name, event in opened.events if name == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith((endpoint.url, "blob:", "data:"))} == set()


def complaints(tab: Tab) -> list[str]:
    """Errors on the console, but for the answers of the API that a test asked for."""
    worst = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    found = [str(event) for name, event in tab.events if name in worst]
    said = [event for name, event in tab.events if name == "Runtime.consoleAPICalled"]
    found += [str(event) for event in said if event["type"] in ("error", "warning", "assert")]
    logged = [event["entry"] for name, event in tab.events if name == "Log.entryAdded"]
    return found + [str(entry) for entry in logged if "/v1/" not in entry.get("url", "")]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A wide image."""
    path = tmp_path / "photo.png"
    path.write_bytes(picture(1, 60, 120))
    return path


def ask(tab: Tab, endpoint: StandIn, *images: Path) -> None:
    """Open the page, choose images, and wait for the answers."""
    tab.go(endpoint.url)
    tab.choose_files("#files", *images)
    tab.wait(f"document.querySelectorAll('.result:not([hidden])').length === {len(images)}")


def text(tab: Tab, selector: str) -> str:
    return str(tab.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))


def test_an_image_gets_bars_in_order_and_the_trail_of_its_answer(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    bars = "Array.from(document.querySelectorAll('{} li'), (bar) => [bar.querySelector('.label').innerText, "
    bars += "bar.querySelector('.percent').innerText, bar.querySelector('.bar span').style.width])"
    assert tab.evaluate(bars.format(".top")) == [
        ["bee", "90.0 %", "90%"],
        ["dog", "5.0 %", "5%"],
        ["ant", "2.0 %", "2%"],
        ["elk", "2.0 %", "1.979%"],
        ["fox", "1.0 %", "1%"],
    ]
    assert text(tab, ".all summary") == "All 7 classes"
    tab.click(".all summary")
    tab.wait("document.querySelectorAll('.rest li').length === 7")
    assert tab.evaluate(bars.format(".rest"))[5:] == [["cat", "< 0.1 %", "0.02%"], ["ape", "< 0.1 %", "0.001%"]]
    assert "pets, version 7, digest 0123456789ab, answered in " in text(tab, ".trail")
    assert text(tab, ".request code") == endpoint.predictions[0]["request_id"]
    assert tab.evaluate("document.querySelector('article img').naturalWidth") == 120
    assert text(tab, "#model") == "pets, version 7: 7 classes"
    assert "centred square of an image, at 160 × 160 pixels" in text(tab, "#give")


def test_the_request_id_can_be_copied(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    tab.click(".copy")
    tab.wait("document.querySelector('.copy').innerText === 'Copied'")
    tab.click(".wrong")
    tab.wait("document.activeElement.className === 'wanted'")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="v", commands=["paste"])
    tab.wait(f"document.querySelector('.wanted').value === '{endpoint.predictions[0]['request_id']}'")


def test_the_heat_map_lies_over_the_centre_square(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    assert tab.evaluate("document.querySelector('canvas').checkVisibility()") is False
    tab.click(".heat-shown")
    tab.wait("document.querySelector('canvas').checkVisibility()")
    boxes = "['img', 'canvas'].map((name) => document.querySelector('article ' + name).getBoundingClientRect())"
    image, canvas = tab.evaluate(boxes + ".map((box) => box.toJSON())")
    assert canvas["height"] == pytest.approx(image["height"]) == pytest.approx(canvas["width"])
    assert canvas["x"] + canvas["width"] / 2 == pytest.approx(image["x"] + image["width"] / 2)
    assert image["width"] == pytest.approx(2 * canvas["width"])

    # The hottest of 7 × 7 cells is that of row 2, column 4: it is bright, the far corner is dark, and on the border
    # of two cells the colour is neither the one's nor the other's.
    pixels = tab.evaluate(
        "Array.from(document.querySelector('canvas').getContext('2d').getImageData(0, 0, 384, 384).data)"
    )
    red, row = np.array(pixels).reshape(384, 384, 4)[:, :, 0], int(2.5 / 7 * 384)
    hottest, next_but_one, between, last = (red[row, int(column / 7 * 384)] for column in (4.5, 5.5, 6, 6.5))
    assert hottest > 245 > next_but_one - 10 > between > last + 10 and red[380, 4] < 10

    tab.evaluate("document.querySelector('.heat-strength').focus()")
    tab.press("ArrowDown")
    tab.wait("document.querySelector('canvas').style.opacity === '0.64'")
    tab.click(".heat-shown")
    tab.wait("!document.querySelector('canvas').checkVisibility()")


@pytest.mark.parametrize("way", ["field missing", "refused"])
def test_a_model_without_heat_map_answers_all_the_same(tab: Tab, endpoint: StandIn, photo: Path, way: str) -> None:
    endpoint.heat_map = None
    if way == "refused":
        endpoint.refusals["/v1/predict"] = [Refused(400, "no_heat_map", "the model's bundle has no heat map")]
    ask(tab, endpoint, photo)
    assert text(tab, ".top .label") == "bee"
    assert tab.evaluate("document.querySelector('.heat').checkVisibility()") is False
    asked = [request.url.query for request in endpoint.requests_of("/v1/predict")]
    tries = ["probabilities=true&heat_map=true", "probabilities=true"]
    assert asked == (tries if way == "refused" else tries[:1])


def test_a_correction_reaches_the_endpoint_and_can_be_corrected(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    request_id = endpoint.predictions[0]["request_id"]
    tab.click(".wrong")
    tab.wait("document.querySelectorAll('.choices input').length === 7")
    tab.call("Input.insertText", text="O")  # the search has the focus
    tab.wait("document.querySelector('.choices').innerText.split(/\\s+/).join() === 'dog,fox'")
    tab.click(".choices label:nth-child(2) input")
    tab.click(".correction .row button")
    tab.wait("document.querySelector('.stored').innerText === 'Stored: it is fox.'")
    assert endpoint.feedback == [{"request_id": request_id, "label": "fox", "image": 0}]

    # Again, by the keyboard alone: the focus is where it was left, and a name typed in full is chosen.
    assert tab.evaluate("document.activeElement.innerText") == "Correct it again"
    tab.press("Enter")
    tab.wait("document.querySelectorAll('.choices input').length === 7")
    tab.call("Input.insertText", text="cat")
    tab.press("Enter")
    tab.wait("document.querySelector('.stored').innerText === 'Stored: it is cat.'")
    assert [correction["label"] for correction in endpoint.feedback] == ["fox", "cat"]


def test_a_correction_that_is_not_stored_says_why(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    endpoint.refusals["/v1/feedback"] = [
        Refused(429, "too_many", "the key's quota is used up: ask again later", retry_after="1"),
        Refused(404, "unknown_request", "no answer with this request id is kept: predict again"),
    ]
    tab.click(".wrong")
    tab.wait("document.querySelectorAll('.choices input').length === 7")
    tab.call("Input.insertText", text="dog")
    tab.press("Enter")
    said = "document.querySelector('.correction .trouble').innerText"
    tab.wait(f"{said}.includes('quota is used up: ask again later')")
    assert text(tab, ".correction .row button") == "Sent again in 1 s"
    tab.wait(f"{said}.startsWith('Not stored: no answer with this request id is kept: predict again')")
    assert endpoint.feedback == []
    tab.click(".correction .row button")
    tab.wait("document.querySelector('.stored').innerText === 'Stored: it is dog.'")


def test_many_images_get_a_card_each(tab: Tab, endpoint: StandIn, tmp_path: Path) -> None:
    images = [tmp_path / f"{number}.png" for number in range(7)]
    for number, image in enumerate(images):
        image.write_bytes(picture(number))
    ask(tab, endpoint, *images)
    names = "Array.from(document.querySelectorAll('article .name'), (name) => name.innerText)"
    assert tab.evaluate(names) == [image.name for image in images]
    ids = tab.evaluate("Array.from(document.querySelectorAll('.request code'), (id) => id.innerText)")
    assert sorted(ids) == sorted(answer["request_id"] for answer in endpoint.predictions)
    tab.click("article:nth-child(2) .remove")
    assert tab.evaluate(names) == ["0.png", *(image.name for image in images[2:])]


def test_images_can_be_dropped_and_pasted(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    tab.go(endpoint.url)
    tab.wait("document.querySelector('#facts').innerText")  # nothing moves any more under what is dragged
    data = {"items": [], "files": [str(photo)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        tab.call("Input.dispatchDragEvent", type=kind, x=200, y=300, data=data)
        if kind == "dragOver":
            tab.wait("document.body.classList.contains('dragging')")
    tab.wait("document.querySelectorAll('.result:not([hidden])').length === 1")
    tab.evaluate(
        f"""(() => {{
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from({list(picture(2))})], "pasted.png", {{ type: "image/png" }}));
            document.body.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: data, bubbles: true }}));
        }})()"""
    )
    tab.wait("document.querySelectorAll('.result:not([hidden])').length === 2")
    assert text(tab, "article .name") == "pasted.png"


def test_an_error_is_told_in_words(tab: Tab, endpoint: StandIn, tmp_path: Path) -> None:
    large, broken = tmp_path / "large.bin", tmp_path / "broken.png"
    large.write_bytes(os.urandom(300_000))
    broken.write_bytes(picture(1)[:50])
    tab.go(endpoint.url)
    tab.choose_files("#files", large, broken)
    tab.wait("document.querySelectorAll('article > .trouble:not([hidden])').length === 2")
    told = text(tab, "article:first-child > .trouble")
    assert "The request is larger than the 200,000 bytes that are read: send a smaller image (request " in told
    assert "The image cannot be decoded: send a whole one" in text(tab, "article:last-child > .trouble")
    tab.wait("document.querySelector('article:first-child').innerText.includes('This browser cannot show the image.')")


def test_an_overloaded_endpoint_is_asked_again(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    busy = "the endpoint has as many requests as it takes: try again after a moment"
    endpoint.refusals["/v1/predict"] = [
        Refused(503, "overloaded", busy, retry_after="1"),
        Refused(429, "too_many", "too many requests", retry_after="1"),
    ]
    tab.go(endpoint.url)
    tab.choose_files("#files", photo)
    tab.wait(f"document.querySelector('.state').innerText.includes('{busy.capitalize()} (asking again in 1 s)')")
    tab.wait("document.querySelector('.state').innerText.includes('Too many requests (asking again in 1 s)')")
    tab.wait("document.querySelector('.result:not([hidden])')")
    assert text(tab, ".top .label") == "bee" and text(tab, ".state") == ""


def test_a_key_is_asked_for_and_sent(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    endpoint.key = "helio_right"
    tab.go(endpoint.url)
    tab.wait("document.querySelector('#key').checkVisibility()")
    assert "This endpoint wants an API key" in text(tab, "#key-why")
    tab.choose_files("#files", photo)
    tab.wait("document.querySelector('.state').innerText.includes('This endpoint wants an API key')")
    for key in ("helio_wrong", "helio_right"):
        tab.click("#key-field")
        tab.call("Input.insertText", text=f" {key} ")
        tab.press("Enter")
        shown = str(key == "helio_wrong").lower()
        kept = f"sessionStorage.getItem('helio-api-key') === '{key}'"
        tab.wait(f"{kept} && document.querySelector('#key').checkVisibility() === {shown}")
    tab.wait("document.querySelector('.result:not([hidden])')")
    tab.wait("document.querySelector('#facts').innerText.includes('2 running')")
    sent = [request.headers.get("authorization") for request in endpoint.requests_of("/v1/predict")]
    assert sent[0] is None and sent[-1] == "Bearer helio_right"
    assert tab.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]


def test_a_roll_out_is_watched(tab: Tab, endpoint: StandIn) -> None:
    endpoint.rollout = rollout_at(0.25)
    tab.go(endpoint.url)
    tab.wait("document.querySelector('#rollout').checkVisibility()")
    assert "2 running, 1 starting" in text(tab, "#facts")
    assert text(tab, "#rollout-state") == "Running, stage ramp: version 8 answers 25 % of users."
    reached = "Array.from(document.querySelectorAll('#stages .reached'), (step) => step.innerText)"
    assert tab.evaluate(reached) == ["1 %", "5 %", "25 %"]
    assert text(tab, "#stages [aria-current=step]") == "25 %"
    rows = "Array.from(document.querySelectorAll('#arms tr'), (row) => Array.from(row.cells, (cell) => cell.innerText))"
    assert tab.evaluate(rows) == [
        ["", "champion version 7", "candidate version 8"],
        ["requests", "7,512", "2,488"],
        ["errors", "3 (< 0.1 %)", "25 (1.0 %)"],
        ["p50", "8.3 ms", "9.0 ms"],
        ["p99", "41 ms", "45 ms"],
    ]
    assert text(tab, "#summary") == "2 replicas · roll-out 25 %"

    endpoint.rollout = {**rollout_at(0), "state": "rolled_back", "reason": "error rate 1.0 % against 0.04 %"}
    tab.wait("document.querySelector('#rollout-state').innerText.startsWith('Rolled back')")
    assert "error rate 1.0 % against 0.04 %" in text(tab, "#rollout-state")
    assert tab.evaluate(reached) == []


def test_the_status_says_when_it_is_old_and_rests_while_nobody_looks(tab: Tab, endpoint: StandIn) -> None:
    hurry = "const timer = setTimeout; window.setTimeout = (then, milliseconds) => timer(then, milliseconds / 50)"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=hurry)
    look = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); "
    look += "document.dispatchEvent(new Event('visibilitychange'))"

    def polls_in(seconds: float) -> int:
        """How often the status is asked in so many seconds of the hurried page."""
        before = len(endpoint.requests_of("/v1/status"))
        tab.evaluate(f"new Promise((resolve) => setTimeout(resolve, {1000 * seconds}))")
        return len(endpoint.requests_of("/v1/status")) - before

    tab.go(endpoint.url)
    tab.wait("document.querySelector('#facts').innerText.includes('2 running')")
    quiet_polls = polls_in(30)
    endpoint.refusals["/v1/status"] = [Refused(504, "timeout", "the control did not answer in time: try again")] * 99
    tab.wait("document.querySelector('#status-trouble').innerText.includes('the control did not answer in time')")
    assert "No news since " in text(tab, "#status-trouble") and "2 running" in text(tab, "#facts")
    assert polls_in(30) <= 4 < quiet_polls

    endpoint.refusals.clear()
    tab.evaluate(look.format("true"))
    assert polls_in(60) <= 1  # one may have been on its way
    tab.evaluate(look.format("false"))
    tab.wait("!document.querySelector('#status-trouble').checkVisibility()")


def test_a_class_name_is_text_whatever_it_holds(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    endpoint.scores = {NASTY: 0.7, "</li><script>alert(1)</script>": 0.3}
    ask(tab, endpoint, photo)
    assert text(tab, ".top .label") == NASTY
    tab.click(".wrong")
    tab.wait("document.querySelectorAll('.choices input').length === 2")
    tab.click(".choices label:first-child input")
    tab.click(".correction .row button")
    tab.wait("document.querySelector('.stored').checkVisibility()")
    assert NASTY in text(tab, ".stored") and endpoint.feedback[0]["label"] == NASTY
    assert tab.evaluate("document.querySelectorAll('img[src=x], article script').length") == 0
    assert endpoint.requests_of("/x") == []


# Elements that reach over the window or show only a part of their text, and texts whose contrast is below WCAG's 4.5.
FLAWS = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const light = (colour, ground) => {
        canvas.fillStyle = ground; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = Array.from(canvas.getImageData(0, 0, 1, 1).data, (v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        const own = getComputedStyle(e).backgroundColor;
        return own !== "rgba(0, 0, 0, 0)" || !e.parentElement ? own : ground(e.parentElement);
    };
    const flaws = [];
    for (const e of document.body.querySelectorAll("*")) {
        if (!e.checkVisibility() || e.closest(".unseen")) continue;
        const box = e.getBoundingClientRect();
        const name = `${e.tagName}.${e.className} ${e.textContent.slice(0, 50)}`;
        if (box.right > innerWidth + 0.5 || box.left < -0.5) flaws.push("over the window: " + name);
        if (e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1) flaws.push("cut off: " + name);
        if (![...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
        const [a, b] = [light(getComputedStyle(e).color, ground(e)), light(ground(e), ground(e))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) flaws.push(`contrast ${(a + 0.05) / (b + 0.05)}: ${name}`);
    }
    return flaws;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_everything_can_be_read(
    tab: Tab, endpoint: StandIn, photo: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    endpoint.scores = MANY
    endpoint.rollout = rollout_at(0.25)
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ask(tab, endpoint, photo)
    endpoint.refusals["/v1/predict"] = [Refused(403, "forbidden", "the key may not predict: ask for one that may")]
    tab.choose_files("#files", photo)
    tab.wait("document.querySelector('article > .trouble').checkVisibility()")
    for selector in (".heat-shown", ".all summary", ".wrong"):
        tab.click(f"article:last-child {selector}")
    tab.wait("document.querySelectorAll('.choices input').length === 100")
    tab.wait("document.querySelectorAll('.rest li').length === 1000")
    tab.wait("document.querySelector('#rollout').checkVisibility()")
    assert text(tab, "article:last-child .more") == "900 more: search to see them."
    tab.screenshot(tmp_path / "page.png")  # for whoever wants to look
    assert tab.evaluate(FLAWS) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    for selector in (".heat-shown", ".wrong"):
        tab.click(selector)
    tab.wait("document.querySelectorAll('.choices input').length === 7")
    controls = {"button", "checkbox", "radio", "searchbox", "slider", "link", "textbox", "canvas", "image"}
    nodes = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in controls]
    assert [role for role, name in named if not name] == []
    assert {("slider", "Strength"), ("button", "Remove photo.png"), ("image", "photo.png")} <= set(named)


def test_the_files_are_held_by_the_browser_and_checked_each_time(endpoint: StandIn) -> None:
    for path in ("/", "/page/page.css", "/page/page.js"):
        first = requests.get(endpoint.url + path, timeout=5)
        assert first.status_code == 200 and first.headers["cache-control"] == "no-cache"
        assert first.headers["x-content-type-options"] == "nosniff"
        assert first.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:")
        held = requests.get(endpoint.url + path, timeout=5, headers={"if-none-match": first.headers["etag"]})
        assert (held.status_code, held.content) == (304, b"")
        assert requests.head(endpoint.url + path, timeout=5).headers["content-length"] == str(len(first.content))
    assert requests.get(endpoint.url + "/page/__init__.py", timeout=5).status_code == 404
