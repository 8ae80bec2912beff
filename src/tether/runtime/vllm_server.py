"""vLLM's own server as the engine: one that the run starts for itself, or one that listens at an address.

    tokens       POST /inference/v1/generate        token ids in; token ids, log-probabilities, weight versions out
    weights      POST /pause · /collective_rpc reload_weights · /update_weight_version · /resume
    inspection   GET  /weight_info · /version · /server_info

All of these are routes of vLLM itself (those of its reinforcement-learning interface are there in development mode), so
no line of this program runs inside vLLM and its environment need not hold tether: an interpreter of another environment
is enough, which is also what lets vLLM pin other versions than the trainer's. Why the weights are reloaded from
safetensors, in place: the weight-transfer backends that vLLM 0.32 brings carry tensors by NCCL, CUDA IPC or RDMA, none
of which its CPU build has, and all of which want vLLM in the trainer's own environment; the reload is in every build,
goes through shared memory, and ends in the same layer-wise loader. The versions are vLLM's own too: it stamps every
response with the weights that made each of its tokens.

A server that the run starts listens on a socket in a folder of its own, which nobody else may enter, and ends with the
run, however that ends. Read next: `vllm_wire.py`, `vllm_writer.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import ConfigError, MissingExtraError, WorkerError
from tether.runtime.vllm_engine import LOGPROBS, PROVED, Answer, Question, Rule
from tether.runtime.vllm_wire import UNIX, SilentError, Wire, WireError

AT_ONCE = 256
"""Questions in flight; the server batches what has arrived."""
BROKEN = "broken"
"""End of the version of weights that arrived in part."""
LOOK_EVERY_SECONDS = 0.2
QUICK_SECONDS = 30.0
"""For what needs no model."""
ASKED_TO_END_SECONDS = 10.0
ENDS_WITHIN_SECONDS = 20.0
HEALTH_SECONDS = 2.0
"""Between two looks at a server of the run's own."""
INSTALL = "pip install 'tether[vllm]', or name the interpreter of an environment that has it: runtime.vllm.python"
DEVELOPMENT = (
    "start it with VLLM_SERVER_DEV_MODE=1 and `vllm serve MODEL --enable-scale-out --logprobs-mode " + LOGPROBS
)
ERROR, REMARK = re.compile(r"\b\w*Error: "), re.compile(r"\b(INFO|WARNING) ")
"""A line of vLLM's log that ends a traceback, and one that mentions an error in passing."""
PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Launch:
    """How a server of the run's own is started."""

    python: str
    """Interpreter of the environment that vLLM is installed in."""
    dtype: str
    cache_bytes: int
    """For keys and values."""
    start_seconds: float
    """The longest that it may take to come up."""
    options: tuple[str, ...] = ()
    """Further options of `vllm serve`."""

    def command(self, model: Path, socket: Path) -> list[str]:
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--uds", str(socket),
            "--dtype", self.dtype, "--kv-cache-memory-bytes", str(self.cache_bytes), "--max-model-len", "auto",
            "--logprobs-mode", LOGPROBS, "--generation-config", "vllm", "--enable-scale-out", "--tokens-only",
            *self.options,
        ]  # fmt: skip


