"""The section ``moe``: where MoE layers are, what an expert is, and who routes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from stablemoe_ds.config.gate_facts import GATES, GateFacts, GateName
from stablemoe_ds.config.routers import ROUTERS, RouterFacts, RouterName
from stablemoe_ds.config.section import Section
from stablemoe_ds.config.table_options import OPTIONS, TableText, read_options
from stablemoe_ds.errors import UserError


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
    table: TableText | None = Field(
        None,
        description="table of router table and of table_layers: a file from 'stablemoe table build', or "
        "routing_table.safetensors of a run; it must match the run's tokenizer, the model's experts and top_k, and the "
        f"number of layers that follow it. Or the builder of one ({', '.join(OPTIONS)}), which makes it from the "
        "training text when the run begins. A run that continues follows the table in its checkpoint",
    )
    start_table: TableText | None = Field(
        None,
        description="table that a learned router starts from: a file or a builder, as in table. Its centroids become "
        "the mean embedding of each expert's ids, and the distilled word router chooses what the table says; null: "
        "random centroids",
    )
    table_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="options of the builder in table or start_table, as for 'stablemoe table build', "
        "e.g. {max_load: 1.2}; the section moe.table_options lists all",
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
                read_options(self.table_builder, self.table_options, self.top_k)
            except UserError as error:
                raise ValueError(str(error)) from error
        elif self.table_options:
            if self.table is not None and not self.needs_table:
                raise ValueError(
                    f"router '{self.router}' does not follow moe.table, so table_options build nothing: set router "
                    f"table, or name the builder in start_table instead"
                )
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
