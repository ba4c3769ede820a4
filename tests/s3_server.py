"""An S3 server (moto's) in a process of its own on this machine, which on demand fails and dawdles.

    python tests/s3_server.py --fail 0.05 --slow 0.02

prints its address. ``GET /_faults?fail=0.1&slow=0`` changes the shares, ``GET /_counts`` tells requests and faults so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
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
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_EC2_METADATA_DISABLED": "true"}


class Faults:
    """WSGI middleware: answers a share of all requests with 500 or 503, keeps others waiting."""

    def __init__(self, app, fail: float, slow: float) -> None:
        self.app, self.shares = app, {"fail": fail, "slow": slow}
        self.random, self.lock, self.counts = random.Random(0), threading.Lock(), Counter()

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/_faults":
            self.shares |= {name: float(value) for name, value in parse_qsl(environ["QUERY_STRING"])}
        if path in ("/_faults", "/_counts"):
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.counts).encode()]
        with self.lock:
            failing, slow = self.random.random() < self.shares["fail"], self.random.random() < self.shares["slow"]
            self.counts += Counter(requests=1, failed=failing, slow=slow)
        if slow:
            time.sleep(SLOW_SECONDS)
        if failing:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = "500 Internal Server Error" if self.counts["failed"] % 2 else "503 Slow Down"
            start_response(status, [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>on purpose</Message></Error>"]
        return self.app(environ, start_response)


class S3:
    """A running server. ``uri`` gives the address of a place in its bucket, for any process that knows ``environment``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": address}

    def uri(self, path: str) -> str:
        return f"s3://bucket/{path}"

    def faults(self, **shares: float) -> dict[str, int]:
        """Set the shares ``fail`` and ``slow``; the counts so far."""
        query = "&".join(f"{name}={value}" for name, value in shares.items())
        with urllib.request.urlopen(f"{self.address}/_faults?{query}") as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket named ``bucket``, for the length of the block; this process can reach it, too."""
    process = subprocess.Popen([sys.executable, Path(__file__)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
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
    parser.add_argument("--fail", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=0.0)
    args = parser.parse_args()
    app = Faults(DomainDispatcherApplication(create_backend_app), args.fail, args.slow)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    main()
