"""What a head takes to train, in bytes of a GPU or of a CPU's process, before it exists.

    micro = Micro.of(loss_mask, lengths, steps=7)
    memory(config, micro, states(config, "adamw", stage=2, gpus=8), Numbers(2, 2, 2, 2), kernels=True)

Parts are what :mod:`.rollout`, :mod:`.kernels.fused` and ``train/objective.py`` keep for the backward pass, term by term;
tests count what they really hold, and ``train/bench/memory.py`` measures it. Each part is what it is at its largest. Not
all are there at once: the sum is taken at every moment that may be the fullest, and the fullest is the peak.

Letters: n rows, N tokens, B documents, S tokens and R supervised rows of the longest, K steps, A heads, M key/value heads, W
head width, H hidden, F captured layers, I MLP, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .costs import fc_parameters, largest, parameters, stacks, step_parameters
from .draft import DraftConfig
from .rollout import supervised

FLOAT32 = 4
#: Bytes a parameter of weights, gradients, and what the optimiser holds (AdamW's two moments; under DeepSpeed's bf16 also
#: float32 weights and gradients). ZeRO's stage s shards the last s of them over the GPUs.
PLAIN = (4, 4, 8)
DEEPSPEED = (2, 2, 16)
#: Gradients that ZeRO 1 to 3 gather before they reduce them: two buckets of DeepSpeed's default size, in bfloat16.
BUCKETS = 2 * 2 * 500_000_000
#: Of the target's logits at once in ``kernels/losses.py``, which cannot be imported without Triton.
TEACHER_CHUNK = 2**30
#: What the plain losses of ``train/objective.py`` work with: five tensors of a chunk.
LOSS_CHUNKS = 5 * 2**17 * FLOAT32


class Micro(NamedTuple):
    """What one device computes at once: ``documents`` of ``tokens`` in all.

    ``rows`` are the supervised ones of every step; the longest document has ``length`` tokens, and none more than
    ``widest`` supervised rows.
    """

    tokens: int
    rows: tuple[int, ...]
    documents: int
    length: int
    widest: int

    @classmethod
    def of(cls, loss_mask: Tensor, lengths: Tensor, steps: int) -> Micro:
        """That of documents of ``lengths [B]`` with ``loss_mask [N]``, through ``steps`` steps."""
        sets = supervised(loss_mask, lengths, steps)
        widest = max(int(part.sum()) for part in sets[0].split(lengths.tolist()))
        return cls(len(loss_mask), tuple(sets.sum(1).tolist()), len(lengths), int(lengths.max()), widest)


class Numbers(NamedTuple):
    """Bytes of a number: of the head's weights, of what it computes, of states as it reads them, of the target's ends."""

    weights: int
    width: int
    states: int
    ends: int


class States(NamedTuple):
    """Bytes of weights, gradients and optimiser on a device.

    A step of the optimiser works with ``working`` beside them; ``gathered`` are DeepSpeed's buckets of gradients, and
    under stage 3 the weights that it has put together.
    """

    weights: int
    gradients: int
    optimiser: int
    working: int
    gathered: int = 0


class Kept(NamedTuple):
    """Bytes that the forward pass leaves for the backward pass; ``copies`` are of weights."""

    copies: int
    attention: int
    mlp: int
    logits: int
    rest: int


class Moment(NamedTuple):
    """Bytes of what is kept, of gradients, and of what is there for the moment."""

    kept: int
    gradients: int
    transient: int


def states(config: DraftConfig, optimizer: str, stage: int | None, gpus: int, cpu: bool = False) -> States:
    """Of a head with ``train.optimizer``, under DeepSpeed's ZeRO or (None) without, as Muon always is.

    On a GPU AdamW takes roots of a whole group of parameters at once, and all but ``fc`` is one; on a CPU it takes one
    parameter at a time, and its root twice.
    """
    count, sharded = parameters(config), stage or 0
    if optimizer == "muon":
        matrices = sum(rows * columns * number for rows, columns, number in stacks(config))
        moments = PLAIN[2] * count - FLOAT32 * matrices  # a matrix has one, but for lm_head
        return States(PLAIN[0] * count, PLAIN[1] * count, moments, _orthogonalising(config, cpu))
    held = PLAIN if stage is None else DEEPSPEED
    weights, gradients, optimiser = (
        -(-size * count // (gpus if len(held) - part <= sharded else 1)) for part, size in enumerate(held)
    )
    if cpu:
        return States(weights, gradients, optimiser, 2 * FLOAT32 * largest(config))
    working = -(-FLOAT32 * (count - fc_parameters(config)) // (gpus if sharded else 1))
    gathered = (BUCKETS if sharded else 0) + (DEEPSPEED[0] * count if sharded == 3 else 0)
    return States(weights, gradients, optimiser, working, gathered)


def _orthogonalising(config: DraftConfig, cpu: bool) -> int:
    """What Muon's largest step works with: a stack of matrices thrice and their squares twice, in bfloat16 on a GPU."""
    found = []
    for rows, columns, count in stacks(config):
        stack, square = rows * columns * count, min(rows, columns) ** 2 * count
        # On a GPU the stack itself stays in float32, and is so twice while it is cast.
        found.append(FLOAT32 * (3 * stack + 2 * square) if cpu else max(10 * stack, 8 * stack + 4 * square))
    return max(found)


