"""How vLLM servers are started that capture what a recipe asks for.

    python -m eagle3.data.vllm_launch maverick record.server_gpus=8     # prints the command

vLLM numbers layers by their input: its id i + 1 is our layer i, and its id N, for N layers, is what enters the final
norm. A server does not say which layers it captures. So it is started under a name that does, and the recorder refuses
another one.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

from ..configs.entry import finish
from ..configs.errors import UserError
from ..configs.loader import load
from ..configs.settings import Settings
from ..models.target import location
from ..models.target_files import layers_of

CONNECTOR = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}


def layer_ids(layers: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's ids of ``layers`` and of the last hidden state, ascending."""
    return sorted({layer + 1 for layer in layers} | {num_layers})


def served_name(settings: Settings, ids: Sequence[int]) -> str:
    """The name under which the target is served where these ids are captured."""
    return f"{settings.target.path}@{'-'.join(map(str, ids))}"


def launch_command(settings: Settings, layers: Sequence[int], num_layers: int) -> list[str]:
    """The command that starts one server for this recipe; a port and the like may be added to it.

    Prefix caching is off, because states of cached tokens may be missing, and prefill is not cut into chunks.
    """
    target, record, ids = settings.target, settings.record, layer_ids(layers, num_layers)
    longest = settings.prepare.max_prompt_tokens + settings.regenerate.max_new_tokens + 1  # it must say a token itself
    capture = {"draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}}}
    handover = {"kv_connector_extra_config": {"shared_storage_path": record.states_folder}}
    command = ["vllm", "serve", location(target.path), "--served-model-name", served_name(settings, ids)]
    if target.revision is not None:
        command += ["--revision", target.revision]
    return [
        *command, "--dtype", target.dtype, "--tensor-parallel-size", str(record.server_gpus),
        "--max-model-len", str(longest), "--max-num-batched-tokens", str(max(longest, record.batch_tokens)),
        "--no-enable-prefix-caching", "--no-enable-chunked-prefill",
        "--speculative-config", _json({"method": "extract_hidden_states", "num_speculative_tokens": 1, **capture}),
        "--kv-transfer-config", _json({**CONNECTOR, **handover}),
    ]  # fmt: skip


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    """Print the command for what the command line names, as a shell takes it."""
    recipe, *overrides = sys.argv[1:] or [""]
    if not recipe or recipe.startswith("-"):
        raise UserError("recipe", recipe or "(none)", "there is no recipe", "write CONFIG [section.name=value ...]")
    settings = load(recipe, overrides)
    print(shlex.join(launch_command(settings, *layers_of(settings.target))))


if __name__ == "__main__":
    sys.exit(finish(main))
