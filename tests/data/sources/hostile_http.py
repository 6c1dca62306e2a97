"""A local HTTP server that does what rows of a table must survive; each test names paths of it."""

import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class HostileServer:
    """Serves on 127.0.0.1 until closed; counts requests and bytes by path."""

    def __init__(self, image: bytes, endless_bytes: int = 1 << 30) -> None:
        self.image, self.endless_bytes = image, endless_bytes
        self.requests: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for_silence(self, timeout_s: float = 5.0) -> int:
        """Bytes sent in all, once no more are sent."""
        end, before = time.monotonic() + timeout_s, -1
        while (now := self.sent_bytes.total()) != before and time.monotonic() < end:
            before = now
            time.sleep(0.1)
        return now

    def __enter__(self) -> "HostileServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Each method without arguments is a path."""

    def __init__(self, state: HostileServer, *args: Any) -> None:
        self.state = state
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.state.requests[path] += 1
        try:
            getattr(self, path.strip("/").split("/")[0], self.image)()
        except OSError:
            self.close_connection = True

    def put(self, data: bytes) -> None:
        self.wfile.write(data)
        self.state.sent_bytes[self.path.partition("?")[0]] += len(data)

    def head(self, status: int, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def image(self) -> None:
        self.head(200, Content_Length=len(self.state.image))
        self.put(self.state.image)

    def gone(self) -> None:
        self.head(404, Content_Length=0)

    def broken(self) -> None:
        self.head(503, Content_Length=0)

    def flaky(self) -> None:
        if self.state.requests[self.path] < 3:
            self.broken()
        else:
            self.image()

    def redirect(self) -> None:
        self.head(302, Location=unquote(self.path.partition("?")[2]), Content_Length=0)

    def circle(self) -> None:
        self.head(302, Location="/circle", Content_Length=0)

    def endless(self) -> None:
        """Heeds no Range and sends a large file."""
        self.head(200)
        for _ in range(self.state.endless_bytes >> 16):
            self.put(bytes(1 << 16))

    def packed(self) -> None:
        """A body that claims to be gzip."""
        self.head(200, Content_Encoding="gzip", Content_Length=len(self.state.image))
        self.put(self.state.image)

    def drip(self) -> None:
        """A byte at a time, for ever."""
        self.head(200, Content_Length=1 << 20)
        while not self.state.ended.wait(0.05):
            self.put(b"\0")

    def drip_head(self) -> None:
        """A header that never ends."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.state.ended.wait(0.05):
            self.put(b"a")

    def silent(self) -> None:
        self.state.ended.wait(60)

    def headers_flood(self) -> None:
        """Headers without end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000_000):
            self.put(b"X-%d: %s\r\n" % (number, b"a" * 1000))

    def log_message(self, *_: Any) -> None:
        pass
