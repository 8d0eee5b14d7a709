"""A server on 127.0.0.1 with the wire formats of vLLM and SGLang, by a teacher in transformers.

It can be told to fail: `server.faults` maps the number of a request for log-probabilities, from 0,
to a fault. Number 0 is the test request at the start of a dump.
As a script, `python -m tests.served.server MODEL PORT`, it serves until it is killed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Json = dict[str, Any]
Faults = Callable[[int], str]
HUGE = 10**22
VLLM_LIMIT = "Requested prompt logprobs of {}, which is greater than max allowed: {}"


class Server:
    """The server, in a thread of this process; a context manager."""

    def __init__(self, model: Path, *, max_logprobs: int = 400, port: int = 0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(str(model)).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        self.names, self.max_logprobs, self.key = ["teacher"], max_logprobs, ""
        self.limit_words = VLLM_LIMIT
        self.faults: Faults = lambda number: ""
        self.tokenize = ""
        """Fault of /tokenize: a status, `garbage`, `deep` or `slow`."""
        self.seconds = 0.0
        """Length of a slow answer, and of every answer's additional time."""
        self.requests: list[Json] = []
        self.in_flight = self.most_in_flight = self.connections = 0
        self.lock = threading.Lock()
        self.port = port

    def __enter__(self) -> Server:
        handler = type("Bound", (Handler,), {"server_of_tests": self})
        self.http = Http(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        yield
        with self.lock:
            self.in_flight -= 1

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[S - 1, V]: row i predicts token i + 1."""
        with self.lock:
            logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        return logits.float().log_softmax(-1)


class Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    """One connection; `server_of_tests` is set in a subclass."""

    protocol_version = "HTTP/1.1"
    server_of_tests: Server

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        server = self.server_of_tests
        with server.lock:
            server.connections += 1
        with suppress(ConnectionError):  # a client that was killed
            super().handle()
        with server.lock:
            server.connections -= 1

    def do_GET(self) -> None:
        server = self.server_of_tests
        if self._denied():
            return
        if self.path != "/v1/models":
            return self._send(404, {"detail": "Not Found"})
        length = server.model.config.max_position_embeddings
        cards = [{"id": name, "object": "model", "max_model_len": length} for name in server.names]
        self._send(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        server = self.server_of_tests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._denied():
            return
        if self.path == "/tokenize":
            if server.tokenize:
                return self._no_tokens(server.tokenize)
            ids = server.tokenizer.encode(body["prompt"], add_special_tokens=False)
            return self._send(200, {"tokens": ids, "count": len(ids)})
        scoring = {"/v1/completions": vllm, "/generate": sglang}.get(self.path)
        if scoring is None:
            return self._send(404, {"detail": "Not Found"})
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
        self._score(scoring, body, server.faults(number))

    def _no_tokens(self, fault: str) -> None:
        if fault.isdigit():
            return self._send(int(fault), {"detail": "no"})
        if fault == "slow":
            time.sleep(3)
        self._send(200, {"tokens": "none"}, fault="deep" if fault == "deep" else "")

    def _score(self, scoring: Callable[[Server, Json, str], Json], body: Json, fault: str) -> None:
        server = self.server_of_tests
        with server.counted():  # until the answer is sent, when the client may ask again
            time.sleep(server.seconds)
        if fault == "500":
            return self._send(500, {"error": {"message": "EngineCore encountered an issue"}})
        if fault == "429":
            return self._send(429, {"error": "busy"}, {"Retry-After": "1"})
        if fault == "slow":
            time.sleep(5)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        try:
            answer = scoring(server, body, fault)
        except ValueError as error:
            detail = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return self._send(400, {"error": detail})
        if fault == "other api":  # one that ignores what it does not know
            answer = {"choices": [{"text": "x"}], "text": "x", "meta_info": {}}
        self._send(200, answer, fault=fault)

    def _denied(self) -> bool:
        key = self.server_of_tests.key
        if not key or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._send(401, {"error": "Unauthorized"})
        return True

    def _send(
        self, status: int, value: Json, headers: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        content = json.dumps(value).encode()
        if fault == "deep":
            content = b'{"choices": ' + b"[" * 100_000
        if fault == "no json":
            content = content[: len(content) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if fault == "truncated":
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)


def vllm(server: Server, body: Json, fault: str) -> Json:
    """`/v1/completions` with `prompt_logprobs`: the token's own entry first, then the top-K."""
    tokens, k = seen(body["prompt"], fault), body["prompt_logprobs"]
    if body["model"] not in server.names:
        raise ValueError(f"The model `{body['model']}` does not exist.")
    if k > server.max_logprobs:
        if fault != "capped":
            raise ValueError(server.limit_words.format(k, server.max_logprobs))
        k = server.max_logprobs
    if len(tokens) + body["max_tokens"] > server.model.config.max_position_embeddings:
        raise ValueError("This model's maximum context length is exceeded")
    entries: list[dict[str, Json] | None] = [None]
    for token, row in zip(tokens[1:], values(server, tokens, fault), strict=True):
        top = row.topk(k + (fault == "long"))
        entry = {str(token): logprob(row[token], int((row > row[token]).sum()) + 1)}
        for rank, (value, i) in enumerate(zip(*top, strict=True), start=1):
            entry[str(int(i) + HUGE * (fault == "huge id"))] = logprob(value, rank)
        entries.append(entry)
    choice: Json = {"index": 0, "text": "x", "prompt_logprobs": broken(entries, fault)}
    if body.get("return_token_ids"):
        choice["prompt_token_ids"] = tokens
    if fault == "no logprobs":
        del choice["prompt_logprobs"]
    if fault in ("shifted", "rotated", "short", "other row"):
        del choice["prompt_token_ids"]  # only the positions tell
    return {"choices": [choice], "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1}}


def logprob(value: torch.Tensor, rank: int) -> Json:
    number = -9999.0 if value == -torch.inf else float(value)
    return {"logprob": number, "rank": rank, "decoded_token": "é"}


def sglang(server: Server, body: Json, fault: str) -> Json:
    """`/generate` with the log-probabilities of the input."""
    tokens, k = seen(body["input_ids"], fault), body["top_logprobs_num"]
    own: list[Any] = [[None, tokens[0], None]]
    tops: list[Any] = [None]
    for token, row in zip(tokens[1:], values(server, tokens, fault), strict=True):
        value, ids = row.topk(k)
        own.append([finite(row[token]), token, None])
        far = HUGE * (fault == "huge id")
        tops.append([[finite(v), int(i) + far, None] for v, i in zip(value, ids, strict=True)])
    last = server.model.config.vocab_size - 1
    for item in own:
        item[1] = item[1] if item[1] < last else 0
    meta: Json = {"prompt_tokens": len(tokens), "completion_tokens": 0}
    meta["input_token_logprobs"] = broken(own, fault) if fault == "short" else own
    meta["input_top_logprobs"] = None if fault == "no logprobs" else broken(tops, fault)
    return {"text": "", "meta_info": meta}


def finite(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None  # as orjson, for NaN too


def values(server: Server, tokens: list[int], fault: str) -> torch.Tensor:
    found = server.logprobs(tokens)
    if fault == "logits":
        found = found - 7.5
    if fault == "nan":
        found[7] = torch.nan
    return found


def seen(tokens: list[int], fault: str) -> list[int]:
    return tokens[::-1] if fault == "other row" else tokens


def broken(entries: list[Any], fault: str) -> list[Any]:
    if fault == "short":
        return entries[:-1]
    if fault == "shifted":
        return [*entries[1:], entries[-1]]
    if fault == "rotated":
        return [None, *entries[2:], entries[1]]
    if fault == "cached":
        return [*entries[:1], *[None] * 16, *entries[17:]]
    return entries


def main(model: str, port: str) -> None:
    with Server(Path(model), port=int(port)) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
