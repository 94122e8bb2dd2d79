"""A real headless Chromium, driven by the Chrome DevTools Protocol: as little of it as the tests of a page need."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from websockets.sync.client import ClientConnection, connect

SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0"
)

KEYS = {"Enter": 13, "Escape": 27, "ArrowDown": 40}
"""The keys that can be pressed, with their Windows codes."""


def chromium() -> str | None:
    """Where the browser of this machine is, if it has one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A tab of the browser. `events` holds what it has told of itself, oldest first: (method, parameters)."""

    def __init__(self, socket: ClientConnection) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._socket = socket
        self._calls = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv(timeout=30))).get("id") != self._calls:
            self.events.append((message["method"], message["params"]))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return dict(message["result"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{answer['exceptionDetails']['exception'].get('description')} in {expression}")
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 15.0) -> Any:
        """Wait until a JavaScript expression is true; returns its value."""
        return self.evaluate(
            f"""(async () => {{
                for (const end = Date.now() + {1000 * seconds}; Date.now() < end;) {{
                    const value = (() => {{ try {{ return {expression}; }} catch {{ return false; }} }})();
                    if (value) return value;
                    await new Promise((resolve) => setTimeout(resolve, 20));
                }}
                throw new Error("never true; the page says: " + document.body.innerText.slice(0, 2000));
            }})()"""
        )

    def go(self, url: str) -> None:
        """Open a page and wait until it has loaded."""
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Choose files in an <input type=file>."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], objectId=found["result"]["objectId"])

    def click(self, selector: str) -> None:
        """Click in the middle of an element, once it rests, with the mouse: what covers it gets the click."""
        x, y = self.evaluate(
            f"""(async () => {{
                const element = document.querySelector({json.dumps(selector)});
                for (let before; ; await new Promise((then) => requestAnimationFrame(() => setTimeout(then)))) {{
                    element.scrollIntoView({{ block: "center", behavior: "instant" }});
                    const {{ x, y, width, height }} = element.getBoundingClientRect();
                    if (before === `${{x}} ${{y}}`) return [x + width / 2, y + height / 2];
                    before = `${{x}} ${{y}}`;
                }}
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key of KEYS."""
        facts = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG, also what lies below the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def browser(directory: Path) -> Iterator[str]:
    """A browser whose profile is `directory`, new and empty; yields where `new_tab` finds it."""
    binary = chromium()
    assert binary is not None
    arguments = [binary, *SWITCHES.split(), f"--user-data-dir={directory}", "about:blank"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = directory / "DevToolsActivePort", time.monotonic() + 30
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port_file.read_text().split()[0]}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def new_tab(address: str) -> Iterator[Tab]:
    """A new tab of the browser at `address`, closed in the end."""
    with requests.Session() as session:
        # A proxy that the environment names cannot reach loopback.
        session.trust_env = False
        found = session.put(f"{address}/json/new?about:blank", timeout=30).json()["webSocketDebuggerUrl"]
    # A screenshot is megabytes.
    with connect(found, max_size=None, compression=None, proxy=None) as socket:
        tab = Tab(socket)
        yield tab
        tab.call("Page.close")
