# make demo: a session packed, checked, unpacked and resumed. make test: style, types, the whole
# test suite, and how much of the code it ran: the files below 80 % and the total.
# Both set up .venv first; PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-out
MODEL := samples/model/reference-llama-6m-f16.gguf
PIP := CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(BIN)/pip install -q -c constraints.txt

.PHONY: demo test clean

demo: $(VENV)/.demo
	rm -rf $(OUT) && mkdir $(OUT)
	$(BIN)/tsc pack samples/session.kv --model $(MODEL) -o $(OUT)/session.tsc
	$(BIN)/tsc info $(OUT)/session.tsc
	$(BIN)/tsc verify $(OUT)/session.tsc
	$(BIN)/tsc unpack $(OUT)/session.tsc -o $(OUT)/session.kv
	cmp samples/session.kv $(OUT)/session.kv && echo "identical to samples/session.kv"
	$(BIN)/tsc resume $(OUT)/session.tsc --model $(MODEL) --prompt " We must" -n 48

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --cov-report=
	$(BIN)/coverage report --sort=cover | awk 'NR == 1 || /^TOTAL/ || $$NF + 0 < 80 && /%$$/'

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[llama]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[llama,hf,plot,test]'
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
