"""`lbllm export --push`: the export as a repository of the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from lbllm_cli.core.errors import RunError, UsageError, reason

# What an earlier export may have left there under names that this one does not have: a packed one's config.json beside
# model.gguf, or a template that the source has dropped, is loaded. Not LICENSE and its like, which somebody may have added.
_REPLACED = [
    "model*.safetensors", "model.safetensors.index.json", "model.gguf", "lbllm_export.json", "config.json",
    "generation_config.json", "chat_template*", "additional_chat_templates/*", "tokenizer*.json", "tokenization_*.py",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
]  # fmt: skip


def check_push(name: str) -> None:
    """Raises UsageError for what is no name of a repository, where the Hub does not answer, and where it takes no token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push {name}: expected ORG/NAME ({reason(error)})") from None
    if "/" not in name:
        raise UsageError(f"--push {name}: expected ORG/NAME")
    if get_token() is None:
        raise UsageError(f"--push {name}: the Hub needs a token; run: hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        api.whoami()
    except (HTTPError, OSError) as error:  # those of a network are no OSError
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UsageError(f"--push {name}: the Hub does not take this token: {reason(error)}; run: hf auth login") from None
        mend = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise UsageError(f"--push {name}: expected an answer of {api.endpoint}, got: {reason(error)}; {mend}") from None


def push(folder: Path, name: str, private: bool, message: str) -> str:
    """Uploads an export, in one commit; gives its address. private: of a repository that is made now.

    Raises RunError where the Hub refuses, or is gone: the export stays where it is, and files that it has already are not sent
    again.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=_REPLACED)
    except Exception as error:  # the Hub's, the network's and those of threads that send files have no common base
        again = f"{folder} is written; run the same command again"
        because = f" {reason(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else ""
        raise RunError(f"--push {name}: {reason(error)}{because}; {again}") from None
    return str(address)
