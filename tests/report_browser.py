"""Headless Chromium for the tests of pages, controlled with the standard library only."""

import base64
import fcntl
import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class Page:
    """A page in headless Chromium, controlled over a pipe with the DevTools protocol; records the browser's events."""

    def __init__(self, chromium: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from descriptor 3 and answers on 4. Move ours to high numbers first, to overwrite neither.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (to_browser, from_browser)]
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --remote-debugging-pipe --hide-scrollbars"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}', chromium, *flags.split(),
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for descriptor in (to_browser, from_browser, *high):
            os.close(descriptor)
        self._left, self._count, self._session, self.events = b"", 0, "", []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; events that arrive before it go to `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], 60)
            read = os.read(self._in, 1 << 20) if ready else b""
            assert read, "the browser ended or does not answer"
            self._left += read
        line, self._left = self._left.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path | str, width: int, dark: bool = False, height: int = 900) -> None:
        """Loads a file or an address in a window `width` pixels wide and waits until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a script's expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Waits until a script's expression is true."""
        until(lambda: self.run(script), script, seconds)

    def press(self, key: str, shift: bool = False) -> None:
        """Presses and lets go of a key: Enter, Escape, Tab or Space."""
        code, text = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Space": (32, " ")}[key]
        made = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        made["modifiers"] = 8 if shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **made)
        self.call("Input.dispatchKeyEvent", type="keyUp", **made)

    def type(self, text: str) -> None:
        """Types a text where the focus is."""
        self.call("Input.insertText", text=text)

    def picture(self) -> Image.Image:
        """A picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._out)
        os.close(self._in)


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Waits until the condition is true; how long depends on the machine's load, the result does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not become true: {what}"
        time.sleep(0.02)


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """Chromium with this folder as its profile, until the end of the block. Skips the test where there is none."""
    if not CHROMIUM:
        pytest.skip("no Chromium to look at the page with; `apt-get install chromium` brings one")
    page = Page(CHROMIUM, profile)
    try:
        yield page
    finally:
        page.close()


def luminance(color: str) -> float:
    """Relative luminance of a CSS `rgb(...)` (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
