# Every target is a command of `python -m common`; where there is no make, type that instead.
# Variables travel in the environment, not spliced into a shell line, so any text survives, quotes, $ and all:
#     make run PROMPT='Why does "the" cost $5?'

PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)

VARIABLES := MODEL PROMPT MINE TP PP QUANT GROUP KV OFFLOAD SPEC OUT SOLUTION VERBOSE PDB LEVEL FILE THREADS TORCH MINUTES SEED JOBS LESSONS FORCE FROM SUBMISSIONS
$(foreach name,$(VARIABLES),$(eval override $(name) := $$(value $(name))))
export $(VARIABLES)

TARGETS := help setup run chat test test-all progress update skeletons release notebooks test-notebooks figures lint check \
	grade mutate bench quantize soak book lab clean
.PHONY: $(TARGETS) always
.DEFAULT_GOAL := help

$(TARGETS):
	@$(PYTHON) -m common $@

test-lesson-% reset-lesson-% prove-lesson-% mutate-lesson-% watch-lesson-% diff-lesson-% test-% diff-% hint-%: always
	@$(PYTHON) -m common $@

always:
