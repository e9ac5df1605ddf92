"""What a run is: one YAML file, one typed and strict object.

Every section owns its fields and the rules that concern only itself; rules that join sections are in
``rules.py``. Nothing here imports torch, so that ``stablemoe config check`` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

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
    vocab_size: PositiveInt | None = Field(None, description="token ids; null: as many as the tokenizer has")
    positions: Literal["learned", "rope"] = Field("rope", description="learned absolute positions or rotary embedding")
    rope_base: PositiveInt = Field(10_000, description="base of the rotary frequencies")
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="normalisation, always before the sublayer")
    activation: Literal["relu", "gelu", "swiglu"] = Field("swiglu", description="feed-forward nonlinearity")
    bias: bool = Field(False, description="biases in attention and feed-forward layers")
    tie_embeddings: bool = Field(True, description="output matrix is the input embedding")
    embedding: Literal["scaled", "plain"] = Field(
        "scaled",
        description="scaled: N(0, 1/d) times sqrt(d), as StableMoE's authors have it, so that the router can tell "
        "tokens apart from the first update; plain: N(0, init_std), Megatron's habit, which starves a raw router",
    )
    init: Literal["megatron", "fairseq"] = Field(
        "megatron",
        description="start values of the other weights. megatron: N(0, init_std), divided by sqrt(2 layers) where a "
        "layer writes to the residual stream, biases 0; fairseq: those of StableMoE's authors (docs/method.md)",
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of the megatron start values")
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in a norm")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after attention and feed-forward layers")


class DistilledConfig(Section):
    """The small router that sees token ids only (paper eq. 9-10)."""

    kind: Literal["word", "bigram", "cnn", "transformer"] = Field("word", description="how features are made of ids")
    dim: PositiveInt = Field(50, description="feature width; a transformer uses the model's hidden size instead")
    layers: PositiveInt = Field(1, description="layers of the transformer kind")
    bigram_start: Literal["zero", "itself"] = Field(
        "zero",
        description="what the bigram kind averages the first token of a sequence (or document) with, which has none "
        "before it: a vector of zeros, or itself as in the authors' code",
    )
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="learning rate of this router relative to optimizer.lr (paper: 1). Its vectors start at N(0, 1) "
        "and have to travel about that far, so a stage 1 of fewer than some thousand updates needs 10 and more",
    )


class MoEConfig(Section):
    """Mixture-of-Experts layers: where they are, what an expert is, who routes."""

    router: RouterName = Field(
        "stablemoe",
        description="who decides which expert serves a token (docs/method.md); dense: no MoE layer at all; "
        "dense_deeper, dense_wider: a dense layer of as many parameters as all experts, stacked or side by side",
    )
    layers: list[PositiveInt] = Field(default_factory=list, description="block numbers, counted from 1")
    placement: Literal["after", "replace"] = Field(
        "after",
        description="after: an extra layer behind each named block (paper); replace: instead of its feed-forward layer",
    )
    experts: PositiveInt = Field(8, description="experts N of each MoE layer")
    sublayers: PositiveInt = Field(1, description="residual feed-forward sublayers K stacked in one expert")
    ffn_hidden_size: PositiveInt | None = Field(
        None, description="inner width of an expert's sublayer; null: the model's"
    )
    top_k: PositiveInt = Field(1, description="experts that serve a token; the paper has 1")
    shared_experts: int = Field(0, ge=0, description="experts that serve every token, in addition to the routed ones")
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="tokens an expert takes in training, as a multiple of the mean; null: every token is served",
    )
    balance_weight: float = Field(
        0.3,
        ge=0,
        description="weight of the router's balance loss; not given: 0.3 for StableMoE (paper eq. 8), 0.01 for switch",
    )
    balance_over: Literal["update", "micro_batch"] = Field(
        "update",
        description="tokens whose experts the balance loss counts: all of an update, whatever its layout, for which "
        "several micro-batches of stage 1 pass the stack up to the last MoE layer once more; or each micro-batch by "
        "itself over all ranks, as the authors' code counts, which makes the loss depend on parallel.micro_batch and "
        "the number of ranks",
    )
    distill_weight: float = Field(
        0.3, ge=0, description="weight of the distillation loss (paper: 1, authors' code: 0.3)"
    )
    router_input: Literal["raw", "normalized"] = Field(
        "raw",
        description="what the centroids meet: the residual stream as it is (paper) or at unit root mean square, which "
        "bounds gates and gradients but not which expert is best",
    )
    gate: GateName = Field(
        "own",
        description="weight of what an expert adds to a token, from their affinity s (docs/method.md). own: the "
        "router's, sigmoid(s) in the paper; doubled: 2 sigmoid(s), about 1 at the start; learned: 2 sigmoid(a s + b), "
        "with a and b learned for each expert, the same at the start; one: 1 always",
    )
    centroid_gain: float = Field(0.1, gt=0, description="norm of each centroid at the start")
    equal_experts: bool = Field(False, description="start all experts of a layer alike, as the authors' code does")
    distilled: DistilledConfig = Field(default_factory=DistilledConfig, description="the router of token ids")
    hash_table: Literal["random", "even"] = Field(
        "random",
        description="table of router hash: each id at random, or the heaviest ids first, each to the emptiest expert",
    )
    table: PathText | None = Field(
        None,
        description="table of router table: a file of 'stablemoe table build', or routing_table.safetensors of a run, "
        "for the run's tokenizer and the model's experts, top_k and number of MoE layers; or random, even, scattered "
        "or cooccurrence, to build one from the training text when the run begins. A run that continues follows the "
        "table in its checkpoint",
    )
    table_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="options of that builder, as 'stablemoe table build' takes them, e.g. {max_load: 1.2}",
    )
    table_load: float = Field(
        1.1, ge=1, description="router stablemoe_balanced: largest max/mean load of its table, where frequencies allow"
    )
    bias_step: float = Field(
        0.001, gt=0, description="router topk: how far an update moves the bias of an over- or underloaded expert"
    )

    @property
    def facts(self) -> RouterFacts:
        """How the router behaves over a run."""
        return ROUTERS[self.router]

    @property
    def table_builder(self) -> str | None:
        """The builder that ``table`` names, if it names none of a file."""
        return self.table if self.facts.table_from == "file" and self.table in OPTIONS else None

    @property
    def table_file(self) -> str | None:
        """The file that ``table`` names, if it names no builder."""
        return self.table if self.facts.table_from == "file" and self.table_builder is None else None

    @property
    def gate_name(self) -> str:
        """The kind of gate, a key of ``gates.GATES``: the named one, or the router's own."""
        return self.facts.gate if self.gate == "own" else self.gate

    @property
    def gate_facts(self) -> GateFacts:
        """What is known of the gate."""
        return GATES[self.gate_name]

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

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: list[int]) -> list[int]:
        if layers != sorted(set(layers)):
            raise ValueError(f"layers must ascend without repeats; nearest that works: {sorted(set(layers))}")
        return layers

    @model_validator(mode="after")
    def _has_layers(self) -> MoEConfig:
        facts = self.facts
        if facts.layer == "none" and self.layers:
            raise ValueError(f"router '{self.router}' has no MoE layer: leave moe.layers empty, or name another router")
        if facts.layer != "none" and not self.layers:
            raise ValueError(f"router '{self.router}' needs moe.layers, e.g. [6]; or set router: dense")
        if facts.table_from == "file" and self.table is None:
            raise ValueError(
                f"router '{self.router}' needs moe.table: the file of a table, which 'stablemoe table build' makes, or "
                f"how to build one: {', '.join(OPTIONS)}"
            )
        if self.table_builder is not None:
            try:
                read_options(self.table_builder, self.table_options)
            except UserError as error:
                raise ValueError(str(error)) from error
        elif self.table_options:
            raise ValueError(
                f"table_options are for a table that the run builds: set moe.table to {', '.join(OPTIONS)}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        if self.top_k > 1 and facts.one_expert:
            raise ValueError(f"router '{self.router}' gives a token one expert, not top_k {self.top_k}: set top_k 1")
        if facts.layer in ("deep", "wide") and self.shared_experts:
            raise ValueError(f"router '{self.router}' has no experts, shared ones neither: set shared_experts 0")
        if facts.table_from == "scores and counts" and self.distilled.kind != "word":
            raise ValueError(f"a {self.distilled.kind} router has no table to balance: set distilled.kind word")
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
                f"gate '{self.gate_name}' has no gradient and {reason}, so nothing teaches the centroids of router "
                f"'{self.router}'; nearest that works: gate doubled"
            )
        return self


