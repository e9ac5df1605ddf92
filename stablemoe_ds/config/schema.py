"""What a run is: one YAML file, one typed and strict object.

Every section owns its fields and the rules that concern only itself; rules that join sections are in
``rules.py``. Nothing here imports torch, so that ``stablemoe config check`` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import Field, PositiveInt, field_validator, model_validator

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.paths import NameText, PathText, expanded_within, if_written
from stablemoe_ds.config.section import Section

DecayRate = Annotated[float, Ge(0), Lt(1)]


class ModelConfig(Section):
    """The dense backbone, a megatron-core ``GPTModel``."""

    layers: PositiveInt = Field(description="transformer blocks, MoE layers not counted")
    hidden_size: PositiveInt = Field(description="width d of the residual stream")
    heads: PositiveInt = Field(description="attention heads")
    kv_heads: PositiveInt | None = Field(None, description="key/value heads of grouped-query attention; null: heads")
    ffn_hidden_size: PositiveInt = Field(description="inner width of a block's feed-forward layer")
    vocab_size: PositiveInt | None = Field(None, description="number of token ids; null: that of the tokenizer")
    positions: Literal["learned", "rope"] = Field("rope", description="learned absolute positions or rotary embedding")
    rope_base: PositiveInt = Field(10_000, description="base of the rotary frequencies")
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="normalisation, always before the sublayer")
    activation: Literal["relu", "gelu", "swiglu"] = Field("swiglu", description="feed-forward nonlinearity")
    bias: bool = Field(False, description="biases in attention and feed-forward layers")
    tie_embeddings: bool = Field(True, description="use the input embedding as the output matrix")
    embedding: Literal["scaled", "plain"] | None = Field(
        None,
        description="initial values of the embedding. plain: N(0, init_std), as in Megatron; scaled: N(0, 1/d) times "
        "sqrt(d), as in the authors' code, with which a router on the raw stream can distinguish tokens from the first "
        "update (docs/method.md says what each costs); null: plain, and in a run that continues the checkpoint's",
    )
    init: Literal["megatron", "fairseq"] = Field(
        "megatron",
        description="initial values of the other weights. megatron: N(0, init_std), divided by sqrt(2 layers) for "
        "layers that write to the residual stream, biases 0; fairseq: as in the authors' code (docs/method.md)",
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial values with megatron")
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon added to the variance in a norm")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after attention and feed-forward layers")


class Source(Section):
    """One corpus of a blend, written by ``stablemoe data prepare``: .bin, .idx, .json and .counts.npy."""

    path: PathText = Field(description="common path of these files, without extension")
    weight: float = Field(1.0, gt=0, description="weight of this corpus in the blend, relative to the others")


class DataConfig(Section):
    """Tokenizer, corpora and how they are cut into sequences.

    Paths are relative to the current directory; ~ and ~user at the start of a path are home directories.
    """

    tokenizer: PathText | None = Field(
        None, description="sentencepiece .model file, or a tokenizer.json of Hugging Face"
    )
    train: list[Source] = Field(default_factory=list, description="training corpora: paths, or {path, weight}")
    valid: list[Source] = Field(default_factory=list, description="validation corpora, read from end to end")
    test: list[Source] = Field(default_factory=list, description="test corpora, read from end to end")
    sequence_length: PositiveInt = Field(1024, description="tokens in a training sequence")
    document_mask: Literal["none", "attention", "attention_and_positions"] = Field(
        "none",
        description="none: a token attends to everything before it in its sequence, including other documents; "
        "attention: only to its own document, in training and evaluation; attention_and_positions: learned positions "
        "also start again at each document (this makes no difference to rotary ones, which are relative)",
    )
    eos_id: int | None = Field(None, ge=0, description="id that ends each document; null: the tokenizer's")
    workers: int = Field(
        1, ge=0, description="processes that read data ahead; 0: the training process reads data itself"
    )

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        """A single path and plain strings are shorthand for sources of weight 1."""
        items = [value] if isinstance(value, (str, dict)) else value
        if isinstance(items, list):
            return [{"path": item} if isinstance(item, str) else item for item in items]
        return items


class OptimizerConfig(Section):
    """AdamW. All parameters have the same learning rate, except those of moe.distilled (lr_scale)."""

    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.98), description="Adam's decay rates")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay of matrices; never applied to biases, norms or the router"
    )
    clip: float = Field(1.0, ge=0, description="limit on the global gradient norm; 0: none")


class ScheduleConfig(Section):
    """Number and size of updates, and the learning rate schedule."""

    steps: PositiveInt = Field(description="number of optimizer updates")
    tokens_per_step: PositiveInt = Field(description="tokens in an update, over all ranks and accumulation steps")
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="learning rate after the warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="learning rate at the end, relative to the peak")


class PlateauConfig(Section):
    """Switch when agreement, churn and load have all levelled off."""

    window: PositiveInt = Field(50, description="number of updates over which changes are measured")
    tolerance: float = Field(0.01, gt=0, description="largest change of any of the three that counts as level")
    earliest: float = Field(0.05, ge=0, lt=1, description="no switch before this fraction of the run")
    latest: float = Field(0.5, gt=0, le=1, description="switch at this fraction of the run at the latest")

    @model_validator(mode="after")
    def _ordered(self) -> PlateauConfig:
        if self.earliest > self.latest:
            raise ValueError(f"earliest {self.earliest} comes after latest {self.latest}")
        return self


class StagesConfig(Section):
    """When stage 1 ends. Exactly one of the first three; ``never`` keeps stage 1 to the end."""

    at_step: int | None = Field(
        None, ge=1, description="number of updates in stage 1 (the paper's S); stage 2 begins with the next one"
    )
    at_fraction: float | None = Field(None, gt=0, lt=1, description="the same, as a fraction of the run")
    plateau: PlateauConfig | None = Field(None, description="switch when routing has levelled off")
    never: bool = Field(False, description="stay in stage 1 (the paper's ablation)")
    min_agreement: float = Field(
        0.5, ge=0, le=1, description="the switch warns if the agreement of the two routers is lower"
    )
    max_load_excess: float = Field(
        2.0,
        ge=1,
        description="the switch warns if the table's max/mean load exceeds what token frequencies force by this factor",
    )

    @model_validator(mode="after")
    def _one(self) -> StagesConfig:
        named = [k for k in ("at_step", "at_fraction", "plateau") if getattr(self, k) is not None]
        named += ["never"] if self.never else []
        if len(named) > 1:
            raise ValueError(
                f"give one of at_step, at_fraction, plateau, never; this has {' and '.join(named)}; remove one, e.g. "
                f"stages.{named[0]}=null"
            )
        return self


class ParallelConfig(Section):
    """How the run is distributed over processes. The data-parallel degree is world size / (tensor * sequence)."""

    tensor: PositiveInt = Field(1, description="tensor-parallel degree")
    expert: PositiveInt = Field(1, description="expert-parallel degree; divides moe.experts and the world size")
    sequence: PositiveInt = Field(
        1,
        description="ranks that share each sequence, for long ones: each holds as many consecutive tokens as the "
        "others, and for attention as many heads (Ulysses); divides data.sequence_length and, with tensor, the heads",
    )
    expert_placement: Literal["number", "load"] = Field(
        "number",
        description="which experts a rank holds. number: consecutive ones; load: chosen so that all ranks serve about "
        "the same number of tokens, computed from the routing table and the counts of the training text. A run that "
        "learns its table places experts by load once it is continued after the switch",
    )
    replicated_experts: int = Field(
        0,
        ge=0,
        description="number of experts in each MoE layer that every rank holds: those that serve most tokens. Their "
        "tokens are not sent to another rank, and the gradients of the copies are summed. Needs expert_placement load "
        "and takes effect together with it",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage, i.e. what is sharded over data ranks: 0 nothing, 1 the optimizer state, 2 also the "
        "gradients, 3 also the weights",
    )
    offload: Literal["optimizer", "all"] | None = Field(
        None,
        description="what a rank keeps in host memory instead of its GPU's; needs zero_stage 3. optimizer: gradients "
        "and optimizer state of its share of the weights, which are updated there; all: also that share of the weights",
    )
    micro_batch: PositiveInt | None = Field(
        None, description="sequences in a micro-batch of a rank; null: the rank's whole share of an update"
    )
    dispatch_parts: PositiveInt = Field(
        1,
        description="parts into which the tokens of an MoE layer are split: one is sent while experts compute another",
    )
    recompute: bool = Field(False, description="recompute activations of each block in the backward pass")
    compile: bool = Field(
        False,
        description="torch.compile the transformer blocks and, on a GPU with grouped experts, the experts, or in stage "
        "2 on one expert-parallel rank the whole MoE layer. It fuses the operations between matrix products, takes "
        "about a minute at the start and at the switch, and needs a C++ compiler. Dropout "
        "draws different random numbers; with parallel.tensor above 1 a block is compiled in pieces, between "
        "its all-reduces",
    )
    timeout_minutes: float = Field(10.0, gt=0, description="the run stops if a collective waits longer than this")

    @property
    def places_by_load(self) -> bool:
        """Whether the load of experts decides which rank holds them; a single rank of experts holds all."""
        return self.expert_placement == "load" and self.expert > 1


class PrecisionConfig(Section):
    """Arithmetic of the model. Router, gate, auxiliary losses and optimizer always use fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="weights and activations")
    loss_scale: float = Field(0, ge=0, description="fp16 only; 0: dynamic")


