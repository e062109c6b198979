# make quickstart   from a fresh clone to a bridge that chats (CHAT=0 stops before the chat)
# make test         all tests, on every core
# make soak         kills, torn files, full disks, thousands of steps (docs/reliability.md)
# make lint         ruff, as the checks run it
# make venv         .venv with everything, the mmpeft command included

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
CHAT ?= 1

.PHONY: venv test soak lint quickstart
venv: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -e ".[all,dev]"
	touch $@

test: venv
	$(BIN)/python -m pytest -n logical --dist worksteal

soak: venv  # files that make test does not collect; one thread, since children are forked
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -s tests/soak/kills.py tests/soak/faults.py tests/soak/long.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --examples 100000

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# $(call step,name,command): run it and print how long it took
define step
	@echo; echo "== $(1)"; began=$$(date +%s); \
	$(2) && echo "== $(1): $$(( $$(date +%s) - began )) s"
endef

quickstart: venv
	$(call step,starter models and data,$(BIN)/mmpeft starter smollm2-135m-instruct efficientnet-lite0 easy-vqa photographs)
	$(call step,train,$(BIN)/mmpeft train configs/quickstart.yaml $$(test ! -d $(RUN) || echo --resume))
	$(call step,eval,$(BIN)/mmpeft eval $(RUN) --task easy_vqa)
	$(call step,retain,$(BIN)/mmpeft retain $(RUN))
	@echo; echo "In $(RUN): checkpoint/ (connector + adapter), loss.png, eval/, retain/, config.yaml"
	@echo "Try next:"
	@echo "  $(BIN)/mmpeft ask $(RUN) --image PICTURE 'what shape is in the image?'"
	@echo "  $(BIN)/mmpeft train configs/quickstart.yaml --output_dir runs/none --model.gate none"
	@echo "  $(BIN)/mmpeft chat $(RUN)"
ifneq ($(CHAT),0)
	$(BIN)/mmpeft chat $(RUN)
endif