def constant_bytes(config: DraftConfig, width: int) -> int:
    """The target's embedding and LM head, whole on every device."""
    return 2 * config.vocab_size * config.hidden_size * width


def batch_bytes(config: DraftConfig, micro: Micro, width: int) -> int:
    """Ids, mask and states as the head reads them."""
    return micro.tokens * ((len(config.target_layers) + 1) * config.hidden_size * width + 9) + 8 * micro.documents


def memory(
    config: DraftConfig,
    micro: Micro,
    held: States,
    numbers: Numbers,
    kernels: bool,
    beside: int = 0,
    accumulating: bool = False,
) -> dict[str, int]:
    """Every part at its largest, and last the most that all take at once, as ``all``.

    Args:
        config: the head.
        micro: the micro-batch.
        held: from :func:`states`.
        numbers: bytes of them.
        kernels: whether Triton's kernels train it, or the plain path.
        beside: bytes a token of what the batch was made from, where that stays: a CPU does not copy it first.
        accumulating: whether gradients are there before the micro-batch is.
    """
    kept = (fused_kept if kernels else plain_kept)(config, micro, numbers)
    moments = (_fused_moments if kernels else _plain_moments)(config, micro, numbers, kept)
    moments = [Moment(each, gradients, transient + held.gathered) for each, gradients, transient in moments]
    last = Moment(0, held.gradients, held.working)
    ends, batch = (
        constant_bytes(config, numbers.ends),
        batch_bytes(config, micro, numbers.states) + beside * micro.tokens,
    )
    there = held.gradients if accumulating else 0
    fullest = max(kept + max(gradients, there) + transient for kept, gradients, transient in (*moments, last))
    copies, *activations = kept
    parts = {
        "weights": held.weights + copies,
        "gradients": held.gradients,
        "optimiser": held.optimiser,
        "the target's ends": ends,
        "batch": batch,
        **dict(zip(Kept._fields[1:], activations, strict=True)),
        "transient": max(moment.transient for moment in (*moments, last)),
    }
    return parts | {"all": held.weights + held.optimiser + ends + batch + fullest}


def plain_kept(config: DraftConfig, micro: Micro, numbers: Numbers) -> Kept:
    """What the plain path keeps. A norm keeps what it reads and what it has normalised, both in float32."""
    width, total, n, steps = numbers.width, sum(micro.rows), micro.rows[0], len(micro.rows)
    later, hidden, captured = total - n, config.hidden_size, len(config.target_layers)
    queries, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    widened = FLOAT32 if width < FLOAT32 else 0  # in float32 what a norm reads may be kept by another already
    merged = config.num_heads * sum(rows * (step + 1) for step, rows in enumerate(micro.rows) if step)
    norms = config.fc_norm + config.norm_before_fc
    converted = width if width != numbers.states else 0
    read = captured * hidden * (norms * (FLOAT32 + width) or converted)
    once = micro.tokens * (read + hidden * (3 * FLOAT32 + 2 * width) + config.head_dim * width)
    every = total * (hidden * (4 * FLOAT32 + 4 * width) + config.head_dim * width)
    fed = later * hidden * (2 * FLOAT32 + widened + (2 * FLOAT32 if config.norm_output else 0))
    normed = hidden * (total * (FLOAT32 + widened) + (0 if widened else n * FLOAT32))
    return Kept(
        copies=0,
        attention=width
        * (
            (micro.tokens + micro.documents * micro.length) * pairs
            + micro.documents * micro.widest * (micro.length + steps * 2 * queries)
            + steps * _scores(config, micro)
            + n * queries
            + later * (3 * queries + pairs)
        )
        + FLOAT32 * merged,
        mlp=total * 4 * config.intermediate_size * width,
        logits=total * config.draft_vocab_size * width,
        rest=once + every + fed + (normed if config.norm_before_residual else 0),
    )


def fused_kept(config: DraftConfig, micro: Micro, numbers: Numbers) -> Kept:
    """What the kernels keep. Weights are copied where they lie side by side, and all of them where they are cast."""
    width, total, hidden = numbers.width, sum(micro.rows), config.hidden_size
    later, captured = total - micro.rows[0], len(config.target_layers)
    queries, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    joined = 2 * hidden * (queries + pairs) + 2 * hidden * config.intermediate_size
    norms = config.fc_norm + config.norm_before_fc
    read = captured * hidden * width * (2 * norms or int(width != numbers.states))
    once = micro.tokens * (read + 3 * hidden * width + config.head_dim * FLOAT32 + 2 * 8)
    return Kept(
        copies=width * (joined if width == numbers.weights else step_parameters(config) + fc_parameters(config)),
        attention=width * (micro.tokens * pairs + total * 2 * queries + later * pairs)
        + total * config.num_heads * FLOAT32,
        mlp=total * 3 * config.intermediate_size * width,
        logits=total * config.draft_vocab_size * width,
        rest=once + (6 * total + (later if config.norm_output else 0)) * hidden * width,
    )