class CheckpointConfig(Section):
    """When checkpoints are written, checked and deleted."""

    every: int = Field(0, ge=0, description="updates between checkpoints; 0: only at the end and when asked to stop")
    keep: PositiveInt = Field(2, description="number of newest checkpoints that are kept")
    resume: bool = Field(
        True,
        description="continue from the newest checkpoint in run_dir if there is one, even if settings have changed",
    )
    asynchronous: bool = Field(
        True,
        description="write checkpoints in a thread while training continues; an update only waits for the copy to host "
        "memory, which takes 12 bytes per parameter, divided over the ranks",
    )
    verify: Literal["size", "hash"] = Field(
        "hash",
        description="what is checked before a checkpoint is used. size: file sizes; hash: also the content, which "
        "ranks read in shares, about a second for each 1.5 GB of a rank's share",
    )
    fallback: bool = Field(
        True,
        description="if the newest checkpoint is damaged, warn and continue from the newest intact one; false: stop, "
        "and name that one",
    )


class FaultsConfig(Section):
    """Numerical faults. An update whose loss or gradient is not finite is dropped by all ranks.

    In fp16 an overflowing gradient is not a fault: DeepSpeed drops the update and lowers its loss scale.
    """

    skip_limit: PositiveInt = Field(
        3, description="after this many dropped updates in a row, go back to the newest checkpoint and skip that data"
    )
    rollback_limit: int = Field(
        2, ge=0, description="how often a run may go back to the same checkpoint before it ends with an error"
    )
    spike_factor: float | None = Field(
        None, gt=1, description="drop updates whose loss exceeds the median of recent ones by this factor; null: never"
    )
    spike_window: PositiveInt = Field(50, description="number of recent kept updates that a loss is compared with")


