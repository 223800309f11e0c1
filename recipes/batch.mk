# The stages of a recipe as a batch job: every stage's manifest is a target, so that a job that was stopped goes on where it was,
# and one that is done has nothing to do.
#
#     make -f recipes/batch.mk RECIPE=recipes/llama2-7b.yaml RUN=runs/llama2-7b
#
# RECIPE: the recipe. RUN: its output.dir. KEYS: overrides, given to every command. LBLLM: the command. RANKS: the command that
# several processes do together, for example RANKS="torchrun --nproc-per-node 8 -m lbllm_cli"; a step has a sequence for each of them at
# least: KEYS="distill.batch_size=8 act_calib.batch_size=8".
LBLLM ?= lbllm
RANKS ?= $(LBLLM)
ifndef RECIPE
$(error RECIPE is not set: make -f recipes/batch.mk RECIPE=recipe.yaml RUN=its-output-dir)
endif
ifndef RUN
$(error RUN is not set: give the recipe's output.dir)
endif

# One word a stage, `name,command,--only,phase`: its name, and the arguments that make it and no other.
STAGES := $(shell $(LBLLM) config --stages --recipe $(RECIPE) $(KEYS) | sed 's/\t.*\tlbllm / /; s/ /,/g')
ifeq ($(STAGES),)
$(error lbllm config --stages gives no stages of $(RECIPE))
endif
comma := ,
fields = $(subst $(comma), ,$(1))
name = $(firstword $(call fields,$(1)))
command = $(wordlist 2,9,$(call fields,$(1)))
manifest = $(RUN)/$(call name,$(1))/lbllm_stage.json

.PHONY: all
# Every file is whole once it has its name. Make would delete that of a command which fails, or is stopped, between that and its end:
# with a manifest it would take a finished stage.
.PRECIOUS: $(foreach word,$(STAGES),$(call manifest,$(word))) $(RUN)/eval/results.json $(RUN)/report.html $(RUN)/export/lbllm_export.json
all: $(RUN)/report.html $(RUN)/export/lbllm_export.json

# The stages follow each other: two at once would wait for the output folder's lock.
before := $(RECIPE)
define stage
$(call manifest,$(1)): $(before)
	$(RANKS) $(call command,$(1)) --recipe $(RECIPE) $(KEYS)
before := $(call manifest,$(1))
endef
$(foreach word,$(STAGES),$(eval $(call stage,$(word))))

# Where a prediction is no number it writes what else was measured, and fails: an old file, which is made again.
$(RUN)/eval/results.json: $(before)
	$(RANKS) eval --recipe $(RECIPE) $(KEYS) || { code=$$?; touch -c -t 200001010000 $@; exit $$code; }

$(RUN)/report.html: $(RUN)/eval/results.json
	$(LBLLM) report --recipe $(RECIPE) $(KEYS)

$(RUN)/export/lbllm_export.json: $(before)
	$(LBLLM) export --recipe $(RECIPE) $(KEYS)