class VllmServer:
    """An `Engine` behind vLLM's HTTP routes."""

    def __init__(self, wire: Wire, seconds: float, launch: Launch | None = None) -> None:
        """`seconds` is the limit of one response, or one reload; `launch` says how it is started anew."""
        self._wire, self._seconds, self._launch = wire, seconds, launch
        self._child: Child | None = None
        self._version = "of unknown version"
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vllm")

    @staticmethod
    def at(address: str, seconds: float, temperature: float, *, untied: bool = False) -> VllmServer:
        """One that runs already, seen to be fit; `untied`: for a head that is sent beside embeddings it is tied to.

        Raises ConfigError where the address is none, and WorkerError where no fitting server answers there.
        """
        server = VllmServer(Wire(address), seconds)
        server.require_fit(temperature, untied=untied)
        return server

    @staticmethod
    def start(launch: Launch, model: Path, seconds: float) -> VllmServer:
        """One of the run's own. Raises MissingExtraError without vLLM, WorkerError where it does not come up."""
        require_vllm(launch.python)
        server = VllmServer(Wire(f"{UNIX}nowhere"), seconds, launch)
        server.restart(model)
        return server

    def restart(self, model: Path) -> None:
        assert self._launch is not None
        if self._child is not None:
            self._child.close()
        self._child = Child(self._launch, model)
        self._wire = Wire(f"{UNIX}{self._child.socket}")
        try:
            self._wait_until_ready(self._child, self._launch.start_seconds)
            self.require_fit(1.0)
            self._child.end_when(self._has_lost_its_engine)
        except BaseException:
            self.close()
            raise

    def about(self) -> str:
        where = f"at {self._wire.address}" if self._launch is None else "of the run's own"
        return f"vLLM {self._version} {where}"

    def is_lost(self) -> bool:
        """Whether the server of the run's own has ended; one that has lost its engine ends a moment later."""
        return self._child is not None and self._child.has_ended(ENDS_WITHIN_SECONDS)

    def answer(self, questions: Sequence[Question], rule: Rule) -> list[Answer]:
        """One answer a question, all in flight at once, in the questions' order."""
        return list(self._threads.map(lambda question: self._answer(question, rule), questions))

    def _answer(self, question: Question, rule: Rule) -> Answer:
        body = {"token_ids": list(question.prompt), "sampling_params": rule.as_sampling(question.seed)}
        return _read(self._ask("POST", "/inference/v1/generate", body))

    def load(self, folder: Path, version: str) -> None:
        """The rest stands still meanwhile: what is being written ends first, and what was cached is forgotten."""
        self._ask("POST", "/pause?mode=wait")
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._ask("POST", "/collective_rpc", reload)
        except WorkerError as fault:
            self._leave_as_broken(f"{version}-{BROKEN}")
            raise WorkerError(
                f"{fault}; wanted a server that holds this model and sees the weights at {folder}: for one on another "
                "machine, runtime.vllm.folder names a folder that both see"
            ) from fault
        self._ask("POST", "/update_weight_version", {"new_version": version})
        self._ask("POST", "/resume")

    def _leave_as_broken(self, version: str) -> None:
        """Let a server that took a part of the weights answer others again, by a version that is nobody's."""
        with suppress(WorkerError):
            self._ask("POST", "/update_weight_version", {"new_version": version})
            self._ask("POST", "/resume")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            self._child.close()

    def _wait_until_ready(self, child: Child, start_seconds: float) -> None:
        ends = time.monotonic() + start_seconds
        while not self._is_ready():
            child.require_alive()
            if time.monotonic() > ends:
                raise WorkerError(f"vLLM did not come up within {start_seconds:g} s; {child.last_words()}")
            time.sleep(LOOK_EVERY_SECONDS)

    def _has_lost_its_engine(self) -> bool:
        """Whether the server says so, or has stopped to listen; one that is slow has not."""
        try:
            self._wire.ask("GET", "/health", seconds=QUICK_SECONDS)
        except SilentError:
            return False
        except WireError:
            return True
        return False

    def _is_ready(self) -> bool:
        with suppress(WireError):
            self._wire.ask("GET", "/health", seconds=QUICK_SECONDS)
            return True
        return False

    def require_fit(self, temperature: float, *, untied: bool = False) -> None:
        """Raise WorkerError unless the server has the routes, tells what it draws with, and takes a head of its own."""
        try:
            version = self._version = str(self._wire.ask("GET", "/version", seconds=QUICK_SECONDS)["version"])
        except (WireError, KeyError, TypeError) as fault:
            raise WorkerError(f"there is no vLLM server at {self._wire.address}: {fault}") from fault
        try:
            self._wire.ask("GET", "/weight_info", seconds=QUICK_SECONDS)
            told = self._wire.ask("GET", "/server_info?config_format=json", seconds=self._seconds)
        except WireError as fault:
            raise WorkerError(
                f"the vLLM {version} at {self._wire.address} has no weight versions ({fault}); wanted {PROVED} or one "
                f"like it: {DEVELOPMENT}`"
            ) from fault
        try:
            mode, packed = told["vllm_config"]["model_config"]["logprobs_mode"], _packs_tied_head(told["vllm_config"])
        except (KeyError, TypeError, AttributeError) as fault:
            raise WorkerError(f"the vLLM {version} at {self._wire.address} tells of itself in another form than "
                              f"{PROVED}: {fault!r}") from fault  # fmt: skip
        if untied and packed:
            raise WorkerError(
                f"the vLLM at {self._wire.address} runs on a CPU and keeps the head that it packed at its start, and "
                "this policy trains its head; start it with --hf-overrides '{\"tie_word_embeddings\": false}'"
            )
        if mode != LOGPROBS and temperature != 1.0:
            raise WorkerError(
                f"the vLLM at {self._wire.address} tells {mode}, which at temperature {temperature:g} are not those "
                f"that tokens are drawn with; {DEVELOPMENT}`"
            )

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        try:
            return self._wire.ask(method, path, body, self._seconds)
        except WireError as fault:
            hint = f"; {DEVELOPMENT}`" if fault.status in (403, 404) else ""
            if self._child is not None:
                self._child.require_alive()
                hint = f"; {self._child.last_words()}"
            raise WorkerError(f"vLLM did not do what it was asked: {fault}{hint}") from fault


