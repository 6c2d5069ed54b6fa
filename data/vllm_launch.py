"""How vLLM servers are started that capture what a recipe asks for.

    python -m eagle3.data.vllm_launch maverick record.server_gpus=8     # prints the command

Ask for it when the answers are there: they say how long the longest conversation is.

vLLM numbers layers by their input: its id i + 1 is our layer i, and its id N, for N layers, is what enters the final
norm. A server does not say which layers it captures. So it is started under a name that does, and the recorder refuses
another one.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..configs.entry import finish
from ..configs.errors import UserError
from ..configs.loader import load
from ..configs.settings import Settings
from ..models.target import TargetText, load_text, location
from ..models.target_files import layers_of
from .answers import ANSWERS, SUMMARY, each_answer
from .chat import PLACEHOLDER, continuation, prompt_ids
from .conversations import Conversation, read_conversations

CONNECTOR = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}


def layer_ids(layers: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's ids of ``layers`` and of the last hidden state, ascending."""
    return sorted({layer + 1 for layer in layers} | {num_layers})


def served_name(settings: Settings, ids: Sequence[int]) -> str:
    """The name under which the target is served where these ids are captured."""
    return f"{settings.target.path}@{'-'.join(map(str, ids))}"


def longest_conversation(settings: Settings, text: TargetText) -> int:
    """Tokens of the run's longest conversation: as it is where all are answered, else as the recipe allows.

    A recipe limits the prompt and each turn of the target. How many turns there are, and what the template writes between
    them, the chosen prompts say; while there are none, a conversation is taken to have one turn. The target's positions
    limit all of it.
    """
    folder = Path(settings.run.root) / settings.run.name / "conversations"
    if (folder / SUMMARY).exists():
        return max(len(answer.ids) for answer in each_answer(folder / ANSWERS))
    prompts, most = folder / "prompts.jsonl", settings.regenerate.max_new_tokens
    talks = [talk for talk in read_conversations(prompts) if talk.follow_ups] if prompts.exists() else []
    one_turn = settings.prepare.max_prompt_tokens + most
    return min(text.max_positions, max([one_turn, *(_longest(talk, text.tokenizer, most) for talk in talks)]))


def _longest(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, most: int) -> int:
    """Tokens of one conversation each of whose answers has ``most``."""
    tokens, said = len(prompt_ids(tokenizer, conversation)) + most, list[str]()
    for follow_up in conversation.follow_ups:
        said.append(PLACEHOLDER)
        between = continuation(tokenizer, conversation, said, follow_up)
        if between is None:  # it is not asked on
            break
        tokens += len(between) + most
    return tokens


def launch_command(settings: Settings, layers: Sequence[int], num_layers: int, text: TargetText) -> list[str]:
    """The command that starts one server for this recipe; a port and the like may be added to it.

    Prefix caching is off, because states of cached tokens may be missing, and prefill is not cut into chunks.
    """
    target, record, ids = settings.target, settings.record, layer_ids(layers, num_layers)
    longest = min(longest_conversation(settings, text) + 1, text.max_positions)  # it must say a token itself
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
    print(shlex.join(launch_command(settings, *layers_of(settings.target), load_text(settings.target))))


if __name__ == "__main__":
    sys.exit(finish(main))
