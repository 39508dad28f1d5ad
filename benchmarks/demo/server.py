"""A small real model server: one model, one endpoint, and an honest clock.

Owns serving over HTTP (``GET /health/ready``, ``POST /embed``, ``POST /forward``) and the times since
this process was started: libraries imported, weights there, ready. Ready means that the model has
answered once, so that memory which is only touched then is paid for before, not by the first client.
Where weights come from is weights.py's affair.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.demo.weights import WAYS, Weights, build, fetch

if TYPE_CHECKING:
    import torch

MOST_BODY_BYTES = 64 * 1024
MOST_TEXTS = 64
MOST_TOKENS = 512
CLIENT_TIMEOUT_S = 30


class BadRequest(Exception):
    """What the client sent cannot be answered; the message says why."""


Answer = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(slots=True)
class Status:
    """How far the start is; written by the main thread, read by the handlers."""

    times: dict[str, float] = field(default_factory=dict)
    routes: dict[str, Answer] = field(default_factory=dict)
    # torch's threads are one set: two answers at once would only be slower, one after the other.
    turn: threading.Lock = field(default_factory=threading.Lock)

    def passed(self, what: str) -> None:
        self.times[what] = since_start_s()

    @property
    def ready(self) -> bool:
        return "ready" in self.times


def since_start_s() -> float:
    """Seconds since the kernel made this process, to a hundredth: the interpreter's own start counts."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


# --- what it computes -----------------------------------------------------------------------


def exactly(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's bytes: equal only if every bit is."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def embedder(weights: Weights) -> Answer:
    """Texts to unit vectors, as this model's card has it: mean over the tokens, then normalised."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.directory, local_files_only=True)
    model = build(weights)

    def embed(request: dict[str, Any]) -> dict[str, Any]:
        texts = request.get("texts")
        if not isinstance(texts, list) or not 0 < len(texts) <= MOST_TEXTS:
            raise BadRequest(f"'texts' must be a list of 1 to {MOST_TEXTS} strings")
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("'texts' must hold strings only")
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return {"sha256": exactly(vectors), "vectors": vectors.tolist()}

    embed({"texts": ["ready?"]})
    return embed


def forwarder(weights: Weights) -> Answer:
    """Token ids to logits: their digest, and the likeliest next tokens with their values."""
    import torch

    model = build(weights)
    vocabulary = model.config.vocab_size

    def forward(request: dict[str, Any]) -> dict[str, Any]:
        ids = request.get("token_ids")
        if not isinstance(ids, list) or not 0 < len(ids) <= MOST_TOKENS:
            raise BadRequest(f"'token_ids' must be a list of 1 to {MOST_TOKENS} integers")
        if not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise BadRequest(f"'token_ids' must hold integers from 0 to {vocabulary - 1} only")
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        best = logits[-1].float().topk(5)
        return {
            "sha256": exactly(logits),
            "shape": list(logits.shape),
            "next": list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        }

    forward({"token_ids": [1, 2, 3]})
    return forward


MAKERS: dict[str, Callable[[Weights], Answer]] = {"embed": embedder, "forward": forwarder}


def import_libraries(kind: str, threads: int) -> None:
    """Import what answering needs, the same for every way to the weights."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    # transformers imports its modules when their names are looked up.
    names = ("AutoTokenizer", "BertModel") if kind == "embed" else ("AutoConfig", "Qwen2ForCausalLM")
    for name in names:
        getattr(transformers, name)


# --- HTTP -----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection; the model is behind ``status``."""

    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT_S

    def __init__(self, status: Status, *request: Any) -> None:
        self.status = status
        super().__init__(*request)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone: its affair
            super().handle()

    def do_GET(self) -> None:
        if self.path != "/health/ready":
            self._answer(404, {"error": f"there is no {self.path}; try /health/ready"})
            return
        self._answer(
            200 if self.status.ready else 503, {"ready": self.status.ready, "times_s": self.status.times}
        )

    def do_POST(self) -> None:
        try:
            request = self._request()
            if not self.status.ready:
                self._answer(503, {"error": "the model is not there yet"})
            elif self.path not in self.status.routes:
                known = ", ".join(self.status.routes)
                self._answer(404, {"error": f"there is no {self.path}; this model has {known}"})
            else:
                with self.status.turn:
                    answer = self.status.routes[self.path](request)
                self._answer(200, answer)
        except BadRequest as error:
            self._answer(400, {"error": str(error)})

    def _request(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            self.close_connection = True  # the body stays unread, so nothing can follow it
            raise BadRequest(f"a body of known length is needed, of at most {MOST_BODY_BYTES} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(request, dict):
            raise BadRequest("the body is not a JSON object")
        return request

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the log is for what goes wrong."""


def listen(port: int, status: Status) -> ThreadingHTTPServer:
    """Answer on 127.0.0.1 from now on, in threads of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, status))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


# --- the process ----------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.server", description="Serve one model.")
    parser.add_argument("kind", choices=tuple(MAKERS), help="what the model does")
    parser.add_argument("ref", help="the model, http://HOST/DIR/")
    parser.add_argument("--weights", choices=WAYS, required=True, help="how to get them")
    parser.add_argument(
        "--downloads", type=Path, required=True, help="empty directory for --weights download"
    )
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1 (any free one)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch's threads")
    return parser.parse_args(argv)


def start(arguments: argparse.Namespace, status: Status) -> Weights:
    """From nothing to ready, noting when each step was done. What it returns must be kept."""
    import_libraries(arguments.kind, arguments.threads)
    status.passed("imports")
    weights = fetch(arguments.weights, arguments.ref, arguments.downloads)
    status.passed("weights")
    status.routes[f"/{arguments.kind}"] = MAKERS[arguments.kind](weights)
    status.passed("ready")
    return weights


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    status = Status()
    server = listen(arguments.port, status)
    print(f"serving on http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        weights = start(arguments, status)
    except Exception as error:
        if hint := getattr(error, "hint", ""):  # the client's own errors say how to mend them
            print(f"error: {error}\nhint: {hint}", file=sys.stderr)
            return 1
        raise
    # No handler for SIGTERM: a lease ends with its process, however that ends. Until then it is held here.
    while weights:
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