class Child:
    """A server's process, its private folder and its log."""

    def __init__(self, launch: Launch, model: Path) -> None:
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tether-vllm-")
        self.socket = Path(self._folder.name) / "vllm.sock"
        self.log = Path(self._folder.name) / "log.txt"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command(model, self.socket), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=_environment(), start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def end_when(self, is_lost: Callable[[], bool]) -> None:
        """Look now and then, and end the whole group once it is lost.

        A vLLM whose engine has died waits for its connections to close before it ends, and those wait for the engine.
        """

        def watch() -> None:
            while not self._over.wait(HEALTH_SECONDS):
                if is_lost():
                    self._signal(signal.SIGKILL)
                    return

        self._watch = threading.Thread(target=watch, name="vllm-health", daemon=True)
        self._watch.start()

    def require_alive(self) -> None:
        """Raise WorkerError, with its last words, where the process has ended."""
        if (status := self._process.poll()) is not None:
            raise WorkerError(f"vLLM has ended with status {status}; {self.last_words()}")

    def has_ended(self, seconds: float) -> bool:
        """Whether the process has ended, or ends within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def last_words(self) -> str:
        """The last line of the log that names an error, or the last at all; another vLLM knows other options."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if ERROR.search(line) and not REMARK.search(line)]
        last = (errors or lines or ["none"])[-1]
        other = f"; wanted {PROVED} or one like it, and runtime.vllm.options that it knows"
        return f"its last words: {last}{other * ('unrecognized arguments' in last)}"

    def close(self) -> None:
        """Ask it to end, and its whole group with it; end what is left after a while."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()
        for word, seconds in ((signal.SIGTERM, ASKED_TO_END_SECONDS), (signal.SIGKILL, None)):
            if self._signal(word):
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        self._folder.cleanup()

    def _signal(self, word: signal.Signals) -> bool:
        try:
            os.killpg(self._process.pid, word)
        except ProcessLookupError:
            return False
        return True


def require_vllm(python: str) -> None:
    """Raise MissingExtraError where this interpreter has no vLLM, ConfigError where there is no such interpreter."""
    look = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else 3)"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, timeout=QUICK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as fault:
        why = fault.strerror if isinstance(fault, OSError) else f"no answer within {QUICK_SECONDS:g} s"
        raise ConfigError(f"runtime.vllm.python is {python!r}: {why}; wanted an interpreter") from fault
    if done.returncode:
        raise MissingExtraError(f"{python} has no vLLM, which runtime.writer: vllm asks for; {INSTALL}")


def _read(told: Any) -> Answer:
    """A reply of /inference/v1/generate."""
    try:
        choice = told["choices"][0]
        tokens = tuple(int(token) for token in choice["token_ids"])
        entries = choice["logprobs"]["content"]
        if tokens != tuple(entry["token_id"] for entry in entries):
            raise WorkerError("vLLM's log-probabilities are of other tokens than its response")
        logprobs = tuple(float(entry["logprob"]) for entry in entries)
        versions = tuple(span["version"] for span in choice["weight_versions"] or ())
    except (KeyError, IndexError, TypeError) as fault:
        raise WorkerError(f"vLLM's reply has another form than that of {PROVED}: {fault!r}") from fault
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise WorkerError(f"vLLM gave up a response: {reason}")
    return Answer(tokens, logprobs, reason == "stop", versions)


def _packs_tied_head(config: Mapping[str, Any]) -> bool:
    """Whether weights that are sent for the head would not arrive."""
    model, device = config["model_config"], config.get("device_config") or {}
    overrides = model.get("hf_overrides") or {}
    is_untied = overrides.get("tie_word_embeddings") is False or model.get("word_embeddings_untied_by_checkpoint")
    return device.get("device") == "cpu" and not is_untied


def _environment() -> dict[str, str]:
    """That of this process; on a CPU vLLM would bind its threads to cores that the trainer works on."""
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | dict(os.environ) | own


def _end_with_parent() -> None:
    """In the child: be asked to end when the process that started it is gone, even killed."""
    if _LIBC is not None:
        _LIBC.prctl(PARENT_DIES, signal.SIGTERM)
