"""vLLM's server as tether speaks to it, against a stand-in with the same routes: what is sent, and one clear error for
each thing that can be wrong.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tether.config import RunSettings
from tether.errors import ConfigError, MissingExtraError, WorkerError
from tether.knobs import read_settings
from tether.runtime import vllm_server
from tether.runtime.vllm_engine import PROVED, Answer, Question, Rule
from tether.runtime.vllm_process import VllmProcess
from tether.runtime.vllm_server import Child, Launch, VllmServer
from vllm_stand_in import ANSWERED, serving

RULE = Rule(8, 0.7, (2, 3))
HERE = {"python": sys.executable, "dtype": "float32", "cache_bytes": 2**20, "start_seconds": 20.0}


def at(url: str, seconds: float = 5.0, temperature: float = 0.7) -> VllmServer:
    return VllmServer.at(url, seconds, temperature)


# ── what is said ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_tokens_go_out_and_tokens_come_back_in_the_order_of_the_questions() -> None:
    with serving(weights="run-4") as routes:
        questions = [Question((5, 6, 10 + i), seed=i) for i in range(20)]
        answers = at(routes.url).answer(questions, RULE)
    assert answers == [Answer((10 + i, 2), (-0.5, -1.0), True, ("run-4",)) for i in range(20)]
    sent = sorted((body for path, body in routes.asked if path == ANSWERED), key=lambda body: body["token_ids"])
    assert [body["token_ids"] for body in sent] == [[5, 6, 10 + i] for i in range(20)]
    assert [body["sampling_params"]["seed"] for body in sent] == list(range(20))
    assert {body["sampling_params"]["temperature"] for body in sent} == {0.7}
    assert all("prompt" not in body and "text" not in body for body in sent)


def test_weights_are_exchanged_while_the_engine_stands_still_and_get_their_version(tmp_path: Path) -> None:
    with serving() as routes:
        at(routes.url).load(tmp_path, "run-7")
    told = [
        path for path, _ in routes.asked if path not in ("/version", "/weight_info", "/server_info?config_format=json")
    ]
    assert told == ["/pause?mode=wait", "/collective_rpc", "/update_weight_version", "/resume"]
    bodies = dict(routes.asked)
    assert bodies["/collective_rpc"] == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert routes.weights == "run-7"


# ── what can be wrong ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host", "", "http://"])
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(ConfigError, match=r"no address of a server; wanted http://host:port"):
        at(address)


def test_an_address_where_nobody_listens() -> None:
    with pytest.raises(WorkerError, match=r"there is no vLLM server at http://127.0.0.1:9: .* cannot be reached"):
        at("http://127.0.0.1:9")


def test_an_address_where_something_else_listens() -> None:
    with serving(missing=("/version",)) as routes, pytest.raises(WorkerError, match=r"there is no vLLM server at"):
        at(routes.url)


def test_a_vllm_without_weight_versions_is_named_with_its_version() -> None:
    told = r"the vLLM 0.11.0 at .* wanted 0.32.0 .*VLLM_SERVER_DEV_MODE=1"
    with serving(version="0.11.0", missing=("/weight_info",)) as routes, pytest.raises(WorkerError, match=told):
        at(routes.url)


def test_log_probabilities_before_temperature_are_refused_unless_it_is_1() -> None:
    with serving(mode="raw_logprobs") as routes:
        at(routes.url, temperature=1.0)
        with pytest.raises(
            WorkerError, match=r"tells raw_logprobs, which at temperature 0.7 are not those .*processed"
        ):
            at(routes.url, temperature=0.7)


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with serving() as routes:
        server = at(routes.url, seconds=0.3)
        routes.seconds = 5.0
        with pytest.raises(WorkerError, match=r"gave no answer within 0.3 s"):
            server.answer([Question((1,), 0)], RULE)


def test_a_server_without_the_token_route_says_how_it_is_started() -> None:
    told = r"refused with HTTP 404.*--enable-scale-out"
    with serving(missing=(ANSWERED,)) as routes, pytest.raises(WorkerError, match=told):
        at(routes.url).answer([Question((1,), 0)], RULE)


def test_a_server_that_has_another_model_or_sees_no_weights_is_told_with_the_folder(tmp_path: Path) -> None:
    told = rf"no such module; wanted a server that holds this model .*{tmp_path}"
    with serving(broken=("/collective_rpc",)) as routes, pytest.raises(WorkerError, match=told):
        at(routes.url).load(tmp_path, "run-1")


def test_a_server_that_took_a_part_of_the_weights_answers_others_by_a_version_that_is_nobodys(tmp_path: Path) -> None:
    with serving(broken=("/collective_rpc",)) as routes:
        with pytest.raises(WorkerError):
            at(routes.url).load(tmp_path, "run-1")
        assert routes.asked[-1][0] == "/resume"
        assert routes.weights == "run-1-broken"
        assert routes.weights.rpartition("-")[0] not in ("run", "default")


def test_a_cpu_that_packs_its_head_is_refused_for_embeddings_that_train() -> None:
    """A vLLM on a CPU keeps a tied head as it was; on a GPU, or told that the two are two, it does not."""
    model = {"logprobs_mode": "processed_logprobs"}
    cpu, gpu = {"device_config": {"device": "cpu"}}, {"device_config": {"device": "cuda"}}
    split = {"model_config": model | {"hf_overrides": {"tie_word_embeddings": False}}}
    for config in (gpu, cpu | split):
        with serving(config=config) as routes:
            VllmServer.at(routes.url, 5.0, 0.7, untied=True)
    with serving(config=cpu) as routes:
        VllmServer.at(routes.url, 5.0, 0.7)
        with pytest.raises(WorkerError, match=r"--hf-overrides '\{\"tie_word_embeddings\": false\}'"):
            VllmServer.at(routes.url, 5.0, 0.7, untied=True)


def test_a_server_that_tells_of_itself_in_another_form_is_named_with_its_version() -> None:
    told = r"the vLLM 0.40.0 at .* in another form than 0.32.0"
    with serving(version="0.40.0", config={"model_config": {}}) as routes, pytest.raises(WorkerError, match=told):
        at(routes.url)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"finish_reason": "abort"}, "gave up a response: abort"),
        ({"logprobs": None}, "another form than that of 0.32.0"),
        ({"token_ids": [7, 7]}, "log-probabilities are of other tokens"),
    ],
)
def test_a_reply_of_another_form_is_never_taken_for_a_response(change: dict, told: str) -> None:
    with serving() as routes:
        own = routes.says
        routes.says = lambda body: {"choices": [own(body)["choices"][0] | change]}
        with pytest.raises(WorkerError, match=told):
            at(routes.url).answer([Question((1,), 0)], RULE)


# ── a server of the run's own ───────────────────────────────────────────────────────────────────────────────────────
def test_without_vllm_the_install_line_is_told_and_nothing_is_started(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"has no vLLM.*pip install 'tether\[vllm\]'.*runtime.vllm.python"):
        VllmServer.start(Launch(**HERE), tmp_path, 5.0)
    with pytest.raises(MissingExtraError, match=r"pip install 'tether\[vllm\]'"):
        VllmProcess(str(tmp_path), "float32", 2**20, eager=True)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime.vllm.python is '/no/python'"):
        VllmServer.start(Launch(**HERE | {"python": "/no/python"}), tmp_path, 5.0)


def test_an_interpreter_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(vllm_server, "QUICK_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"runtime.vllm.python is '.*python': no answer within 0.5 s"):
        VllmServer.start(Launch(**HERE | {"python": str(python)}), tmp_path, 5.0)


def package(folder: Path, code: str) -> Launch:
    """A vLLM whose server is these lines; `sys.argv` holds its options."""
    module = folder / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    for part in (module, module.parent, module.parent.parent):
        (part / "__init__.py").write_text("")
    (module / "api_server.py").write_text(code)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return Launch(**HERE | {"python": str(python)})


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    remark = "print('WARNING 11-21 this may cause OSError: too many files', flush=True)"
    launch = package(tmp_path, f"{remark}\nraise ValueError('no room for keys and values')")
    with pytest.raises(
        WorkerError, match=r"ended with status 1; its last words: ValueError: no room for keys and values"
    ):
        VllmServer.start(launch, tmp_path, 5.0)


def test_a_vllm_that_does_not_know_the_options_is_told_which_one_does(tmp_path: Path) -> None:
    launch = package(tmp_path, "import argparse; argparse.ArgumentParser().parse_args()")
    with pytest.raises(
        WorkerError, match=rf"status 2; .*unrecognized arguments: --model .*wanted {PROVED} or one like"
    ):
        VllmServer.start(launch, tmp_path, 5.0)


class OtherVllm:
    """A module `vllm` of another version, whose engine fails as it is told."""

    __version__ = "0.5.0"
    SamplingParams = dict

    class LLM:
        def __init__(self, **options: object) -> None:
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

        def generate(self, *asked: object, **options: object) -> None:
            raise type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue")


def test_a_vllm_here_without_weight_versions_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", OtherVllm)
    with pytest.raises(WorkerError, match=rf"vLLM 0\.5\.0 has no weight versions; wanted {PROVED}"):
        VllmProcess(str(tmp_path), "float32", 2**20, eager=True)


def test_a_vllm_here_that_fails_at_writing_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", OtherVllm)
    monkeypatch.setattr(OtherVllm.LLM, "update_weight_version", lambda version: None, raising=False)
    engine = VllmProcess(str(tmp_path), "float32", 2**20, eager=True)
    with pytest.raises(WorkerError, match=r"vLLM 0\.5\.0 did not write: EngineCore encountered an issue"):
        engine.answer([Question((1, 2), 3)], RULE)


def test_a_server_that_hangs_at_the_start_is_given_up(tmp_path: Path) -> None:
    remark = "print('WARNING 11-21 this may cause OSError: too many files', flush=True)"
    launch = package(tmp_path, f"import time; {remark}; print('loading', flush=True); time.sleep(60)")
    with pytest.raises(WorkerError, match=r"did not come up within 1 s; its last words: loading"):
        VllmServer.start(Launch(**vars(launch) | {"start_seconds": 1.0}), tmp_path, 5.0)


def test_the_run_ends_its_server_and_what_the_server_started(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    code = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(marks)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)
"""
    child = Child(package(tmp_path, code), tmp_path)
    pids = wait_for_pids(marks)
    folder = child.socket.parent
    child._process.send_signal(signal.SIGKILL)  # the server alone; what it started lives
    child.close()
    assert all(is_gone(pid) for pid in pids)
    assert not folder.exists()


