"""Every setting of every stage, declared once.

A recipe is a YAML file with one section per dataclass below; ``section.name=value`` on the command line overrides it.
The text under a field is its ``--help``. A setting has one default, here, and none at its place of use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .drafting import FIXED


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    """Name of the run; everything it writes goes to <root>/<name>."""
    root: str = "runs"
    """Folder of all runs, relative to the working directory."""
    seed: int = 0
    """Seed of sampling, initialisation and data order."""


@dataclass(frozen=True)
class TargetSettings:
    """The frozen model that the draft learns to predict."""

    path: str = "embedded"
    """Folder or hub name of the target; "embedded" is the small Llama-4 that ships with this package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); ignored for a folder."""
    dtype: str = "float32"
    """Numerics in which the target runs: float32 or bfloat16."""
    layers: tuple[int, ...] | None = None
    """Captured layers, 0-based and ascending: outputs of these decoder layers. Default for N layers: [1, N//2-1, N-4]."""


@dataclass(frozen=True)
class PrepareSettings:
    """Which questions the target is asked."""

    prompts: str = "stdlib"
    """Where they come from: a .jsonl, .json or .parquet file, a folder or a glob of them; a dataset of the Hugging Face
    hub (owner/name), which is streamed; or "stdlib", questions about the documented functions of the Python standard
    library, split by module. A row holds a question ("prompt"), several in turn ("turns"), or "messages" (OpenAI) or
    "conversations" (ShareGPT), whose answers the target replaces by its own unless prepare.keep_answers is set. It may
    have a "system" message, a "source" (else its "category", else the file's name) and, in files, an "id" and a "split"
    (else by a hash of the id, 80 / 8 / 12 percent). What cannot be asked, such as images, is counted by reason."""
    column: str | None = None
    """The column that holds the conversation, whatever its form. Default: the one of "messages", "conversations",
    "prompt" and "turns" that is there."""
    hub_config: str | None = None
    """Configuration of a dataset of the hub that has several; ignored for files."""
    hub_split: str = "train"
    """Split of a dataset of the hub that is read, such as train_sft; ignored for files."""
    hub_revision: str | None = None
    """Branch, tag or commit of a dataset of the hub; a commit makes the run repeatable. Ignored for files."""
    train: int = 2000
    """Conversations for training the draft (fewer where there are not as many)."""
    validation: int = 48
    """Conversations on which checkpoints are chosen; their answers are greedy."""
    test: int = 96
    """Conversations on which the report is made; neither target nor draft was trained on them."""
    max_prompt_tokens: int = 512
    """Longer prompts, with all questions of the user that follow, are left out, and counted."""
    keep_answers: bool = False
    """Train on the answers that training conversations bring with them, reasoning and calls of tools included as the chat
    template shows them, instead of letting the target answer anew: for answers that it gave earlier. A conversation
    without any is answered as ever. Those that the template does not show whole, or of which a turn is longer than
    regenerate.max_new_tokens, are left out and counted by reason. Validation and test answers are always the target's
    own, since acceptance is measured on them."""


@dataclass(frozen=True)
class RegenerateSettings:
    """How the target answers them."""

    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    """Temperatures of the training answers, dealt out in turn; validation and test answers are greedy."""
    max_new_tokens: int = 160
    """Longest turn of the target in tokens, end-of-turn included. A conversation ends at a turn that is cut here, at one
    that the chat template would rewrite before the next (reasoning, say), and where the target's positions end."""
    batch_size: int = 32
    """Prompts answered at once, in process."""
    endpoints: tuple[str, ...] = ()
    """OpenAI-compatible servers that answer in the target's place (http://node1:8000, http://node2:8000); its weights are
    then not loaded here. Default: none, it answers in process. One that is away or busy is left alone for a while, and
    then longer, while others answer; the list may change from one start to the next. vLLM returns token ids; text alone
    is tokenised again, and such answers are marked and counted. A server that refuses all parameters but OpenAI's own
    (TensorRT-LLM) is asked without the others. A key is taken from the environment: OPENAI_API_KEY."""
    served_model: str | None = None
    """The target's name on the servers; default the first that each lists."""
    concurrency: int = 64
    """Requests in flight at each endpoint."""
    timeout_s: float = 600.0
    """Seconds that a server may take over a turn. When none has answered for as long, the stage ends with exit code 3."""
    retries: int = 5
    """How often a request that failed (server error, time-out, lost connection) is made again, after pauses that grow; one
    that is refused (a code 4xx other than 408, 425 and 429) is not. What is left without an answer is listed in
    conversations/failed.jsonl with the server's words, and asked again when the stage is started again."""
    allowed_failures: float = 0.0
    """Share of the conversations that may stay without an answer; with more the stage ends with exit code 3."""


@dataclass(frozen=True)
class RecordSettings:
    """How hidden states are recorded."""

    batch_tokens: int = 8192
    """Most tokens of one recording batch, padding included; a longer conversation is a batch of its own."""
    shard_tokens: int = 32768
    """Most tokens of one shard: the unit that is written, published and resumed."""
    features_dtype: str = "float8_e4m3fn"
    """Storage of the features: float8_e4m3fn (FP8, with a scale per token and layer), bfloat16, or float32."""
    last_hidden_dtype: str = "float8_e4m3fn"
    """Storage of the last hidden states, from which the teacher's logits are computed: as for the features."""
    spool_shards: int | None = None
    """For states that no disk holds at once: most shards of training states that stand at a time. Recorder and trainer then
    run side by side; the trainer reads every shard once, in one epoch, and deletes what its checkpoints cover. Held-out
    states are kept in the store. Default: everything is."""
    engine: str = "transformers"
    """What runs the target in this process: transformers, which knows every family, or native, for Llama 3 and Llama 4, which
    pads nothing and sends a token through its own experts alone."""
    endpoints: tuple[str, ...] = ()
    """vLLM servers that record, as http://127.0.0.1:8000; none: the target runs in this process."""
    tensor_parallel: int = 1
    """Processes that hold the target together, each with its part of every matrix, where no servers record: as many as
    torchrun --nproc-per-node starts, or a divisor of it. 1: every process holds a whole target, over all GPUs that it sees,
    which compute one after the other."""
    server_gpus: int = 1
    """GPUs over which one server splits the target."""
    in_flight: int = 16
    """Sequences that one server has at a time."""
    states_folder: str = "/dev/shm/eagle3-states"
    """Folder through which servers hand over hidden states: in memory where they run beside the recorder, else on a
    file system that they share."""
    patience_s: float = 600.0
    """Seconds for which a sequence is tried again while servers fail or restart."""


@dataclass(frozen=True)
class DraftSettings:
    """The shape of the draft head; what is not set follows the target."""

    vocab_size: int = 1024
    """Draft vocabulary D: the target's most frequent output tokens. The target's own size means no mapping."""
    intermediate_size: int = 512
    """Width of the SwiGLU MLP."""
    num_heads: int | None = None
    """Attention heads; default the target's."""
    num_kv_heads: int | None = None
    """Key/value heads; default the target's."""
    head_dim: int | None = None
    """Width of one head; default the target's."""
    rope_theta: float | None = None
    """Base of the rotary embedding; default the target's."""
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm per captured layer before fc."""
    norm_output: bool = False
    """EAGLE-3.1: feed the normed output back as the next step's hidden state."""


@dataclass(frozen=True)
class TrainSettings:
    """The TTT rollout, the objective and the loop."""

    ttt_steps: int = 7
    """Steps K of the training-time test."""
    step_decay: float = 0.8
    """Weight of step j is step_decay ** j."""
    objective: str = "lk"
    """kl: soft cross-entropy; lk: LK-hybrid of KL and expected acceptance (arXiv 2602.23881)."""
    epochs: int = 4
    """Passes over the training samples."""
    batch_tokens: int = 4096
    """Tokens of one optimiser step over all ranks and accumulation steps."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalised momentum for the head's matrices, AdamW for its norms and LM head; not under
    DeepSpeed."""
    learning_rate: float = 2e-3
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas; Muon's momentum is 0.95."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of either optimizer."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; it then falls to zero as train.schedule says."""
    schedule: str = "cosine"
    """How the learning rate falls to zero: cosine or linear."""
    clip: float = 0.5
    """Largest gradient norm."""
    warm_start: str | None = None
    """Folder of a head to go on from, such as a run's draft/ or one that `eagle3 import` wrote; its vocabulary is kept."""
    validate_every: int = 100
    """Optimiser steps between validations; the head with the best simulated acceptance length is kept."""
    patience: int | None = None
    """Validations in a row without a better head after which training ends early. Default: it never does."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept beside the best head."""
    tracker: str = "disabled"
    """Weights & Biases through accelerate: online, offline or disabled; metrics.jsonl is always written."""


@dataclass(frozen=True)
class EvalSettings:
    """What is measured, and with which drafting."""

    draft: str | None = None
    """Folder of the head to evaluate, such as one that `eagle3 import` wrote; default the run's own."""
    engine: str = "native"
    """What runs the target: native, for Llama 3 and Llama 4, which verifies chains and trees, or transformers, which knows
    every family and verifies chains alone."""
    tensor_parallel: int = 1
    """Processes that hold target and draft together in the native engine, each with its part of every matrix: as many as
    torchrun --nproc-per-node starts. 1: one process holds all, on one GPU, or with transformers over all that it sees."""
    chain: int | Literal["auto"] = "auto"
    """Drafted tokens per round: the main drafting, of which headlines, sources and examples are shown. auto: at each
    temperature the fastest of chains up to 8 and plain decoding, by acceptance and the time of a round, both measured on
    validation prompts; a chain of 5 stands beside it, for comparison between runs."""
    beside: tuple[str, ...] = ()
    """Further draftings that answer the same prompts beside it: "chain K", or EAGLE-2's "tree TOTAL/DEPTH/TOP_K" (nodes that
    are verified, levels, children of a node), such as chain 7, tree 60/7/10. Default: none."""
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    """Temperatures at which the test prompts are answered."""
    prompts: int = 48
    """Test prompts per temperature, dealt evenly over the sources."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    sampling: str = "sampled"
    """Drafting at T > 0: sampled (rejection sampling) or greedy (vLLM's default). T = 0 is always greedy."""
    dtype: str = "float32"
    """Numerics of target and draft while decoding."""

    @property
    def fixed_chain(self) -> int:
        """Drafted tokens per round where they must not depend on a machine: in training, in exports, between runs."""
        return self.chain if isinstance(self.chain, int) else FIXED


@dataclass(frozen=True)
class Settings:
    """A whole recipe: one section per stage."""

    run: RunSettings = field(default_factory=RunSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    regenerate: RegenerateSettings = field(default_factory=RegenerateSettings)
    record: RecordSettings = field(default_factory=RecordSettings)
    draft: DraftSettings = field(default_factory=DraftSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
