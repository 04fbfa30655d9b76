# make demo · make test · make lint · make notes · make notes-long · make mistakes · make bench · make bench-gpu · make soak
# PYTHON=python3.12 make demo picks another Python.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
BASE := results/base_model
FINETUNED := results/checkpoints/finetuned_model

.PHONY: demo test soak notes notes-long mistakes bench bench-gpu lint clean

demo: $(READY)
	$(BIN)/python prepare_data.py --model-name $(BASE)
	$(BIN)/python finetune_generative.py --learning-rate 3e-4
	$(BIN)/python generate_text.py
	@echo
	@echo "Worth opening:"
	@echo "  $(FINETUNED)/report.html      what changed: verdict, texts side by side, scores"
	@echo "  $(FINETUNED)/quiz.html        the author or the model? a blind test for you"
	@echo "  $(FINETUNED)/loss_curve.png   how the validation loss fell"
	@echo "  $(FINETUNED)/all_results.json the numbers"
	@echo "  results/data/book.txt         the book itself"

# More processes than cores: many tests wait for the disk or for a child.
test: $(READY)
	$(BIN)/python -m pytest -n 4 --dist worksteal

# Many hours, in parts of a quarter of an hour at the lowest priority: the tests with large counts, every guard removed
# in turn, the classic mistakes, small changes everywhere. May be stopped at any time; the same command resumes.
soak: $(READY)
	$(BIN)/python -m benchmarks.soak

# About four minutes on 2 cores: runs the demo in a folder of its own and fills its figures into README and notes.
notes: $(READY)
	$(BIN)/python -m benchmarks.notes

# An hour or two: the longer experiments. BOOKS=folder has a_christmas_carol.txt and tinyshakespeare.txt.
notes-long: $(READY)
	$(BIN)/python -m benchmarks.notes books rates decodings lora long ladder scale --books $(BOOKS)

# About five minutes on 2 cores; fills the table of notes/06_classic_mistakes.md.
mistakes: $(READY)
	$(BIN)/python -m benchmarks.mistakes

# Installs the tools that are compared with, beside the product. About an hour on 2 cores.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.run

# On a machine with an NVIDIA GPU and a PyTorch for it; PYTHON names the Python that has both. About five minutes.
bench-gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m benchmarks.gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The mark is written last: an interrupted installation is repeated.
$(READY): requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

clean:
	rm -rf .venv results/data/blocks results/checkpoints
