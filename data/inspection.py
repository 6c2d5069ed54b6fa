"""What ``eagle3 inspect STORE`` prints: what it was made from, what it holds, and with --verify whether it is whole."""

from __future__ import annotations

from pathlib import Path

from ..configs.errors import Incomplete
from .store import Manifest, Store

VOCABULARY_SHARES = (16, 8, 4, 2)  # draft vocabularies that are shown, as parts of the target's


def inspect(path: Path, verify: bool) -> str:
    """Describe the store at ``path`` (or in the run at ``path``).

    Raises:
        UserError: there is no finished store, or a look at it already shows damage.
        Incomplete: ``verify`` was asked for and a file is missing, foreign or not what was recorded.
    """
    store = Store(path / "store" if (path / "store").is_dir() else path)
    lines = [f"store        {store.path}", *_facts(store.manifest), "", *_samples(store), "", *_coverage(store)]
    if verify:
        problems = store.verify()
        if problems:
            raise Incomplete(f"{store.path}: {'; '.join(problems)}")
        lines += ["", "every checksum holds"]
    return "\n".join(lines)


def _facts(manifest: Manifest) -> list[str]:
    target, shards = manifest.target, manifest.shards
    size = sum(entry.bytes for entry in shards)
    held = f"{manifest.samples:,} samples, {manifest.tokens:,} tokens, {manifest.supervised_tokens:,} of them answers"
    agreeing = 1 - manifest.disagreeing / max(1, manifest.greedy_tokens)
    return [
        f"target       {target['name']} {target['revision'] or ''}".rstrip(),
        f"weights      sha256 {target['weights_sha256']}",
        f"tokenizer    sha256 {manifest.tokenizer_sha256}, chat template {manifest.chat_template_sha256}",
        f"ran in       {target['dtype']}, stored as {_stored(manifest)}",
        f"layers       {target['layers']} of {target['num_layers']}, width {target['hidden_size']}",
        f"last hidden  {manifest.last_hidden}",
        f"holds        {held}",
        f"size         {size:,} bytes in {len(shards)} shards, {size / max(1, manifest.tokens):,.0f} a token",
        f"agreement    {agreeing:.3%} of {manifest.greedy_tokens:,} greedy tokens are what the states predict",
    ]


def _stored(manifest: Manifest) -> str:
    """How the states are stored: one dtype, or that of each."""
    features, last_hidden = manifest.dtypes["features"], manifest.dtypes["last_hidden"]
    return features if features == last_hidden else f"{features} (features) and {last_hidden} (last hidden)"


def _samples(store: Store) -> list[str]:
    """Samples and answer tokens by split and source."""
    index = store.index
    groups = index.split.long() * len(index.sources) + index.source
    count = len(index.splits) * len(index.sources)
    samples, tokens = groups.bincount(minlength=count), groups.bincount(index.supervised.double(), minlength=count)
    names = [(split, source) for split in index.splits for source in index.sources]
    width = max((len(source) for source in index.sources), default=0) + 2
    head = f"{'split':<12}{'source':<{width}}{'samples':>10}{'answer tokens':>16}"
    rows = [
        f"{split:<12}{source:<{width}}{held:>10,}{int(said):>16,}"
        for (split, source), held, said in zip(names, samples.tolist(), tokens.tolist(), strict=True)
        if held
    ]
    return [head, *sorted(rows)]


def _coverage(store: Store) -> list[str]:
    """What share of each source's training answers draft vocabularies of several sizes can say."""
    sizes = [store.manifest.target["vocab_size"] // part for part in VOCABULARY_SHARES]
    coverage = {size: store.draft_vocabulary(size).coverage for size in sizes if size}
    sources = sorted({source for shares in coverage.values() for source in shares})
    width = max((len(source) for source in sources), default=0) + 2
    title = "draft vocabulary covers"
    lines = [f"{title:<{width + 12}}" + "".join(f"{f'D={size:,}':>12}" for size in coverage)]
    for source in sources:
        lines.append(f"{'':<12}{source:<{width}}" + "".join(f"{shares[source]:>12.1%}" for shares in coverage.values()))
    return lines
