"""What ``eagle3 inspect STORE`` prints: what it was made from, what it holds, and with --verify whether it is whole.

A store that is not finished is described as far as it is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from ..configs.loader import load
from .answers import ANSWERS, SUMMARY
from .files import file_sha256
from .manifest import MANIFEST, STAGE, Manifest, check_recording, damage, read_manifest
from .shards import PATTERN, Shard, ShardEntry, facts_path, read_entry
from .store import Store
from .verification import differing

VOCABULARY_SHARES = (16, 8, 4, 2)  # draft vocabularies that are shown, as parts of the target's
ALL_SOURCES = "all sources"
NAMED = 3  # files that an error names; the others are counted there, and listed before
WHOLE = "every checksum holds"


def inspect(path: Path, verify: bool) -> Iterator[str]:
    """Describe the store at ``path`` (or in the run at ``path``), line by line.

    Args:
        path: the folder.
        verify: whether to read every byte too.

    Raises:
        UserError: there is no store, or files of it are missing, foreign or damaged, as far as was looked.
    """
    folder = path / "store" if (path / "store").is_dir() else path
    if (folder / STAGE).exists() and not (folder / MANIFEST).exists():
        yield from _unfinished(folder, verify)
        return
    manifest = read_manifest(folder)
    check_recording(folder, manifest)
    problems = damage(folder, manifest, every_byte=False)
    if not problems:
        store = Store(folder)
        yield from (f"store        {folder}", *_facts(manifest), "", *_samples(store), "", *_coverage(store))
    if verify:
        problems = damage(folder, manifest, every_byte=True)
    yield from _refuse(folder, problems, [shard.name for shard in manifest.shards])
    if verify:
        yield from ("", WHOLE)


def _refuse(folder: Path, problems: Mapping[str, str], shards: Sequence[str]) -> Iterator[str]:
    """Raise what is wrong, if anything is, in one line, after those files that it does not name."""
    if not problems:
        return
    wrong = [f"{name}: {problem}" for name, problem in problems.items()]
    if len(wrong) > NAMED:
        yield from wrong
        wrong[NAMED:] = [f"and {len(wrong) - NAMED:,} more files, listed above"]
    whole = f"{len(set(shards) - problems.keys()):,} of {len(shards):,} shards are whole"
    remedy = "delete these files and run eagle3 record again, which keeps what is whole"
    raise UserError("store", folder, f"{whole}, but not {', '.join(wrong)}", remedy)


def _unfinished(folder: Path, verify: bool) -> Iterator[str]:
    """Describe the shards that are there; raises as :func:`inspect` does."""
    shards, problems = dict[str, ShardEntry](), dict[str, str]()
    for path in sorted(folder.glob(PATTERN)):
        try:
            shards[path.name] = read_entry(path)
            problems |= _contradiction(Shard.open(folder, shards[path.name]), shards[path.name])
        except UserError as error:
            problems[path.name] = error.problem
    name = file_sha256(folder / STAGE)
    others = {shard.name: "it is another recording's" for shard in shards.values() if shard.recording != name}
    if others and len(others) == len(shards):  # rather one file is damaged than all the others
        others = {STAGE: "it is not what the shards were recorded with"}
    problems |= others
    whole = [shard for shard in shards.values() if shard.name not in problems]
    yield from (f"store        {folder}, not finished", *_begun(folder, whole))
    if verify:
        problems = differing(folder, shards, shards) | problems
    yield from _refuse(folder, problems, [path.name for path in sorted(folder.glob(PATTERN))])
    recipe = folder.parent / "config.yaml"
    yield from (
        "",
        *([WHOLE] if verify else []),
        f"go on with   eagle3 record {recipe if recipe.exists() else 'CONFIG'}",
    )


def _contradiction(shard: Shard, entry: ShardEntry) -> dict[str, str]:
    """What the facts of a shard that no manifest lists yet say of it, against what it says itself."""
    said, greedy = shard.index.supervised, shard.index.temperature == 0.0
    if (entry.supervised_tokens, entry.greedy_tokens) == (int(said.sum()), int(said[greedy].sum())):
        return {}
    return {entry.name: f"its {facts_path(shard.path).name} is damaged"}


def _begun(folder: Path, shards: Sequence[ShardEntry]) -> list[str]:
    """What an unfinished store is made from, and how far it is."""
    inputs, answers = _json(folder / STAGE), folder.parent / "conversations" / ANSWERS
    asked = _json(answers.with_name(SUMMARY))
    samples = tokens = ""
    if asked and inputs.get("record.spool_shards") is None and asked["bytes"] == answers.stat().st_size:
        samples, tokens = f" of {asked['answers']:,}", f" of {asked['prompt_tokens'] + asked['answer_tokens']:,}"
    held = sum(shard.samples for shard in shards), sum(shard.tokens for shard in shards)
    said = sum(shard.supervised_tokens for shard in shards)
    return [
        f"target       {inputs.get('target.path')} {inputs.get('target.revision') or ''}".rstrip(),
        f"weights      sha256 {inputs.get('weights of the target')}",
        f"recorded     {held[0]:,}{samples} samples, {held[1]:,}{tokens} tokens, {said:,} of them answers",
        *_sizes(shards),
    ]


def _json(path: Path) -> dict[str, Any]:
    """The object in a file of a store that is not finished, for a description; an empty one where it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _facts(manifest: Manifest) -> list[str]:
    target = manifest.target
    held = f"{manifest.samples:,} samples, {manifest.tokens:,} tokens, {manifest.supervised_tokens:,} of them answers"
    return [
        f"target       {target['name']} {target['revision'] or ''}".rstrip(),
        f"weights      sha256 {target['weights_sha256']}",
        f"tokenizer    sha256 {manifest.tokenizer_sha256}, chat template {manifest.chat_template_sha256}",
        f"ran in       {target['dtype']}, stored as {_stored(manifest)}",
        f"layers       {target['layers']} of {target['num_layers']}, width {target['hidden_size']}",
        f"last hidden  {manifest.last_hidden}",
        f"holds        {held}",
        *_sizes(manifest.shards),
    ]


