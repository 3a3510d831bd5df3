"""A headless Chromium, driven by the DevTools protocol over a pipe: no driver, no package.

The commands are those of https://chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of the browser, ``CHROMIUM`` of the environment first, or None."""
    names = (os.environ.get("CHROMIUM"), *NAMES)
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page, in a new profile. Use it in a ``with`` statement.

    Args:
        path: the browser.
        size: width and height of the page in pixels.
        flags: further flags of the command line.

    Attributes:
        requests: every URL that the page has requested, in order, also those that failed.
        problems: errors and exceptions that the page has logged.
    """

    def __init__(self, path: str, size: tuple[int, int] = (1000, 900), flags: tuple = ()) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._read, browser_writes = os.pipe()
        browser_reads, self._write = os.pipe()
        command = [
            path, *FLAGS, *flags, f"--user-data-dir={self._profile.name}",
            f"--window-size={size[0]},{size[1]}", "about:blank",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
        shell = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(browser_reads, browser_writes),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(browser_reads)
        os.close(browser_writes)
        self._buffer, self._number, self._session = b"", 0, None

    def __enter__(self) -> Self:
        try:
            targets = self.send("Target.getTargets")["targetInfos"]
            page = next(target for target in targets if target["type"] == "page")
            attached = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def send(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result.

        Raises:
            RuntimeError: if the browser reports an error or has ended.
            TimeoutError: if the answer takes more than ``timeout`` seconds.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while (answer := self._receive(end, method)).get("id") != self._number:
            self._keep(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        """Load a page; scripts may still run when this returns."""
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str, timeout: float = 60) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited.

        Raises:
            RuntimeError: if it throws.
        """
        result = self.send(
            "Runtime.evaluate", timeout, expression=expression, awaitPromise=True,
            returnByValue=True, userGesture=True,
        )  # fmt: skip
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 60) -> Any:
        """Return the value of an expression as soon as it is true.

        Raises:
            TimeoutError: if it is not in ``timeout`` seconds; the message has the page's errors.
        """
        end = time.monotonic() + timeout
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is not true; the page logged {self.problems}")
            time.sleep(0.02)
        return value

    def _receive(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer; the page logged {self.problems}")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError(f"{method}: the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _keep(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", "exception"))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                entry = parameters["entry"]
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")
