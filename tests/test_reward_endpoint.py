"""A reward over HTTP, against a real server in a thread: what is sent, what is tried again, and how it ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rollout_of import rollout_of
from tether.errors import InputError, NonFiniteError, RewardError
from tether.reward_endpoint import Endpoint
from tether.reward_sources import WeightedSum
from tether.scores import score

P, R = ["p0", [{"role": "user", "content": "p1"}]], ["a", "bb"]
Answer = tuple[int, str | bytes, dict[str, str]]


@dataclass
class Server:
    """What it answers, one after another, the last for ever; and what it was asked."""

    answers: list[Answer | Callable[[dict], Answer]]
    url: str = ""
    asked: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    """Before each answer."""


def lengths(body: dict) -> Answer:
    return 200, json.dumps({"scores": [len(response) for response in body["responses"]]}), {}


@contextmanager
def serving(*answers: Answer | Callable[[dict], Answer], seconds: float = 0.0) -> Iterator[Server]:
    server, over = Server(list(answers), seconds=seconds), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = server.answers[min(len(server.asked), len(server.answers) - 1)]
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            over.wait(server.seconds)
            status, text, headers = answer(body) if callable(answer) else answer
            with suppress(OSError):  # who asked has gone
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode() if isinstance(text, str) else text)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}/score"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        over.set()
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def paused() -> tuple[list[float], Callable[[float], None]]:
    pauses: list[float] = []
    return pauses, pauses.append


def test_prompts_responses_and_columns_go_out_as_json_and_scores_come_back() -> None:
    with serving(lengths) as server:
        reward = Endpoint(server.url, headers={"Authorization": "Bearer secret"})
        assert reward(P, R, answer=["x", None], level=(1, 2)) == [1.0, 2.0]
        assert Endpoint(server.url, columns=["level"])(P, R, answer=[object()] * 2, level=(1, 2)) == [1.0, 2.0]
    assert server.asked == [
        {"prompts": P, "responses": R, "columns": {"answer": ["x", None], "level": [1, 2]}},
        {"prompts": P, "responses": R, "columns": {"level": [1, 2]}},
    ]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "text", ['{"scores": [0.5, 2]}', '{"rewards": [0.5, 2], "model": "m"}', "[0.5, 2]", "[[0.5], [2]]"]
)
def test_scores_may_come_back_as_an_object_or_a_list(text: str) -> None:
    with serving((200, text, {})) as server:
        assert Endpoint(server.url)(P, R) == [0.5, 2.0]


def test_an_endpoint_is_a_reward_like_any_other() -> None:
    with serving(lengths) as server:
        made = rollout_of([3, 1])
        batch = replace(made, texts=tuple(R), prompts=replace(made.prompts, texts=tuple(P), columns={"k": (1, 2)}))
        reward = WeightedSum({"server": (Endpoint(server.url), 2.0), "one": lambda p, r: [1.0, 1.0]})
        assert score(reward, batch).scores.tolist() == [3.0, 5.0]
    assert server.asked == [{"prompts": P, "responses": R, "columns": {"k": [1, 2]}}]


# ── what is tried again ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_after_growing_pauses(status: int) -> None:
    pauses, pause = paused()
    with serving(*[(status, "busy", {})] * 3, lengths) as server:
        assert Endpoint(server.url, pause=pause)(P, R) == [1.0, 2.0]
    assert pauses == [0.5, 1.0, 2.0]
    assert len(server.asked) == 4
    assert all(body == server.asked[0] for body in server.asked)


def test_the_server_says_when_to_come_back_within_bounds() -> None:
    pauses, pause = paused()
    waits = ["7", "3600", "Wed, 21 Oct 2015 07:28:00 GMT", "-5"]
    with serving(*[(429, "", {"Retry-After": wait}) for wait in waits], lengths) as server:
        Endpoint(server.url, pause=pause)(P, R)
    assert pauses == [7.0, 30.0, 2.0, 4.0]


def test_after_the_last_try_there_is_one_error_with_the_last_reason() -> None:
    pauses, pause = paused()
    with serving((503, "one", {}), (500, "model fell over", {})) as server:
        said = rf"{server.url} gave no scores in 3 tries in \d+\.\d s; the last: HTTP 500 .*: model fell over"
        with pytest.raises(RewardError, match=said):
            Endpoint(server.url, retries=2, pause=pause)(P, R)
    assert len(server.asked) == 3
    assert pauses == [0.5, 1.0]


def test_a_server_that_is_slow_is_given_up_in_time() -> None:
    with serving(lengths, seconds=5.0) as server:
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"in 2 tries .* the last: no answer within 0\.2 s"):
            Endpoint(server.url, timeout_seconds=0.2, retries=1, pause=lambda seconds: None)(P, R)
        assert time.monotonic() - started < 2.0


def test_a_server_that_drips_its_answer_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    while not over.wait(0.05):
                        connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"no answer within 0\.3 s"):
            Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=0.3, retries=0)(P, R)
        assert time.monotonic() - started < 2.0
        over.set()
        thread.join()


def test_where_nobody_listens_is_one_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    pauses, pause = paused()
    with pytest.raises(RewardError, match=rf"127\.0\.0\.1:{port}/ gave no scores in 3 tries .* refused"):
        Endpoint(f"http://127.0.0.1:{port}/", retries=2, pause=pause)(P, R)
    assert pauses == [0.5, 1.0]


# ── what is not ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ((404, "no such path", {}), RewardError, "refused: HTTP 404 Not Found: no such path"),
        ((401, "", {}), RewardError, "refused: HTTP 401 Unauthorized$"),
        ((422, "x" * 5000, {}), RewardError, "refused: HTTP 422 [^:]*: x{200}$"),
        ((200, "<html>", {}), RewardError, "answered with no JSON, '<html>'"),
        ((200, b"\xff\xfe\xff", {}), RewardError, "answered with no JSON"),
        ((200, '{"score": [1, 2]}', {}), RewardError, r"answered with 'score'; wanted {\"scores\""),
        ((200, "{}", {}), RewardError, "answered with an empty object"),
        ((200, "[1]", {}), InputError, "the reward at http.*1 entries for 2 responses"),
        ((200, '{"scores": [1, null]}', {}), InputError, "gave None for response 1"),
        ((200, '{"scores": [1, "2"]}', {}), InputError, "gave '2' for response 1"),
        ((200, '{"scores": [1, NaN]}', {}), NonFiniteError, "gave nan for response 1"),
        ((200, '{"scores": [[1, 2], [1, 2]]}', {}), InputError, "TokenRewards"),
        ((200, "1.5", {}), InputError, "wanted a list of 2 numbers"),
    ],
)
def test_an_answer_that_trying_cannot_mend_is_one_error_at_once(
    answer: Answer, error: type[Exception], said: str
) -> None:
    with serving(answer) as server:
        with pytest.raises(error, match=said):
            Endpoint(server.url)(P, R)
        assert len(server.asked) == 1


def test_columns_that_cannot_be_sent_are_named() -> None:
    reward = Endpoint("http://127.0.0.1:9/")
    with pytest.raises(InputError, match=r"cannot send the columns picture, level .*Endpoint\(url, columns="):
        reward(P, R, picture=[object()] * 2, level=[1, 2])
    with pytest.raises(InputError, match=r"is sent \['answer'\]; columns found: level"):
        Endpoint("http://127.0.0.1:9/", columns=["answer"])(P, R, level=[1, 2])


@pytest.mark.parametrize(
    ("url", "knobs"),
    [
        ("file:///etc/passwd", {}),
        ("ftp://host/score", {}),
        ("localhost:8000", {}),
        ("http://", {}),
        ("http://host/", {"timeout_seconds": 0.0}),
        ("http://host/", {"retries": -1}),
    ],
)
def test_what_is_no_address_is_refused(url: str, knobs: dict[str, float]) -> None:
    with pytest.raises(InputError, match="wanted"):
        Endpoint(url, **knobs)
