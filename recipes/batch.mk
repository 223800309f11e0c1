# The commands of a recipe as a batch job: every stage's manifest is a target, so that a job that was stopped goes on where
# it was, and one that is done has nothing to do.
#
#     make -f recipes/batch.mk RECIPE=recipes/llama2-7b.yaml RUN=runs/llama2-7b
#
# RECIPE: the recipe. RUN: its output.dir. LBLLM: the command.
LBLLM ?= lbllm
ifndef RECIPE
$(error RECIPE is not set: make -f recipes/batch.mk RECIPE=recipe.yaml RUN=its-output-dir)
endif
ifndef RUN
$(error RUN is not set: give the recipe's output.dir)
endif

.PHONY: all
.DELETE_ON_ERROR:
all: $(RUN)/report.html $(RUN)/export/lbllm_export.json

$(RUN)/ptq/lbllm_stage.json: $(RECIPE)
	$(LBLLM) ptq --recipe $(RECIPE)

$(RUN)/distill/lbllm_stage.json: $(RUN)/ptq/lbllm_stage.json
	$(LBLLM) distill --recipe $(RECIPE)

# The command before is run once more: it finishes an end-to-end phase that was stopped, and otherwise has nothing to do.
$(RUN)/act-calib/lbllm_stage.json: $(RUN)/distill/lbllm_stage.json
	$(LBLLM) distill --recipe $(RECIPE)
	$(LBLLM) act-calib --recipe $(RECIPE)

$(RUN)/eval/results.json: $(RUN)/act-calib/lbllm_stage.json
	$(LBLLM) act-calib --recipe $(RECIPE)
	$(LBLLM) eval --recipe $(RECIPE)

$(RUN)/report.html: $(RUN)/eval/results.json
	$(LBLLM) report --recipe $(RECIPE)

$(RUN)/export/lbllm_export.json: $(RUN)/act-calib/lbllm_stage.json
	$(LBLLM) export --recipe $(RECIPE)
