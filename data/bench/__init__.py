"""What recording and reading cost beside what they cannot be faster than.

    python -m eagle3.data.bench.recording    # beside the target's forward passes alone
    python -m eagle3.data.bench.experts      # a mixture of experts, by the native decoder beside transformers
    python -m eagle3.data.bench.reading      # beside a plain sequential read of the same bytes

``subjects`` are the targets that are recorded, ``sides`` measures in turn and writes results.
"""