class Source(Section):
    """One corpus of a blend, as ``stablemoe data prepare`` has written it: .bin, .idx, .json and .counts.npy."""

    path: PathText = Field(description="common path of these files, without the endings")
    weight: float = Field(1.0, gt=0, description="share of this source in the blend, relative to the others")


class DataConfig(Section):
    """Tokenizer, corpora and how they are cut into sequences.

    Paths start in the directory a command is given in; ~ and ~user at the start of one are home directories.
    """

    tokenizer: PathText | None = Field(
        None, description="sentencepiece .model file, or a tokenizer.json of Hugging Face"
    )
    train: list[Source] = Field(default_factory=list, description="blend to train on: paths, or {path, weight}")
    valid: list[Source] = Field(default_factory=list, description="validation corpora, read from end to end")
    test: list[Source] = Field(default_factory=list, description="test corpora, read from end to end")
    sequence_length: PositiveInt = Field(1024, description="tokens of one training sequence")
    document_mask: Literal["none", "attention", "attention_and_positions"] = Field(
        "none",
        description="none: a token attends to all that is before it in its sequence, other documents included; "
        "attention: to its own document only, in training and evaluation; attention_and_positions: learned positions "
        "start at each document, too (rotary ones are relative, so it makes no difference to them)",
    )
    eos_id: int | None = Field(None, ge=0, description="id that ends each document; null: the tokenizer's")
    workers: int = Field(1, ge=0, description="processes that read ahead; 0: the training process reads itself")

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        """A single path and plain strings are shorthand for sources of weight 1."""
        items = [value] if isinstance(value, (str, dict)) else value
        if isinstance(items, list):
            return [{"path": item} if isinstance(item, str) else item for item in items]
        return items


