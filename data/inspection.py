"""What ``eagle3 inspect STORE`` prints: what the store was made from, what it holds, and with --verify whether it is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..configs.errors import Incomplete
from .store import Store


def inspect(path: Path, verify: bool) -> str:
    """Describe the store at ``path`` (or in the run at ``path``).

    Raises:
        UserError: there is no finished store.
        Incomplete: ``verify`` was asked for and a file is missing, foreign or not what was recorded.
    """
    store = Store(path / "store" if (path / "store").is_dir() else path)
    manifest, target = store.manifest, store.manifest.target
    size = sum(entry.bytes for entry in manifest.shards)
    lines = [
        f"store        {store.path}",
        f"target       {target['name']} {target['revision'] or ''}".rstrip(),
        f"weights      sha256 {target['weights_sha256']}",
        f"ran in       {target['dtype']}; stored as {manifest.dtypes['features']}; last hidden state {manifest.last_hidden}",
        f"layers       {target['layers']} of {target['num_layers']}, width {target['hidden_size']}",
        f"holds        {manifest.samples:,} samples, {manifest.tokens:,} tokens, {manifest.supervised_tokens:,} of them answers",
        f"size         {size:,} bytes in {len(manifest.shards)} shards, {size / manifest.tokens:,.0f} a token",
    ]
    samples: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str]] = Counter()
    for index in range(len(store)):
        sample = store[index]
        samples[sample.split, sample.source] += 1
        tokens[sample.split, sample.source] += int(sample.loss_mask.sum())
    width = max(len(source) for _, source in samples)
    lines += ["", f"{'split':<12}{'source':<{width + 2}}{'samples':>10}{'answer tokens':>16}"]
    for (split, source), count in sorted(samples.items()):
        lines.append(f"{split:<12}{source:<{width + 2}}{count:>10,}{tokens[split, source]:>16,}")
    if verify:
        problems = store.verify()
        if problems:
            raise Incomplete(f"{store.path}: {'; '.join(problems)}")
        lines += ["", "every checksum holds"]
    return "\n".join(lines)
