"""Runs in the engine's environment: vLLM's connector for hidden states where there is no CUDA.

vLLM's own copies them through pinned memory on a stream of its own. Here they are in memory already.
"""

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)

# vLLM believes a processor that says it has matrix tiles; in some virtual machines it has not, and bfloat16 dies of it.
torch.cpu._is_amx_tile_supported = lambda: False


class Copied:
    """Stands for the CUDA event of a copy that is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        size, count = self._block_size, len(pending.token_ids)
        slots = torch.tensor(pending.block_ids)[:, None] * size + torch.arange(size)
        states = extract_from_kv_cache(self._kv_cache, slots.flatten(), count)  # indexing copies
        tensors = {"hidden_states": states, "token_ids": pending.token_ids}
        lock = self._lock_fds.pop(pending.req_id)
        self._executor.submit(self._write_tensors, tensors, Copied(), pending.filename, lock)
        self._req_copy_events[pending.req_id] = Copied()
