"""What a run is: one YAML file, one typed and strict object.

Every section owns its fields and the rules that concern only itself; rules that join sections are in
``rules.py``. Nothing here imports torch, so that ``stablemoe config check`` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

from stablemoe_ds.config.gate_facts import GATES, GateFacts, GateName
from stablemoe_ds.config.paths import NameText, PathText, expanded_within, if_written
from stablemoe_ds.config.routers import ROUTERS, RouterFacts, RouterName
from stablemoe_ds.config.table_options import OPTIONS, read_options
from stablemoe_ds.errors import UserError

DecayRate = Annotated[float, Ge(0), Lt(1)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are immutable after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


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


class DistilledConfig(Section):
    """The small router that sees token ids only (paper eq. 9-10)."""

    kind: Literal["word", "bigram", "cnn", "transformer"] = Field(
        "word", description="how features are computed from ids"
    )
    dim: PositiveInt = Field(50, description="feature width; a transformer uses the model's hidden size instead")
    layers: PositiveInt = Field(1, description="layers of the transformer kind")
    bigram_start: Literal["zero", "itself"] = Field(
        "zero",
        description="kind bigram: what the first token of a sequence (or document) is averaged with, since no token "
        "precedes it: a vector of zeros, or itself as in the authors' code",
    )
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="learning rate of this router relative to optimizer.lr (paper: 1). Its vectors start at N(0, 1) "
        "and have to move about that far, so a stage 1 of less than a few thousand updates needs 10 or more",
    )


class MoEConfig(Section):
    """Mixture-of-Experts layers: where they are, what an expert is, and how tokens are routed."""

    router: RouterName = Field(
        "stablemoe",
        description="how the expert of a token is chosen (docs/method.md); dense: no MoE layer at all; dense_deeper, "
        "dense_wider: a dense layer with as many parameters as all experts, stacked or side by side",
    )
    layers: list[PositiveInt] = Field(default_factory=list, description="blocks with an MoE layer, counted from 1")
    table_layers: list[PositiveInt] = Field(
        default_factory=list,
        description="those of layers in which a table (moe.table) chooses the experts from the first update on, as in "
        "the first layers of DeepSeek-V4; the router learns to choose in the others. Gates are the router's in both",
    )
    placement: Literal["after", "replace"] = Field(
        "after",
        description="after: an extra layer after each of these blocks (paper); replace: in place of its feed-forward "
        "layer",
    )
    experts: PositiveInt = Field(8, description="number of experts N of each MoE layer")
    sublayers: PositiveInt = Field(1, description="number of residual feed-forward sublayers K in each expert")
    ffn_hidden_size: PositiveInt | None = Field(
        None, description="inner width of an expert's sublayer; null: the model's"
    )
    top_k: PositiveInt = Field(1, description="number of experts that serve a token; 1 in the paper")
    shared_experts: int = Field(0, ge=0, description="experts that serve every token, in addition to the routed ones")
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="tokens an expert serves at most in training, as a multiple of the mean; null: no limit",
    )
    balance_weight: float = Field(
        0.3,
        ge=0,
        description="weight of the balance loss; if not given: 0.3 for StableMoE (paper eq. 8), 0.01 for switch",
    )
    balance_over: Literal["update", "micro_batch"] = Field(
        "update",
        description="tokens that the balance loss counts. update: all tokens of an update, which costs stage 1 an "
        "extra forward pass up to the last MoE layer if an update has several micro-batches; micro_batch: each "
        "micro-batch separately, over all ranks, as in the authors' code, so that the loss depends on "
        "parallel.micro_batch and the number of ranks",
    )
    distill_weight: float = Field(
        0.3, ge=0, description="weight of the distillation loss (paper: 1, authors' code: 0.3)"
    )
    router_input: Literal["raw", "normalized"] | None = Field(
        None,
        description="input of the centroids. raw: the residual stream itself (paper); normalized: scaled to a root "
        "mean square of 1, which changes gates and gradients but not which expert is best, and which a router needs "
        "with a plain embedding; null: raw if the embedding is scaled, else normalized, and in a run that continues "
        "the checkpoint's",
    )
    gate: GateName = Field(
        "own",
        description="weight of an expert's output, a function of its affinity s to the token (docs/method.md). own: "
        "the router's own gate, sigmoid(s) in the paper; doubled: 2 sigmoid(s), about 1 at the start; learned: "
        "2 sigmoid(a s + b), with a and b learned for each expert, also about 1 at the start; one: always 1",
    )
    centroid_gain: float = Field(0.1, gt=0, description="initial norm of each centroid")
    equal_experts: bool = Field(
        False, description="give all experts of a layer the same initial values, as in the authors' code"
    )
    distilled: DistilledConfig = Field(
        default_factory=DistilledConfig, description="the distilled router, which sees token ids only"
    )
    hash_table: Literal["random", "even"] = Field(
        "random",
        description="table of router hash. random: a random expert for each id; even: the most frequent ids first, "
        "each to the expert with the fewest tokens so far",
    )
    table: PathText | None = Field(
        None,
        description="table of router table and of table_layers: a file from 'stablemoe table build', or "
        "routing_table.safetensors of a run; it must match the run's tokenizer, the model's experts and top_k, and the "
        "number of layers that follow it. Or random, even, scattered or cooccurrence, to build one from the training "
        "text when the run begins. A run that continues follows the table in its checkpoint",
    )
    start_table: PathText | None = Field(
        None,
        description="table that a learned router starts from: a file or a builder, as in table. Its centroids become "
        "the mean embedding of each expert's ids, and the distilled word router chooses what the table says; null: "
        "random centroids",
    )
    table_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="options of the builder in table or start_table, as for 'stablemoe table build', "
        "e.g. {max_load: 1.2}",
    )
    table_load: float = Field(
        1.1,
        ge=1,
        description="router stablemoe_balanced: limit on the max/mean load of its table, as far as frequencies allow",
    )
    bias_step: float = Field(
        0.001, gt=0, description="router topk: change of the bias of an over- or underloaded expert in each update"
    )

    @property
    def facts(self) -> RouterFacts:
        """How the router behaves over a run."""
        return ROUTERS[self.router]

    @property
    def fixed_layers(self) -> list[int]:
        """Blocks whose MoE layer follows a table from the first update on."""
        return self.layers if self.facts.fixed else self.table_layers

    @property
    def learned_layers(self) -> list[int]:
        """Blocks whose MoE layer learns to choose, to the end or until the switch."""
        return [block for block in self.layers if block not in self.fixed_layers]

    @property
    def restless_rows(self) -> list[int]:
        """MoE layers, counted from 0, in which fluctuation is looked for: those that learn; all where none does."""
        return [row for row, block in enumerate(self.layers) if block in (self.learned_layers or self.layers)]

    @property
    def needs_table(self) -> bool:
        """``table`` says what some layers follow."""
        return self.facts.table_from == "file" or bool(self.table_layers)

    @property
    def table_key(self) -> str:
        """The setting that names the table of this run: one to follow, or one to start from."""
        return "table" if self.needs_table else "start_table"

    @property
    def table_blocks(self) -> list[int]:
        """Blocks whose MoE layer follows that table, or starts from it."""
        return self.fixed_layers if self.needs_table else self.layers

    @property
    def table_builder(self) -> str | None:
        """The builder that this setting names, if it names none of a file."""
        named: str | None = getattr(self, self.table_key)
        return named if named in OPTIONS else None

    @property
    def table_file(self) -> str | None:
        """The file that this setting names, if it names no builder."""
        named: str | None = getattr(self, self.table_key)
        return None if named in OPTIONS else named

    @property
    def gate_name(self) -> str:
        """The kind of gate, a key of ``gates.GATES``: the named one, or the router's own."""
        return self.facts.gate if self.gate == "own" else self.gate

    @property
    def gate_facts(self) -> GateFacts:
        """What is known of the gate."""
        return GATES[self.gate_name]

    @property
    def normalizes_input(self) -> bool:
        """Centroids meet the residual stream at unit root mean square."""
        return self.router_input != "raw"

    @property
    def has_centroids(self) -> bool:
        """The model learns a centroid for each expert, to choose by, to gate by, or for both."""
        return self.facts.routed and (not self.facts.fixed or self.gate_facts.affinity)

    @model_validator(mode="before")
    @classmethod
    def _own_balance_weight(cls, section: Any) -> Any:
        """A weight that is not given is the router's own."""
        if isinstance(section, dict) and "balance_weight" not in section:
            facts = ROUTERS.get(str(section.get("router", "stablemoe")))
            if facts is not None:
                return {**section, "balance_weight": facts.balance_weight}
        return section

    @field_validator("layers", "table_layers")
    @classmethod
    def _ascending(cls, layers: list[int], field: ValidationInfo) -> list[int]:
        if layers != sorted(set(layers)):
            raise ValueError(
                f"{field.field_name} must ascend without repeats; nearest that works: {sorted(set(layers))}"
            )
        return layers

    @model_validator(mode="after")
    def _has_layers(self) -> MoEConfig:
        facts = self.facts
        if facts.layer == "none" and self.layers:
            raise ValueError(f"router '{self.router}' has no MoE layer: leave moe.layers empty, or name another router")
        if facts.layer != "none" and not self.layers:
            raise ValueError(f"router '{self.router}' needs moe.layers, e.g. [6]; or set router: dense")
        if self.needs_table and self.table is None:
            who = "moe.table_layers" if self.table_layers else f"router '{self.router}'"
            raise ValueError(
                f"{who} needs moe.table: the file of a table, which 'stablemoe table build' makes, or how to build "
                f"one: {', '.join(OPTIONS)}"
            )
        if self.table_builder is not None:
            try:
                read_options(self.table_builder, self.table_options)
            except UserError as error:
                raise ValueError(str(error)) from error
        elif self.table_options:
            raise ValueError(
                f"table_options are for a table that the run builds: set moe.{self.table_key} to {', '.join(OPTIONS)}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        if self.top_k > 1 and facts.one_expert:
            raise ValueError(f"router '{self.router}' gives each token one expert, not top_k {self.top_k}: set top_k 1")
        if facts.layer in ("deep", "wide") and self.shared_experts:
            raise ValueError(f"router '{self.router}' has no experts, so no shared ones either: set shared_experts 0")
        if facts.table_from == "scores and counts" and self.distilled.kind != "word":
            raise ValueError(f"a {self.distilled.kind} router has no table to balance: set distilled.kind word")
        return self

    @model_validator(mode="after")
    def _some_layers_learn(self) -> MoEConfig:
        follow, facts = self.table_layers, self.facts
        if not follow:
            return self
        if not facts.routed or facts.fixed:
            what = "follows a table in every layer" if facts.fixed else "has no layer that could follow a table"
            raise ValueError(f"router '{self.router}' {what}: leave table_layers empty, or name a router that learns")
        if not set(follow) <= set(self.layers):
            among = [block for block in follow if block in self.layers]
            raise ValueError(
                f"table_layers {follow} are not all among layers {self.layers}; nearest that works: {among}"
            )
        if not self.learned_layers:
            raise ValueError(
                f"table_layers name every layer, so router '{self.router}' has none to learn in: set router table, or "
                f"take one out, e.g. {follow[:-1]}"
            )
        if facts.distilled and self.distilled.kind != "word":
            raise ValueError(
                f"{self.distilled.kind} routers never become a table, which a switch would have to join to that of "
                "table_layers: set distilled.kind word, or a router without a switch"
            )
        return self

    @model_validator(mode="after")
    def _gate_fits(self) -> MoEConfig:
        facts = self.facts
        if self.gate != "own" and not facts.routed:
            raise ValueError(f"router '{self.router}' has no experts to weigh: set gate own")
        balanced = facts.balance_weight > 0 and self.balance_weight > 0
        if self.has_centroids and not self.gate_facts.affinity and not balanced:
            reason = "balance_weight is 0" if facts.balance_weight else "it has no balance loss"
            raise ValueError(
                f"gate '{self.gate_name}' has no gradient and {reason}, so nothing trains the centroids of router "
                f"'{self.router}'; nearest that works: gate doubled"
            )
        return self


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
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage, i.e. what is sharded over data ranks: 0 nothing, 1 the optimizer state, 2 also the "
        "gradients, 3 also the weights (fp32 only)",
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
        description="torch.compile the transformer blocks and, on a GPU with grouped experts, the experts. It fuses "
        "the operations between matrix products, takes about a minute at the start, and needs a C++ compiler. Dropout "
        "draws different random numbers; with parallel.tensor above 1 a block is compiled in pieces, between "
        "its all-reduces",
    )
    timeout_minutes: float = Field(10.0, gt=0, description="the run stops if a collective waits longer than this")


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
