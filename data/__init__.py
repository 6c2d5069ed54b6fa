"""From prompts to the recorded store.

=================  ======================================================================================
module             what it does
=================  ======================================================================================
``corpus``         questions about Python source, for runs that bring no prompts
``conversations``  prompts and answers on disk
``chat``           the target's own chat format and the loss mask
``prepare``        stage 1: choose the prompts and split them
``regenerate``     stage 2: let the target answer them
``record``         stage 3: run the target over prompt and answer, keep its hidden states
``planning``       which samples share a recording batch and a shard
``recorders``      what computes the states: an interface, and the target through transformers
``checks``         whether recorded states can be the target's
``quantise``       states in FP8 with scales
``shards``         one shard: written, published, mapped
``index``          who the samples of a shard or a store are
``store``          the contract with the trainer: manifest and reader
``vocabulary``     which target tokens the draft may say
``inspection``     what ``eagle3 inspect`` prints
=================  ======================================================================================

Each stage reads files and writes files, can be killed at any moment and started again, and skips what is done.
"""
