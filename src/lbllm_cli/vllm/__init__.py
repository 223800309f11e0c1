"""vLLM plugin: packed exports in vLLM, which finds it by its entry point wherever lbllm-cli is installed.

`--additional-config '{"lbllm_activations": "full"}'` leaves activations, keys and values in full precision;
`{"lbllm_cache": "codes"}` keeps keys and values as codes.
"""


def register() -> None:
    """Makes the packed format known. vLLM calls it in each of its processes, whatever model they serve."""
    import lbllm_cli.vllm.config  # noqa: F401 - registers itself as it is imported
