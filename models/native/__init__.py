"""The native decoder: Llama-4 and Llama-3 as few, large operations over memory that is fixed at the start.

    target = load_native(TargetSettings(), capacity=700)      # of loading
    cache = target.new_cache(700)
    target.forward(prompt_ids, cache)                         # [T] -> .last_hidden [T, H], .features [T, F, H]
    target.forward(drafted_ids, cache)                        # verify several tokens ...
    cache.rollback(length)                                    # ... and take back what is rejected
    target.prefill(packed_ids, lengths)                       # documents back to back, without a cache

===============  ==================================================================================
module           what it knows
===============  ==================================================================================
``config``       what a decoder computes, whatever its family
``families``     the families: how each says it, and what its checkpoints call the weights
``weights``      the tensors of a decoder, and where each stored tensor goes
``loading``      checkpoint to device, tensor by tensor
``memory``       what all of it takes, before anything is loaded
``cache``        keys and values; moving a length, keeping a path of a tree
``sights``       which keys the tokens of a forward see: causal, chunked, packed, a tree
``operations``   the arithmetic, in plain torch; faster kernels are chosen by overriding it
``cpu``          products of few rows on a CPU core, compiled, where they were measured faster
``experts``      tokens through the expert that each was routed to
``decoder``      the layers, one after the other
``parallel``     the decoder dealt to several processes, and what these exchange
``target``       the whole: what a recorder and a verifier call
``draft``        the EAGLE-3 head, in the same arithmetic
===============  ==================================================================================
"""
