"""From prompts to the recorded store.

=================  ======================================================================================
module             what it does
=================  ======================================================================================
``corpus``         questions about Python source, for runs that bring no prompts
``conversations``  prompts on disk
``answers``        answers on disk, and what has none
``sources``        rows of files and of the hub
``messages``       the forms of a conversation, and what of one is asked
``prompts``        from rows to conversations, with what was refused
``choice``         choosing in one pass, evenly over the sources
``spill``          conversations set aside on disk while more come by
``chat``           the target's own chat format
``mask``           which tokens of a finished conversation the assistant wrote
``given``          answers that conversations bring with them
``prepare``        stage 1: choose the prompts and split them
``regenerate``     stage 2: let the target answer them, in process or on servers
``questions``      what the target is asked, each made when it is its turn
``dialogue``       one conversation on its way through its turns
``client``         requests to one server, and what there is instead of an answer
``endpoints``      one OpenAI-compatible server, and what its troubles mean
``servers``        several of them, kept busy while some fail, go away and come back
``record``         stage 3: run the target over prompt and answer, keep its hidden states
``recording``      what is missing of a store, shard by shard, the target in one thread and all else in others
``planning``       which samples share a recording batch and a shard
``recorders``      what computes the states: an interface, and the target through transformers
``vllm_recorder``  the states from ``vllm_server`` s; ``vllm_launch`` prints how to start them
``checks``         whether recorded states can be the target's
``quantise``       states in FP8 with scales
``shards``         one shard: written, published, mapped
``mapped``         views of mapped files, brought into memory while others are read
``index``          who the samples of a shard or a store are
``manifest``       what a store was made from and holds, and whether the files are those
``store``          the contract with the trainer, and its reader
``spool``          a store that is read while it is recorded, and never larger than a few shards
``vocabulary``     which target tokens the draft may say
``verification``   whether files are what was written, many read at once
``inspection``     what ``eagle3 inspect`` prints
``plan``           what a run will cost, before it starts; ``plan_table`` prints it, ``units`` its numbers
``plan_tokens``    how many tokens a run has, or will have at most
=================  ======================================================================================

Each stage reads files and writes files, can be killed at any moment and started again, and skips what is done.
"""
