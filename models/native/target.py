"""The native target: what a recorder and a verifier call.

    target.prefill(packed_ids, lengths)                 # [N], documents back to back -> states of all of them
    cache = target.new_cache(700)
    target.forward(prompt_ids, cache)                   # [T]
    target.forward(drafted_ids, cache)                  # one after the other
    cache.rollback(length)
    target.forward(node_ids, cache, ancestors)          # a tree; then
    cache.keep(path)

Shapes: T tokens, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..target import TargetOutput
from ..target_info import TargetHead, TargetInfo, TargetText
from .cache import Cache
from .decoder import Decoder
from .sights import branching, following, packed


class NativeTarget:
    """A decoder with its tokenizer, frozen.

    Where several processes hold it together, all of them call its methods with the same arguments, and all get everything
    that one alone would, but for the values of ``head.lm_head``, which are there only if it is the embedding or if the
    decoder has it whole. Logits of a whole one are computed by whoever asks, without the others.

    Args:
        decoder: it captures the layers that ``info`` names.
        info: what the target is.
        tokenizer: its tokenizer.
    """

    def __init__(self, decoder: Decoder, info: TargetInfo, tokenizer: PreTrainedTokenizerBase) -> None:
        self.decoder, self.info, self.tokenizer = decoder, info, tokenizer
        weights, config = decoder.weights, decoder.config
        self.group, lm_head = decoder.group, weights.lm_head
        self._dealt = config.share.size > 1 and not config.whole_head
        own = lm_head[config.share.of(config.vocab_size)] if config.tied and self._dealt else lm_head
        self._head_HV = own.t()
        decoder.operations.prepare([self._head_HV])
        if self._dealt and not config.tied:
            # Nobody has all of it, and who needs its values (to store or to copy them) shall not take a part for the
            # whole: this has the shape, and raises where it is read.
            lm_head = torch.empty_like(weights.embedding, device="meta")
        self.head = TargetHead(weights.embedding, weights.norm, config.rms_norm_eps, lm_head)
        self.text = TargetText(tokenizer, info.eos_ids, info.max_positions)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._chunks = config.chunks

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache, ancestors: Tensor | None = None) -> TargetOutput:
        """Run over tokens ``ids`` ``[T]`` that continue what is in ``cache``, and are added to it.

        Args:
            ids: one after the other; or the nodes of a tree.
            cache: of which :meth:`Cache.rollback` takes tokens back, and :meth:`Cache.keep` takes a path of a tree in.
            ancestors: of a tree, bool ``[T, T]``: row i is true for the ancestors of node i and for itself. No node
                stands before its parent.

        Returns:
            ``last_hidden`` ``[T, H]`` and ``features`` ``[T, F, H]``.

        Raises:
            ValueError: they do not fit the cache, or a tree is still to be settled there.
        """
        if ancestors is None:
            step = following(cache, len(ids), self._chunks, self.dtype)
        else:
            step = branching(cache, ancestors, self._chunks, self.dtype)
        return TargetOutput(*self.decoder.forward(ids.to(self.device), step, cache))

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Sequence[int]) -> TargetOutput:
        """Run over documents of ``lengths`` tokens, 1 or more each, back to back in ``ids`` ``[T]``, without a cache.

        Each starts at position 0 and sees nothing of the others.

        Returns:
            ``last_hidden`` ``[T, H]`` and ``features`` ``[T, F, H]``.
        """
        return TargetOutput(*self.decoder.forward(ids.to(self.device), packed(lengths, self._chunks, self.device)))

    def logits(self, last_hidden: Tensor) -> Tensor:
        """``[..., H]`` after the final norm to ``[..., V]``."""
        rows = last_hidden.flatten(0, -2) if last_hidden.ndim > 1 else last_hidden[None]
        logits = self.decoder.operations.linear(rows, self._head_HV).view(*last_hidden.shape[:-1], -1)
        return self.group.gather(logits) if self.group is not None and self._dealt else logits

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of at most ``capacity`` tokens; its memory is taken now."""
        return Cache(self.decoder.config, capacity, self.head.embedding)
