"""An S3 server (moto) in a separate process, which fails or is slow on request.

    python tests/s3_server.py --fail 0.05 --slow 0.02

prints its address. ``GET /_faults?fail=0.1&slow=0`` sets the shares of faulty requests and returns the number of requests
and of each fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

SLOW_SECONDS = 0.4
FAULTS = {
    "fail": "answered with 500 or 503",
    "slow": f"answered {SLOW_SECONDS} s late",
    "hang": "answered never, within 60 s",
    "drop": "cut off before any answer",
    "lose": "done, and then answered with 500",
    "cut": "a body cut off in the middle",
    "deny": "answered with 403",
}
"""Faults that a share of all requests can have."""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Faults:
    """WSGI middleware that makes a share of the requests fail, and counts them."""

    def __init__(self, app, shares: dict[str, float]) -> None:
        self.app, self.shares = app, shares
        self.random, self.lock, self.counts = random.Random(0), threading.Lock(), Counter(requests=0, failed=0)

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/_faults":
            self.shares |= {name: float(value) for name, value in parse_qsl(environ["QUERY_STRING"])}
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.counts).encode()]
        with self.lock:
            draws = {name: self.random.random() < self.shares.get(name, 0) for name in FAULTS}
            drawn = [name for name in FAULTS if draws[name]]
            self.counts.update(["requests", *drawn, *["failed"] * bool({*drawn} - {"slow"})])
        if draws["slow"]:
            time.sleep(SLOW_SECONDS)
        if draws["hang"]:
            time.sleep(60)
        if draws["lose"]:
            list(self.app(environ, lambda *_: None))
        elif draws["fail"] or draws["drop"] or draws["deny"]:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if draws["drop"]:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if draws["deny"]:
            return refuse(start_response, "403 Forbidden", "AccessDenied")
        if draws["fail"] or draws["lose"] or draws["drop"]:
            slow_down = self.counts["requests"] % 2
            return refuse(
                start_response,
                *(("503 Slow Down", "SlowDown") if slow_down else ("500 Internal Server Error", "InternalError")),
            )
        answer = self.app(environ, start_response)
        if draws["cut"] and environ["REQUEST_METHOD"] == "GET":
            body = b"".join(answer)
            return [body[: len(body) // 2]]
        return answer


def refuse(start_response, status: str, code: str) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml")])
    return [f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()]


class S3:
    """A running server. ``uri`` is an address in its bucket, for processes with ``environment``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": address}

    def uri(self, path: str) -> str:
        return f"s3://bucket/{path}"

    def put(self, path: str, data: bytes) -> None:
        """Store an object without raydpo."""
        # Without a content type urllib sends a form, and moto would read it as one.
        urllib.request.urlopen(
            urllib.request.Request(
                f"{self.address}/bucket/{path}", data, method="PUT", headers={"Content-Type": "application/octet-stream"}
            )
        ).close()

    def heal(self) -> None:
        """Stop all faults."""
        self.faults(**dict.fromkeys(FAULTS, 0))

    def faults(self, **shares: float) -> dict[str, int]:
        """Set the shares of faulty requests, by the names in FAULTS. Returns the counts so far."""
        query = "&".join(f"{name}={value}" for name, value in shares.items())
        with urllib.request.urlopen(f"{self.address}/_faults?{query}") as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket, for the length of the ``with`` block. This process can reach it, too."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    before = dict(os.environ)
    try:
        server = S3(process.stdout.readline().strip())
        os.environ.update(server.environment)
        urllib.request.urlopen(urllib.request.Request(f"{server.address}/bucket", method="PUT")).close()
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    parser = argparse.ArgumentParser()
    for name, meaning in FAULTS.items():
        parser.add_argument(f"--{name}", type=float, default=0.0, metavar="SHARE", help=f"share of requests {meaning}")
    app = Faults(DomainDispatcherApplication(create_backend_app), vars(parser.parse_args()))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    main()
