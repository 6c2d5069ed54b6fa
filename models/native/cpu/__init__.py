"""Products of a few rows on one CPU core, compiled for the machine: what decoding a small target spends its time on.

    operations = make_operations(config, device, torch.float32)     # compiled where that can be had
    operations.prepare([weights.qkv, weights.mlp])                                # packed, and timed beside plain torch
    operations.linear(x, weights.qkv)                                             # whichever was faster for so many rows

``products.cpp`` is the source, ``compiler`` compiles and loads it, ``operations`` chooses by measurement, shape by shape.
Without a C++ compiler everything is computed in plain torch, which is the reference, and :func:`describe` says so.
"""
