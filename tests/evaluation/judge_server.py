"""A local chat-completions server that can fail in the ways that a test asks for."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Opinion = Callable[[str, str], str]
"""From the first and the second answer to what the model says. The second is empty if there is only one."""


class JudgeServer:
    """Attributes:
    url: base address.
    requests: bodies of all requests. keys: their Authorization headers.
    trouble: called with the number of each request, from 1; what it returns is the status that it gets, None = 200.
    """

    def __init__(self, opinion: Opinion) -> None:
        self.opinion = opinion
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.trouble: Callable[[int], int | None] = lambda number: None
        self.delay = 0.0
        self.body: bytes | None = None
        self.url = ""


@contextlib.contextmanager
def serving(opinion: Opinion) -> Iterator[JudgeServer]:
    state, lock = JudgeServer(opinion), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(body)
                state.keys.append(self.headers.get("Authorization"))
                number = len(state.requests)
            time.sleep(state.delay)
            status = 404 if self.path != "/v1/chat/completions" else state.trouble(number) or 200
            said = body["messages"][-1]["content"]
            first, second = [*re.findall(r"<answer(?:_[AB])?>\n(.*?)\n</answer(?:_[AB])?>", said, re.DOTALL), ""][:2]
            reply = {"choices": [{"message": {"role": "assistant", "content": state.opinion(first, second)}}]}
            data = json.dumps(reply).encode() if state.body is None else state.body
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has given up
                self.send_response(status)
                if status == 503:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # by default connections beyond 5 at a time are dropped, and come again seconds later

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def longer(first: str, second: str) -> str:
    return "A" if len(first) > len(second) else "B"
