"""A real S3 server on the loopback address, whose requests are counted and can be made to fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[..., Iterable[bytes]]
BUCKET = "bucket"


@dataclass
class Server:
    """The server's address, what was asked of it, and the fault that it is to show."""

    address: str = ""
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of requests by method and path."""
    fault: Callable[[str, str], str] = lambda method, path: ""
    """Function of method and path: "" for none, else `error`, `damage`, or `hang`."""

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs: address and credentials."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "an-access-key",
            "AWS_SECRET_ACCESS_KEY": "a-secret-key",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the attempts are ours
        }

    def of(self, method: str, name: str) -> int:
        """Number of requests for paths that end with `name`."""
        return sum(
            n for (m, path), n in self.requests.items() if m == method and path.endswith(name)
        )

    def wrapped(self, app: Answer) -> Answer:
        """`app`, with requests counted and faults shown."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests[method, path] += 1
            fault = self.fault(method, path)
            if fault == "error":
                start("500 Internal Server Error", [("Content-Length", "0")])
                return []
            if fault == "hang":
                threading.Event().wait(60)
            body = b"".join(app(environ, start))
            return [bytes(len(body)) if fault == "damage" else body]

        return answer


@contextmanager
def serving() -> Iterator[Server]:
    """Start a server with one bucket on a free port."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from s3fs import S3FileSystem
    from werkzeug.serving import make_server

    server = Server()
    app = server.wrapped(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{http.server_port}"
    keys = {"aws_access_key_id": "an-access-key", "aws_secret_access_key": "a-secret-key"}
    boto3.client("s3", endpoint_url=server.address, region_name="us-east-1", **keys).create_bucket(
        Bucket=BUCKET
    )
    S3FileSystem.clear_instance_cache()  # a client of this process may know an earlier server
    try:
        yield server
    finally:
        S3FileSystem.clear_instance_cache()
        http.shutdown()