class LoggingConfig(Section):
    """What is logged and measured during a run."""

    every: PositiveInt = Field(10, description="updates between log lines")
    eval_every: int = Field(0, ge=0, description="updates between validations; 0: only at the switch and at the end")
    eval_tokens: PositiveInt | None = Field(
        None, description="tokens in each validation during training; null: all of them"
    )
    probe_every: int = Field(
        0, ge=0, description="updates between records of where the probe set is routed; 0: 50 records per run"
    )
    probe_tokens: PositiveInt = Field(16_384, description="number of tokens in the fixed probe set")
    tensorboard: bool = Field(True, description="write TensorBoard events to run_dir/tensorboard")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; needs pip install 'stablemoe_ds[wandb]'"
    )


class RunConfig(Section):
    """A whole run. ``load.load_run`` makes one from YAML and ``key=value`` overrides."""

    name: NameText = Field("run", description="name of the run")
    run_dir: PathText | None = Field(None, description="run directory, where all output goes; null: runs/<name>")
    seed: int = Field(
        1234, ge=0, description="determines initial values, data order, and which tokens a capacity limit drops"
    )
    model: ModelConfig
    moe: MoEConfig = Field(default_factory=lambda: MoEConfig(router="dense"))
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    stages: StagesConfig = Field(default_factory=StagesConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    deepspeed: Annotated[dict[str, Any], if_written(expanded_within)] = Field(
        default_factory=dict, description="keys merged into the derived DeepSpeed configuration at the end"
    )

    @property
    def directory(self) -> str:
        """Run directory, relative to where the command is started unless absolute."""
        return self.run_dir or f"runs/{self.name}"
