"""What lies in an output folder: names, and what each folder that is replaced or deleted as a whole may hold."""

from lbllm_cli.core.own_folders import Kind
from lbllm_cli.recipe.stages import BASE, STAGES

_TEACHER_FILES = r"(states|writing|entering_\d+)\.bin|(unfinished|lbllm_teacher)\.json|\.lock"
# What lbllm keeps of a teacher: in a folder that the recipe names, or among a stage's streams.
TEACHER = Kind("a teacher's states", _TEACHER_FILES, r"(unfinished|lbllm_teacher)\.json|writing\.bin")
_RANKS = {r"rank\d{3,}of\d{3,}": TEACHER}
# That a recipe names: runs of one process and of several keep states side by side there.
NAMED_TEACHER = Kind(TEACHER.name, _TEACHER_FILES, rf"{TEACHER.telling}|rank\d{{3,}}of\d{{3,}}", _RANKS)
# Of several ranks each has streams, states and unfinished training of its own.
STREAMS = Kind(
    "hidden states", rf"(unfinished_)?(full|quantized)_\d+(\.rank\d{{3,}})?\.bin|{_TEACHER_FILES}",
    folders=_RANKS,
)  # fmt: skip
_STAGE_FILES = (
    r"block_\d{3,}\.safetensors|outer\.safetensors|training(\.\d{3,})?(\.next)?\.safetensors|lbllm_stage\.json|progress\.json"
    r"|events\.jsonl|recipe\.resolved\.yaml|environment\.json|loss\.png"
)
STAGE = Kind("a stage", _STAGE_FILES, r"block_\d{3,}\.safetensors|lbllm_stage\.json", {"streams": STREAMS})
UNFINISHED_STAGE = Kind("an unfinished stage", _STAGE_FILES, f"{STAGE.telling}|progress\\.json", STAGE.folders)
_EXPORT_FILES = (
    r"lbllm_export\.json|README\.md|model(-\d{5,}-of-\d{5,})?\.safetensors|part-\d{5,}|model\.safetensors\.index\.json"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|vocab\.txt|merges\.txt"
    r"|model\.gguf|[^/]*\.model|tokenization_[^/]*\.py|(chat_template|LICENSE|NOTICE|USE_POLICY)[^/]*"
)
_TEMPLATES = Kind("chat templates", r"[^/]*\.jinja")
EXPORT_FOLDER = Kind("an export", _EXPORT_FILES, r"lbllm_export\.json", {"additional_chat_templates": _TEMPLATES})
EVAL_STREAMS = Kind("hidden states", rf"[A-Za-z0-9._-]+\.({'|'.join((BASE, *STAGES))})(\.rank\d{{3,}})?\.bin")
