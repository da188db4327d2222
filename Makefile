# flanctl: `make` alone prints this help.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
NATIVE := $(shell find native -name '*.rs' -o -name '*.[ch]' -o -name 'Cargo.toml' -o -name 'Cargo.lock' | grep -v /target/)
REQUIRE ?=
# Tests wait more than they work: two at a time end in little more than half the time. A file's tests stay together.
JOBS ?= 2
# Tests that load BPF programs need root; without it cargo lists them as ignored.
BPF_TESTS := $(if $(filter 0,$(shell id -u)),-- --include-ignored)
PYTEST := $(PY) -m pytest $(if $(REQUIRE),--require $(REQUIRE))

.PHONY: help
help: ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Two hosts on this machine, the whole story in a minute (root)
	@scripts/need demo
	@$(VENV)/bin/flanctl demo $(ARGS)

.PHONY: test
test: setup ## All tests: unit, contract, netns, e2e, cargo (root for the last ones)
	@scripts/need test
	@$(PY) -m tests.support.etcd || echo "etcd 3.7 could not be built; its tests will say so"
	@$(PY) -m tests.support.dockerd_build || echo "the newest dockerd could not be built; its tests will say so"
	cd native && cargo test --quiet --workspace --locked $(BPF_TESTS)
	$(PYTEST) -n $(JOBS) --dist loadfile $(ARGS)

# The tests that start flanctl as a process, told by FLANCTL_EXE which file that is, and those of the file itself.
FROZEN := tests/frozen tests/packages tests/systemd packaging/tests tests/unit/test_entry.py tests/unit/commands tests/unit/compat \
	tests/netns tests/e2e
FLANCTL_EXE ?= $(CURDIR)/dist/flanctl

.PHONY: test-frozen
test-frozen: setup ## Commands, netns, e2e and the demo against dist/flanctl (root); ARGS="-m smoke" in a minute
	@scripts/need test
	FLANCTL_EXE=$(FLANCTL_EXE) $(PY) -m pytest --require $(or $(REQUIRE),frozen) $(FROZEN) $(ARGS)

.PHONY: soak
soak: setup ## An hour of agents from dist/flanctl under traffic: memory and descriptors stay flat (root; SECONDS=…)
	@scripts/need test
	FLANCTL_SOAK_SECONDS=$(or $(SECONDS),3600) FLANCTL_EXE=$(FLANCTL_EXE) $(PY) -m pytest --require frozen tests/frozen/test_soak.py -m soak $(ARGS)

.PHONY: drills
drills: setup ## etcd members die, hang, lose quorum and data at full length (root, an hour); renews docs/drills.md
	@scripts/need test
	@$(PY) -m tests.support.etcd
	$(PYTEST) tests/drills -m drill $(ARGS); status=$$?; $(PY) -m tests.drills.rows; exit $$status

.PHONY: test-unit
test-unit: setup ## Unit and property tests only: no root, seconds
	$(PYTEST) tests/unit

.PHONY: fuzz
fuzz: setup ## Hostile keys, answers and packets, and the lease model deeper: ten minutes each (SECONDS=…)
	FLANCTL_FUZZ_SECONDS=$(or $(SECONDS),600) $(PY) -m pytest tests/unit -m fuzz --timeout 0 -q
	cd native && FLANCTL_FUZZ_SECONDS=$(or $(SECONDS),600) FLANCTL_FUZZ_KEEP=1 cargo test --release --quiet --locked \
		-p dataplane --test fuzz -- --test-threads 1 --nocapture
	FLANCTL_MODEL_STATES=$(or $(STATES),200000) $(PY) -m pytest tests/unit/registry/test_lease_model.py --timeout 0 -q

.PHONY: sanitize
sanitize: ## The data plane's tests, fuzz corpus included, under AddressSanitizer (x86_64 or aarch64)
	cd native && RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --quiet --locked -p dataplane \
		--target "$$(rustc -vV | sed -n 's/^host: //p')" --target-dir target/address

.PHONY: setup
setup: $(VENV)/.native ## .venv with flanctl in it, editable

$(VENV)/bin/pip:
	@scripts/need build
	@rm -rf $(VENV) && $$(scripts/find-python) -m venv $(VENV)

$(VENV)/.deps: requirements/build.txt requirements/dev.txt | $(VENV)/bin/pip
	@echo "installing the locked dependencies"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/build.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes --no-build-isolation -r requirements/dev.txt
	@touch $@

$(VENV)/.native: $(VENV)/.deps $(NATIVE) pyproject.toml
	@scripts/need build
	@echo "building the packet path (Rust)"
	@. $(VENV)/bin/activate && maturin develop --quiet --release --locked -m native/pyext/Cargo.toml
	@$(PY) -m compileall -q $(VENV)/lib flanctl || true
	@touch $@

.PHONY: check
check: setup ## Format, lint, types, import rule, stubs, clippy, rustfmt
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	MYPYPATH=packaging $(VENV)/bin/mypy packaging/packages.py packaging/image.py packaging/describe.py
	MYPYPATH=packaging/freeze $(VENV)/bin/mypy packaging/freeze/*.py
	$(VENV)/bin/lint-imports
	cd native && cargo fmt --all --check
	cd native && cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
# No clippy here: this crate compiles only on what PyOxidizer has written, which is make freeze's work.
	cd packaging/executable && cargo fmt --check && rustfmt --check --edition 2021 --config-path . ../tests/waits.rs

.PHONY: fix
fix: setup ## Repair what tools can repair
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	cd native && cargo fmt --all
	cd packaging/executable && cargo fmt && rustfmt --edition 2021 --config-path . ../tests/waits.rs

.PHONY: reference
reference: setup ## Write docs/reference: commands from their --help, settings from their table
	$(PY) scripts/reference

.PHONY: bench
bench: setup ## Measure side by side in namespaces (root); bench/results/; ARGS="--only ROWS --rounds N"
	@scripts/need bench
	$(PY) -m bench $(ARGS)
	$(PY) -m bench.registry

.PHONY: bench-compare
bench-compare: setup ## The same beside the last committed result, as ratios; ARGS="--only tcp1_bbr,rtt --rounds 3"
	@scripts/need bench
	$(PY) -m bench --compare $(ARGS)

.PHONY: freeze
freeze: setup ## One executable with everything in it: dist/flanctl
	@scripts/need freeze
	@$(PY) packaging/freeze freeze

.PHONY: freeze-twice
freeze-twice: setup ## Build it twice and compare the bytes
	@scripts/need freeze
	@$(PY) packaging/freeze freeze --twice

.PHONY: lock-sources
lock-sources: setup ## Take Debian's newest sources of CPython and its libraries
	@scripts/need freeze
	@$(PY) packaging/freeze lock-sources

.PHONY: packages
packages: setup ## deb, rpm and container image around dist/flanctl (make freeze makes that), with SHA256SUMS
	@scripts/need packages
	@$(PY) packaging/packages.py

.PHONY: lock
lock: ## Renew requirements/*.txt from the .in files (needs the registry)
	scripts/lock

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(VENV) .cache dist native/target .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f flanctl/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
