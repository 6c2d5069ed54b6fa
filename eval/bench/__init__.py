"""What decoding costs, side by side in one run.

    python -m eagle3.eval.bench.decoding     # the native engine beside transformers, chains beside trees

``former`` is drafting as it was before the native engine; ``inside`` times the parts of a round.
"""
