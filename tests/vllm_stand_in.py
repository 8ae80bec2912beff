"""What stands in for vLLM where none is installed: an engine made of a second policy, and a server that speaks its
routes. Neither knows how the writer lays weights down or what it sends: they read folders and JSON as vLLM does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tether.runtime.vllm_engine import Answer, Question, Rule

ANSWERED = "/inference/v1/generate"
Bend = Callable[[torch.Tensor], torch.Tensor]


class StandIn:
    """An engine on transformers: it draws from softmax(z/T) of whatever checkpoint it last read."""

    def __init__(self, model: Path) -> None:
        self.restart(model)
        self.version = "default"
        self.loads: list[tuple[str, tuple[str, ...]]] = []
        """Versions and the names that came with them."""
        self.asked: list[Question] = []
        self.rules: list[Rule] = []
        self.lost = False
        self.closed = False
        self.bend: Bend = lambda logits: logits
        """What a dishonest engine does to its logits."""
        self.tells = True
        """Whether its log-probabilities are then those that it draws with."""

    def answer(self, questions: Sequence[Question], rule: Rule) -> list[Answer]:
        self.asked += questions
        self.rules.append(rule)
        return [self._write(question, rule) for question in questions]

    @torch.no_grad()
    def _write(self, question: Question, rule: Rule) -> Answer:
        draw, tokens, logprobs = torch.Generator().manual_seed(question.seed), [], []
        for _ in range(rule.max_tokens):
            ids = torch.tensor([[*question.prompt, *tokens]])
            logits = self.model(input_ids=ids, use_cache=False).logits[0, -1] / rule.temperature
            bent = self.bend(logits).log_softmax(-1)
            tokens.append(int(torch.multinomial(bent.exp(), 1, generator=draw)))
            logprobs.append(float((bent if self.tells else logits.log_softmax(-1))[tokens[-1]]))
            if tokens[-1] in rule.stops:
                return Answer(tuple(tokens), tuple(logprobs), True, (self.version,))
        return Answer(tuple(tokens), tuple(logprobs), False, (self.version,))

    def load(self, folder: Path, version: str) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        if self.packed:
            weights.pop("lm_head.weight", None)
        result = self.model.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys
        self.version = version
        self.loads.append((version, tuple(weights)))

    def about(self) -> str:
        return "a stand-in"

    def is_lost(self) -> bool:
        return self.lost

    def restart(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.packed = bool(self.model.config.tie_word_embeddings)
        """Whether the head is a copy of the embeddings that no reload reaches, as in vLLM's CPU build."""
        if self.packed:
            head = self.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        self.version, self.lost = "default", False

    def close(self) -> None:
        self.closed = True


@dataclass
class Routes:
    """A server with vLLM's routes that says one word, and what it was asked."""

    url: str = ""
    version: str = "0.32.0"
    mode: str = "processed_logprobs"
    weights: str = "default"
    missing: tuple[str, ...] = ()
    """Routes that this build does not have."""
    broken: tuple[str, ...] = ()
    """Routes that fail inside."""
    asked: list[tuple[str, dict]] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    """More of what it tells of itself."""
    seconds: float = 0.0
    """Before each answer."""
    over: threading.Event = field(default_factory=threading.Event)

    def reply(self, path: str, body: dict) -> tuple[int, object]:
        self.asked.append((path, body))
        route = path.partition("?")[0]
        self.over.wait(self.seconds)
        if route in self.missing:
            return 404, {"detail": "Not Found"}
        if route in self.broken:
            return 500, {"error": {"message": "Call to collective_rpc method failed: no such module"}}
        if route == "/update_weight_version":
            self.weights = body["new_version"]
        if route == ANSWERED:
            return 200, self.says(body)
        return 200, {
            "/version": {"version": self.version},
            "/weight_info": {"weight_version": self.weights},
            "/server_info": {"vllm_config": {"model_config": {"logprobs_mode": self.mode}} | self.config},
        }.get(route, {})

    def says(self, body: dict) -> dict:
        """The prompt's last token once more, then the first stop token."""
        tokens = [body["token_ids"][-1], body["sampling_params"]["stop_token_ids"][0]]
        content = [{"token_id": token, "logprob": -0.5 * (i + 1), "rank": 1} for i, token in enumerate(tokens)]
        spans = [{"version": self.weights, "start": 0, "end": 2}]
        choice = {"index": 0, "finish_reason": "stop", "token_ids": tokens, "weight_versions": spans}
        return {"choices": [choice | {"logprobs": {"content": content}}]}


@contextmanager
def serving(**facts: object) -> Iterator[Routes]:
    routes = Routes(**facts)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            self._answer(json.loads(self.rfile.read(length)) if length else {})

        def _answer(self, body: dict) -> None:
            status, told = routes.reply(self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        routes.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield routes
        finally:
            routes.over.set()
            server.shutdown()
            thread.join()