def _plain_moments(config: DraftConfig, micro: Micro, numbers: Numbers, kept: Kept) -> list[Moment]:
    """Those of the plain path that may be the fullest; what is kept goes as the backward pass walks back.

    A weight's gradient is added up over the steps: two parts and their sum are there at once, until the last is the
    parameter's.
    """
    width, rows, total, hidden = numbers.width, micro.rows, sum(micro.rows), config.hidden_size
    (n, last), second = (rows[0], rows[-1]), sum(rows[1:2])
    queries, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    draft, inner, scores = config.draft_vocab_size, config.intermediate_size, width * _scores(config, micro)
    widened = FLOAT32 if width < FLOAT32 else 0
    teacher = n * (draft * FLOAT32 + hidden * numbers.states) + LOSS_CHUNKS
    normed = hidden * (2 * FLOAT32 + width)  # beside a product, and before it a norm
    behind = last * (4 * inner * width + normed)  # of the last step, behind its attention
    rolled = sum(kept) - kept.logits - total * normed
    fed_back = total * hidden * width  # gradients of every step's output
    head, layer = draft * hidden * width, (3 * inner + queries) * hidden * width
    summed = layer + hidden * (2 * (queries + pairs) + inner) * width  # of all weights of a step
    first = n * (4 * inner + 2 * hidden) * width  # of step 0, behind its attention
    own = (total - n) * pairs
    attended = micro.documents * (micro.widest * 3 * queries + micro.length * 2 * pairs) + last * 3 * queries + own
    moments = [
        Moment(rolled - behind, 0, scores + widened * _scores(config, micro)),  # the last attention
        Moment(rolled + n * draft * width, 0, teacher - LOSS_CHUNKS + (n + second) * draft * width),  # the second loss
        Moment(sum(kept), 0, teacher + last * draft * (width + widened)),  # the last
        # Backwards: the last loss and the one before it, the last MLP, the last attention, the first MLP.
        Moment(sum(kept) - last * draft * width, 0, (last * (draft + hidden) + draft * hidden) * width),
        Moment(sum(kept) - 2 * last * draft * width, 0, (last * (draft + 2 * hidden) + 2 * draft * hidden) * width),
        Moment(rolled - last * inner * width, head, fed_back + (3 * last + hidden) * inner * width),
        Moment(rolled - behind, head, fed_back + scores + attended * width + layer),
        Moment(first, head, n * (2 * hidden + inner) * width + summed),
    ]
    if len(rows) > 2:  # the MLP before the last, whose sum is none of a parameter's yet
        at_once = fed_back + (last + hidden) * inner * width + summed
        moments.append(Moment(rolled - behind - scores, head, at_once))
    return moments


def _fused_moments(config: DraftConfig, micro: Micro, numbers: Numbers, kept: Kept) -> list[Moment]:
    """Those of the kernels' path."""
    width, rows, total, hidden = numbers.width, micro.rows, sum(micro.rows), config.hidden_size
    n, last = rows[0], rows[-1]
    queries, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    draft, inner, vocabulary = config.draft_vocab_size, config.intermediate_size, config.vocab_size
    teacher = n * (draft * width + hidden * numbers.states)
    at_once = max(256, TEACHER_CHUNK // (vocabulary * width) // 256 * 256)
    whole = vocabulary * hidden * width if width != numbers.ends else 0
    rolled = sum(kept) - kept.logits - total * hidden * width
    fed_back = total * hidden * width
    head, layer = draft * hidden * numbers.weights, (3 * inner + queries) * hidden * width
    summed = layer + hidden * (2 * (queries + pairs) + inner) * width  # of all weights of a step
    first = n * (3 * inner + 2 * hidden) * width + kept.copies
    own = (total - n + 2 * len(rows) * last) * pairs
    attended = last * 2 * queries + micro.tokens * pairs + own
    return [
        Moment(rolled, 0, teacher + min(n, at_once) * vocabulary * width + whole),
        Moment(sum(kept), 0, teacher),  # the last loss
        # Backwards: the last loss and the one before it, the last MLP, the last attention, the first MLP.
        Moment(sum(kept), 0, (3 * last + draft) * hidden * width),
        Moment(sum(kept) - last * (draft + hidden) * width, 0, (4 * last + 2 * draft) * hidden * width),
        Moment(rolled - last * inner * width, head, fed_back + (3 * last + hidden) * inner * width),
        Moment(rolled - last * 3 * inner * width, head, fed_back + attended * width + layer),
        Moment(first, head, n * (2 * hidden + inner) * width + summed),
    ]


def _scores(config: DraftConfig, micro: Micro) -> int:
    return micro.documents * micro.widest * micro.length * config.num_heads