class OptimizerConfig(Section):
    """AdamW. One learning rate for everything that is trained."""

    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.98), description="Adam's decay rates")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled decay of matrices; never of biases, norms or the router"
    )
    clip: float = Field(1.0, ge=0, description="bound on the global gradient norm; 0: none")


class ScheduleConfig(Section):
    """How long, how much a step, and the learning rate on the way."""

    steps: PositiveInt = Field(description="optimizer updates")
    tokens_per_step: PositiveInt = Field(description="tokens of one update over all ranks and accumulation steps")
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="what follows the warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="learning rate at the end, relative to the peak")


class PlateauConfig(Section):
    """Switch when agreement, churn and load have all levelled off."""

    window: PositiveInt = Field(50, description="updates over which a change is measured")
    tolerance: float = Field(0.01, gt=0, description="largest change of any of the three that still counts as level")
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
        None, ge=1, description="updates of stage 1 (the paper's S); stage 2 begins with the next"
    )
    at_fraction: float | None = Field(None, gt=0, lt=1, description="the same, as a fraction of the run")
    plateau: PlateauConfig | None = Field(None, description="switch when routing has levelled off")
    never: bool = Field(False, description="stay in stage 1 (the paper's ablation)")
    min_agreement: float = Field(0.5, ge=0, le=1, description="below this agreement of the two routers a switch warns")
    max_load_excess: float = Field(
        2.0,
        ge=1,
        description="a switch warns when the table's max/mean load exceeds what token frequencies force by this factor",
    )

    @model_validator(mode="after")
    def _one(self) -> StagesConfig:
        named = [k for k in ("at_step", "at_fraction", "plateau") if getattr(self, k) is not None]
        named += ["never"] if self.never else []
        if len(named) > 1:
            raise ValueError(
                f"give one of at_step, at_fraction, plateau, never; this has {' and '.join(named)}; take one out, e.g. "
                f"stages.{named[0]}=null"
            )
        return self


