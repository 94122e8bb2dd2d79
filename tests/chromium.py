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
from websockets.sync.client import connect

KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "ArrowDown": (40, "")}
"""The keys that can be pressed: their Windows code, and the text that they make."""


def chromium() -> str | None:
    """Where the browser of this machine is, if it has one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A tab of the browser. `events` holds what it has told of itself, oldest first: (method, parameters)."""

    def __init__(self, address: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        # A page is megabytes as a screenshot, and a proxy that the environment names cannot reach loopback.
        self._socket = connect(address, max_size=None, compression=None, proxy=None)
        self._calls = 0
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
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
                throw new Error("never true; the page says: " + document.body.innerText);
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
        """Click in the middle of an element with the mouse: what hides or covers it gets the click."""
        x, y = self.evaluate(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{ block: "center", behavior: "instant" }});
                const box = element.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key of KEYS."""
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            shown = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **shown)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG, also what lies below the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.call("Page.close")
        self._socket.close()


@contextmanager
def browser(directory: Path) -> Iterator[str]:
    """A browser whose profile is `directory`, new and empty; yields where `new_tab` finds it."""
    binary = chromium()
    assert binary is not None
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync remote-debugging-port=0"
    arguments = [binary, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={directory}", "about:blank"]
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


def new_tab(address: str) -> Tab:
    """A new tab of the browser at `address`."""
    with requests.Session() as session:
        session.trust_env = False
        return Tab(session.put(f"{address}/json/new?about:blank", timeout=30).json()["webSocketDebuggerUrl"])
