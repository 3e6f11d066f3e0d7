# Every target is a command of `python -m common`; where there is no make, type that instead. `make` alone lists them.
# Variables travel in the environment, not spliced into a shell line, so any text survives, quotes, $ and all:
#     make run PROMPT='Why does "the" cost $5?'

PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)

# What was given on make's command line; each command knows which variables it takes.
given := $(foreach name,$(filter-out PYTHON,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(foreach name,$(given),$(eval override $(name) := $$(value $(name))))
COURSE_VARIABLES := $(given)
export COURSE_VARIABLES $(given)

targets := $(or $(MAKECMDGOALS),help)
.PHONY: $(targets)
$(targets):
	@$(PYTHON) -m common $@
