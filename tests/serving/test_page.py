"""The page, in a real headless Chromium: once with the endpoint, else with a stand-in that can be told to fail."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from starlette.testclient import TestClient

from serving.api import Api
from serving.config import ServeConfig
from serving.metrics.replica import Metrics
from tests.chromium import Tab, browser, chromium, new_tab
from tests.serving.conftest import CLASSES, picture
from tests.serving.stand_in import Refused, StandIn, rollout_at, stand_in

SCORES = {"ape": 0.00001, "ant": 0.02, "bee": 0.92, "cat": 0.0002, "dog": 0.05, "elk": 0.00979}
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


def hurry(tab: Tab) -> None:
    """The next page's timers are fifty times as fast."""
    source = "const timer = setTimeout; window.setTimeout = (then, milliseconds) => timer(then, milliseconds / 50)"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)


def text(tab: Tab, selector: str) -> str:
    return str(tab.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))


BARS = """Array.from(document.querySelectorAll('.bars li'), (bar) => [bar.querySelector('.label').innerText,
    bar.querySelector('.percent').innerText, bar.querySelector('.bar span').style.width])"""


def test_an_image_gets_bars_in_order_and_the_trail_of_its_answer(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    assert tab.evaluate(BARS) == [
        ["bee", "92.0 %", "92%"],
        ["dog", "5.0 %", "5%"],
        ["ant", "2.0 %", "2%"],
        ["elk", "1.0 %", "0.979%"],
        ["cat", "< 0.1 %", "0.02%"],
    ]
    assert "pets, version 7, digest 0123456789ab, " in text(tab, ".trail")
    assert text(tab, ".trail code") == endpoint.predictions[0]["request_id"]
    assert tab.evaluate("document.querySelector('article img').naturalWidth") == 120
    assert text(tab, "#model") == "pets, version 7: 6 classes"
    assert "centred square of an image, at 160 × 160 pixels" in text(tab, "#give")


def test_the_heat_map_lies_over_the_centre_square(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    tab.wait("document.querySelector('canvas').checkVisibility()")
    boxes = "['img', 'canvas'].map((name) => document.querySelector('article ' + name).getBoundingClientRect())"
    image, canvas = tab.evaluate(boxes + ".map((box) => box.toJSON())")
    assert canvas["height"] == pytest.approx(image["height"]) == pytest.approx(canvas["width"])
    assert canvas["x"] + canvas["width"] / 2 == pytest.approx(image["x"] + image["width"] / 2)
    assert image["width"] == pytest.approx(2 * canvas["width"])

    # Of 7 × 7 cells that of row 2, column 4 is the hottest: bright there, and less and less of the image is covered
    # on the way to the corner, where nothing is.
    data = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 7, 7).data"
    pixels = np.array(tab.evaluate(f"Array.from({data})")).reshape(7, 7, 4)
    covered = pixels[:, :, 3]
    assert pixels[2, 4, 0] > 240 and covered[2, 4] == covered.max() == round(0.75 * 255)
    assert covered[2, 4] > covered[2, 5] > covered[2, 6] > covered[6, 0] == 0

    tab.click(".heat-shown")
    tab.wait("!document.querySelector('canvas').checkVisibility()")


@pytest.mark.parametrize("way", ["field missing", "refused"])
def test_a_model_without_heat_map_answers_all_the_same(tab: Tab, endpoint: StandIn, photo: Path, way: str) -> None:
    endpoint.heat_map = None
    if way == "refused":
        endpoint.refusals["/v1/predict"] = [Refused(400, "no_heat_map", "the model's bundle has no heat map")]
    ask(tab, endpoint, photo)
    assert text(tab, ".bars .label") == "bee"
    assert tab.evaluate("document.querySelector('.heat').checkVisibility()") is False
    asked = [request.url.query for request in endpoint.requests_of("/v1/predict")]
    tries = ["heat_map=true", ""]
    assert asked == (tries if way == "refused" else tries[:1])


def test_a_correction_is_made_with_the_mouse_and_again_with_the_keyboard(
    tab: Tab, endpoint: StandIn, photo: Path
) -> None:
    ask(tab, endpoint, photo)
    request_id = endpoint.predictions[0]["request_id"]
    tab.click(".wrong")
    tab.wait("document.activeElement.value === 'ape'")  # few classes need no search
    assert tab.evaluate("document.querySelector('.wanted').checkVisibility()") is False
    tab.click(".choices label:nth-child(5)")
    tab.click(".correction .row button")
    tab.wait("document.querySelector('.stored').innerText === 'Stored: it is dog.'")
    assert endpoint.feedback == [{"request_id": request_id, "label": "dog"}]

    # The focus is where it was left.
    assert tab.evaluate("document.activeElement.innerText") == "Correct it again"
    tab.press("Enter")
    tab.wait("document.activeElement.value === 'ape'")
    tab.press("ArrowDown")
    tab.press("Enter")
    tab.wait("document.querySelector('.stored').innerText === 'Stored: it is ant.'")
    assert [correction["label"] for correction in endpoint.feedback] == ["dog", "ant"]

    tab.press("Enter")
    tab.wait("document.activeElement.value === 'ape'")
    tab.press("Escape")
    tab.wait("!document.querySelector('.correction').checkVisibility()")
    assert tab.evaluate("document.activeElement.className") == "wrong"


def test_the_right_one_of_many_classes_is_searched(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    endpoint.scores = MANY
    ask(tab, endpoint, photo)
    tab.click(".wrong")
    tab.wait("document.activeElement.className === 'wanted'")
    assert tab.evaluate("document.querySelectorAll('.choices input').length") == 100
    assert text(tab, ".more") == "900 more: search to see them."
    tab.call("Input.insertText", text="99_")
    tab.wait("document.querySelectorAll('.choices input').length === 10")
    tab.call("Input.insertText", text="no such class")
    tab.wait("document.querySelector('.more').innerText === 'No class has this in its name.'")
    tab.evaluate("document.querySelector('.wanted').select()")
    tab.call("Input.insertText", text="0999")
    tab.wait("document.querySelectorAll('.choices input').length === 1")
    tab.press("Enter")  # what alone is left is chosen
    tab.wait("document.querySelector('.stored').checkVisibility()")
    assert [correction["label"] for correction in endpoint.feedback] == [list(MANY)[999]]


def test_a_correction_that_is_not_stored_says_why(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    endpoint.refusals["/v1/feedback"] = [
        Refused(429, "too_many", "the key's quota is used up: ask again later", retry_after="1"),
        Refused(404, "unknown_request", "no answer with this request id is kept: predict again"),
    ]
    tab.click(".wrong")
    tab.click(".choices label:nth-child(5)")
    tab.click(".correction .row button")
    said = "document.querySelector('.correction .trouble').innerText"
    waits = "document.querySelector('.correction .row button').innerText === 'Sent again in 1 s'"
    tab.wait(f"{said}.includes('quota is used up: ask again later') && {waits}")
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
    ids = tab.evaluate("Array.from(document.querySelectorAll('.trail code'), (id) => id.innerText)")
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
    tab.wait("document.querySelectorAll('.answer > .trouble:not([hidden])').length === 2")
    told = text(tab, "article:first-child .answer > .trouble")
    assert "The request is larger than the 200,000 bytes that are read: send a smaller image (request " in told
    assert "The image cannot be decoded: send a whole one" in text(tab, "article:last-child .answer > .trouble")
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
    assert text(tab, ".bars .label") == "bee" and text(tab, ".state") == ""


def test_a_key_is_asked_for_and_sent(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    endpoint.key = "helio_right"
    tab.go(endpoint.url)
    tab.wait("document.querySelector('#key').checkVisibility()")
    assert text(tab, "#key-why") == "This endpoint wants an API key. Whoever runs it can make one."
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


def test_a_key_that_shows_no_status_names_the_model_all_the_same(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    missing = Refused(403, "missing_scope", "key 3f (a visitor) is good for predict, and this request needs status")
    endpoint.refusals["/v1/status"] = [missing] * 9
    ask(tab, endpoint, photo)
    tab.wait("document.querySelector('#model').innerText.includes('version')")
    assert text(tab, "#status-trouble") == "This key does not show how the endpoint is."


def test_a_roll_out_is_watched(tab: Tab, endpoint: StandIn) -> None:
    hurry(tab)
    endpoint.rollout = rollout_at("sharing", 0.25)
    tab.go(endpoint.url)
    tab.wait("document.querySelector('#rollout').checkVisibility()")
    assert "2 running, 1 starting" in text(tab, "#facts")
    assert "31,207, 4 failed" in text(tab, "#facts") and "median 8.3\xa0ms, p99 41\xa0ms" in text(tab, "#facts")
    assert text(tab, "#rollout-state") == "sharing"
    assert text(tab, "#rollout-says") == "Version 8 answers 25 % of users, version 7 the others."
    assert tab.evaluate("document.querySelector('#split span').style.width") == "25%"
    rows = (
        "Array.from(document.querySelectorAll('#tests tr'), (row) => Array.from(row.cells, (cell) => cell.innerText))"
    )
    assert tab.evaluate(rows) == [
        ["", "version 7", "version 8", "evidence"],
        ["requests", "7,512", "2,488", ""],
        ["failed", "3 (< 0.1 %)", "25 (1.0 %)", "62 %"],
        ["slow", "88 (1.2 %)", "31 (1.3 %)", "100 %"],
        ["disagree", "–", "40 (7.8 %)", ""],
        ["wrong", "–", "–", ""],
    ]
    assert "A step takes 100 requests of version 8" in text(tab, "#next-step")
    tab.evaluate("document.querySelector('#summary').style.display = 'inline'")  # which narrow windows show
    assert text(tab, "#summary") == "2 replicas · roll-out 25%"

    for state, share, reason, words in (
        ("loading", 0.0, None, "Version 8 is being loaded beside version 7."),
        ("shadow", 0.0, None, "Version 8 gets copies of what version 7 answers."),
        ("paused", 0.05, None, "Version 8 answers 5 % of users, version 7 the others."),
        ("sharing", 1.0, None, "Version 8 answers 100 % of users."),
        ("rolled_back", 0.0, "its requests fail", "Version 7 answers all users. Why: its requests fail."),
        ("promoted", 1.0, "every step was earned", "Version 8 answers all users. Why: every step was earned."),
    ):
        endpoint.rollout = rollout_at(state, share, reason=reason)
        tab.wait(f"document.querySelector('#rollout-state').innerText === '{state.replace('_', ' ')}'")
        assert text(tab, "#rollout-says") == words
        shown = tab.evaluate("document.querySelector('#tests').checkVisibility()")
        assert shown is (state in ("shadow", "paused", "sharing"))
    endpoint.rollout = None
    tab.wait("!document.querySelector('#rollout').checkVisibility()")


def test_the_status_says_when_it_is_old_and_rests_while_nobody_looks(tab: Tab, endpoint: StandIn) -> None:
    hurry(tab)
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
    assert text(tab, ".bars .label") == NASTY
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


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_everything_can_be_read(
    tab: Tab, endpoint: StandIn, photo: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    endpoint.scores = MANY
    endpoint.rollout = rollout_at("sharing", 0.25)
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ask(tab, endpoint, photo)
    endpoint.refusals["/v1/predict"] = [Refused(403, "forbidden", "the key may not predict: ask for one that may")]
    tab.choose_files("#files", photo)
    tab.wait("document.querySelector('.answer > .trouble').checkVisibility()")
    tab.click("article:last-child .wrong")
    tab.wait("document.querySelectorAll('.choices input').length === 100")
    tab.wait("document.querySelector('#rollout').checkVisibility()")
    tab.screenshot(tmp_path / "page.png")  # for whoever wants to look
    assert tab.evaluate(FLAWS) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(tab: Tab, endpoint: StandIn, photo: Path) -> None:
    ask(tab, endpoint, photo)
    tab.click(".wrong")
    tab.wait("document.querySelectorAll('.choices input').length === 6")
    controls = {"button", "checkbox", "radio", "searchbox", "link", "textbox", "canvas", "image"}
    nodes = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in controls]
    assert [role for role, name in named if not name] == []
    assert {("button", "Remove photo.png"), ("image", "photo.png"), ("radio", "dog")} <= set(named)


def test_the_endpoints_own_answers_are_shown(address: str, url: str, photo: Path) -> None:
    with new_tab(address) as tab, requests.Session() as session:
        tab.go(url)
        tab.wait("document.querySelector('#facts').innerText.includes('running')")
        tab.wait(f"document.querySelector('#model').innerText === 'tiny, version 7: {len(CLASSES)} classes'")
        tab.choose_files("#files", photo)
        tab.wait("document.querySelector('.result').checkVisibility()")
        files = {"file": photo.read_bytes()}
        direct = session.post(f"{url}/v1/predict", files=files, timeout=30).json()["predictions"]
        assert [label for label, *_ in tab.evaluate(BARS)] == [found["label"] for found in direct]
        heat = "heat_map" in session.post(f"{url}/v1/predict?heat_map=true", files=files, timeout=30).json()
        tab.wait(f"document.querySelector('.heat').checkVisibility() === {str(heat).lower()}")
        tab.click(".wrong")
        tab.wait(f"document.querySelectorAll('.choices input').length === {len(CLASSES)}")
        tab.click(".choices label:last-child")
        tab.click(".correction .row button")
        tab.wait(f"document.querySelector('.stored').innerText === 'Stored: it is {CLASSES[-1]}.'")
        assert complaints(tab) == []


def test_the_files_want_no_key_are_bound_by_a_policy_and_checked_each_time() -> None:
    desk: Any = SimpleNamespace(metrics=Metrics("a", "pets"), log=None, find=None, keys=True)
    client = TestClient(Api(SimpleNamespace(), ServeConfig(), desk))  # type: ignore[arg-type]
    loaded = re.findall('(?:href|src)="(page/[^"]+)"', client.get("/").text)
    assert len(loaded) == 2
    for path in ("/", *(f"/{name}" for name in loaded)):
        first = client.get(path)
        assert first.status_code == 200 and first.headers["cache-control"] == "no-cache"
        assert first.headers["x-content-type-options"] == "nosniff"
        assert first.headers["referrer-policy"] == "no-referrer"
        policy = first.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in str(policy)
        held = client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (held.status_code, held.content) == (304, b"")
    for path in ("/page/__init__.py", "/page/index.html", "/page/../api.py", "/page/"):
        assert client.get(path).status_code == 404