def test_a_server_that_has_lost_its_engine_and_waits_for_ever_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 0.05)
    code = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import socket, socketserver

class Handler(BaseHTTPRequestHandler):
    lost = False
    def address_string(self):
        return "here"
    def do_GET(self):
        config = {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
        told = {"/version": {"version": "0"}, "/server_info?config_format=json": config}.get(self.path, {})
        self.send_response(503 if Handler.lost and self.path == "/health" else 200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())
    def do_POST(self):
        Handler.lost = True
        time.sleep(60)

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

Server(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""
    server = VllmServer.start(package(tmp_path, code), tmp_path, 60.0)
    started = time.monotonic()
    with pytest.raises(WorkerError):
        server.load(tmp_path, "run-1")
    assert time.monotonic() - started < 30
    assert server.is_lost()
    server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is Linux's")
def test_a_server_does_not_outlive_a_run_that_was_killed(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    launch = package(tmp_path, f"import os, time; open({str(marks)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    run = f"""
import time
from pathlib import Path
from tether.runtime.vllm_server import Child, Launch
child = Child(Launch({launch.python!r}, "float32", 1, 5.0), Path({str(tmp_path)!r}))
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", run]) as parent:
        pids = wait_for_pids(marks)
        parent.kill()
    assert all(is_gone(pid) for pid in pids)


def wait_for_pids(marks: Path) -> list[int]:
    for _ in range(500):
        if marks.exists() and (text := marks.read_text()):
            return [int(part) for part in text.split()]
        time.sleep(0.05)
    raise AssertionError("the server never started")


def is_gone(pid: int) -> bool:
    """Within five seconds; a zombie is gone."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.05)
    return False


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        ({"vllm": {"address": "http://h:1", "python": "p"}}, "address names a server that runs already"),
        ({"vllm": {"address": "http://h:1", "place": "process"}}, "address names a server that runs already"),
        ({"vllm": {"place": "process", "options": ["--x"]}}, "place is process, where options has no meaning"),
        ({"staleness": 1}, "staleness is 1 and writer own"),
        ({"staleness": 1, "writer": "vllm", "overlap": True}, "staleness is 1 with overlap"),
    ],
)
def test_knobs_that_do_not_go_together_are_refused(runtime: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_settings({"world": "nano", "runtime": runtime})


def test_nothing_of_vllm_is_imported_unless_it_is_asked_for() -> None:
    code = "import sys, tether.session; sys.exit(any('vllm' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert RunSettings().runtime.writer == "own"