def _sizes(shards: Sequence[ShardEntry]) -> list[str]:
    size, tokens = sum(shard.bytes for shard in shards), sum(shard.tokens for shard in shards)
    greedy = sum(shard.greedy_tokens for shard in shards)
    agreeing = 1 - sum(shard.disagreeing for shard in shards) / max(1, greedy)
    return [
        f"size         {size:,} bytes in {len(shards):,} shards, {size / max(1, tokens):,.0f} a token",
        f"agreement    {agreeing:.3%} of {greedy:,} greedy tokens are what the states predict",
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
    """What share of the training answers, of all and of each source's, draft vocabularies of several sizes can say."""
    whole, chosen = store.manifest.target["vocab_size"], _chosen_size(store)
    sizes = sorted(({whole // part for part in VOCABULARY_SHARES} | {chosen or 0}) - {0})
    vocabularies = [store.draft_vocabulary(size) for size in sizes]
    rows = [("draft vocabulary covers", *(f"D={size:,}" for size in sizes))]
    rows += [(ALL_SOURCES, *(f"{vocabulary.covered:.1%}" for vocabulary in vocabularies))]
    for source in vocabularies[0].coverage if vocabularies else ():
        rows.append((f"  {source}", *(f"{vocabulary.coverage[source]:.1%}" for vocabulary in vocabularies)))
    width = max(len(name) for name, *_ in rows)
    lines = [name.ljust(width) + "".join(f"{share:>12}" for share in shares) for name, *shares in rows]
    return lines if chosen is None else [*lines, f"D={chosen:,} is that of the run's recipe"]


def _chosen_size(store: Store) -> int | None:
    """The draft vocabulary's size in the recipe of the run that holds the store, if there is one that fits."""
    recipe = store.path.parent / "config.yaml"
    if not recipe.is_file():
        return None
    with suppress(UserError):  # an older version's; the store is none the worse
        size = load(recipe).draft.vocab_size
        return size if size <= store.manifest.target["vocab_size"] else None
    return None
