"""What decoding costs, side by side in one run.

    python -m eagle3.eval.bench.decoding     # the native engine beside transformers, chains beside trees; then timings

``former`` is drafting as it was before the native engine; ``inside`` times the parts of a round within decoding, ``timings``
each of them alone, by thread count and beside busy cores; ``comparison`` prints two results files side by side.
"""