class ParallelConfig(Section):
    """How the run is laid over processes. The data-parallel degree follows: world size / tensor."""

    tensor: PositiveInt = Field(1, description="tensor-parallel degree")
    expert: PositiveInt = Field(1, description="expert-parallel degree; divides moe.experts and the world size")
    expert_placement: Literal["number", "load"] = Field(
        "number",
        description="which experts a rank holds. number: consecutive ones; load: those that give every rank about the "
        "same number of tokens, by the table that routes follow and the counts of the training text. Known where a run "
        "follows a table from its first update; where it learns one, when it is continued after the switch",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage, what is sharded over data ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, "
        "3 weights too (fp32 only)",
    )
    micro_batch: PositiveInt | None = Field(
        None, description="sequences a rank handles at once; null: the whole share of the rank in one go"
    )
    dispatch_parts: PositiveInt = Field(
        1, description="parts that the tokens of an MoE layer are cut into: one travels while experts serve another"
    )
    recompute: bool = Field(False, description="recompute activations of each block in the backward pass")
    compile: bool = Field(
        False,
        description="torch.compile the transformer blocks and, where a GPU serves all experts at once, the experts: "
        "fuses what is between matrix products, after a minute of compiling; needs a C++ compiler. Dropout draws other "
        "numbers; above parallel.tensor 1 a block is compiled in pieces, between its all-reduces",
    )
    timeout_minutes: float = Field(10.0, gt=0, description="how long a collective may wait before the run stops")


class PrecisionConfig(Section):
    """Arithmetic of the model. Router, gate, auxiliary losses and optimizer are fp32 always."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="weights and activations")
    loss_scale: float = Field(0, ge=0, description="fp16 only; 0: dynamic")


class CheckpointConfig(Section):
    """When the run is saved and how much is kept."""

    every: int = Field(0, ge=0, description="updates between checkpoints; 0: at the end and on SIGTERM only")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    resume: bool = Field(
        True,
        description="continue from the newest checkpoint in run_dir if there is one, even if settings have changed",
    )
    asynchronous: bool = Field(
        True,
        description="train on while a thread writes; the update waits for the copy to host memory only, which takes "
        "12 bytes a parameter, divided over the ranks",
    )
    verify: Literal["size", "hash"] = Field(
        "hash",
        description="what is held against the manifest before a checkpoint is used: file sizes, or the content, too; "
        "ranks share the reading, which takes about a second for each 1.5 GB of a rank's share",
    )
    fallback: bool = Field(
        True,
        description="if the newest checkpoint is damaged, go on from the newest sound one with a warning; "
        "false: refuse, and name it",
    )


class FaultsConfig(Section):
    """When numbers go wrong. An update whose loss or gradient is not finite is dropped by all ranks alike.

    At fp16 a gradient that overflows is no fault: DeepSpeed drops the update and lowers its loss scale.
    """

    skip_limit: PositiveInt = Field(
        3, description="updates dropped in a row after which the run goes back to its newest checkpoint, past that data"
    )
    rollback_limit: int = Field(
        2, ge=0, description="times a run goes back to the same checkpoint before it ends with an error"
    )
    spike_factor: float | None = Field(
        None, gt=1, description="drop updates whose loss exceeds the median of recent ones by this factor; null: none"
    )
    spike_window: PositiveInt = Field(50, description="kept updates that a spike is measured against")


class LoggingConfig(Section):
    """What is told while the run goes on."""

    every: PositiveInt = Field(10, description="updates between two log lines")
    eval_every: int = Field(0, ge=0, description="updates between two validations; 0: at the switch and the end only")
    eval_tokens: PositiveInt | None = Field(
        None, description="validation tokens a time while training; null: all of them"
    )
    probe_every: int = Field(
        0, ge=0, description="updates between two records of the routing of the probe set; 0: 50 a run"
    )
    probe_tokens: PositiveInt = Field(16_384, description="size of the fixed probe set")
    tensorboard: bool = Field(True, description="write TensorBoard events to run_dir/tensorboard")
    wandb_project: str | None = Field(None, description="Weights & Biases project; needs the wandb extra")


class RunConfig(Section):
    """A whole run. ``load.load_run`` makes one from YAML and ``key=value`` overrides."""

    name: NameText = Field("run", description="what this run is called")
    run_dir: PathText | None = Field(None, description="where it leaves everything; null: runs/<name>")
    seed: int = Field(1234, ge=0, description="initialisation, data order and random victims follow from it")
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
        default_factory=dict, description="merged last into the derived DeepSpeed config"
    )

    @property
    def directory(self) -> str:
        """Run directory, relative to where the command is started unless absolute."""
        return self.run_dir or f"runs/{self.name}"
