"""The configuration tree: every key, its type, default, unit and meaning.

The tree mirrors the package. Its defaults are the embedded quick start: `fedsim.main` needs no file.
Every node is frozen, refuses unknown keys and never converts a value of the wrong type.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

EMBEDDED = "embedded"
"""Value of `data.source` and `model.name_or_path` that stands for what fedsim brings along."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$"


def key(default: Any, meaning: str, unit: str = "", **rules: Any) -> Any:
    """A configuration field: its default, what it means, its unit, and pydantic rules such as `gt=0`."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


class Node(BaseModel):
    """A node of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Node):
    """What to run, where its files go, and on what."""

    name: str = key(
        "quickstart",
        "folder of this run below run.output_dir; default: the name of the configuration file",
        pattern=NAME_PATTERN,
    )
    output_dir: str = key("runs", "folder that holds the run folders", min_length=1)
    rounds: int = key(
        8, "federated rounds; a finished run can be extended by a larger number", "rounds", gt=0
    )
    seed: int = key(
        0,
        "seed of everything random: partition, cohorts, initial adapter, data order, dropout",
        ge=0,
        lt=2**63,
    )
    max_minutes: float | None = key(
        None,
        "wall time of one start: stop, to be resumed, before the round that would exceed it, judged by the longest "
        "so far; leave room for the last checkpoint; null: no limit",
        "minutes",
        gt=0,
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda where a GPU is visible, else cpu")
    merged_model: bool = key(
        False,
        "besides the adapter, write model/: the base with everything that was learned merged in, for transformers",
    )
    threads_per_process: int = key(
        1,
        "CPU threads of each process; at equal threads the results are equal bits, whatever the number of "
        "processes",
        "threads",
        gt=0,
        le=1024,
    )


class PartitionConfig(Node):
    """How examples are dealt out to clients."""

    name: Literal[
        "iid",
        "length_skew",
        "quantity_skew",
        "length_and_quantity",
        "label_skew",
        "natural",
        "pathological",
        "plato_label",
        "plato_quantity",
    ] = key(
        "length_skew",
        "iid: equal shares at random; length_skew: a Dirichlet mix of length classes for each client, equal shares; "
        "quantity_skew: Dirichlet shares, balanced classes (arXiv 2502.18910); length_and_quantity: Dirichlet shares "
        "and mixes; label_skew: as length_skew, by data.label_field; natural: one client for each of the num_clients "
        "most frequent values of data.client_field; pathological: classes_per_client classes for each client "
        "(arXiv 1602.05629); plato_label, plato_quantity: the samplers that arXiv 2502.18910 most likely used, whose "
        "clients overlap. No example is in two clients under the others",
    )
    num_clients: int = key(20, "clients of the federation", "clients", gt=0)
    dirichlet_alpha: float = key(
        1.0,
        "concentration of the Dirichlet draw: small is skewed, large is even (not used by iid, natural and "
        "pathological)",
        gt=0,
    )
    quantity_alpha: float | None = key(
        None,
        "length_and_quantity: concentration of the draw of sizes; null: that of dirichlet_alpha",
        gt=0,
    )
    num_length_classes: int = key(
        5,
        "length classes, cut at quantiles of the untruncated length (arXiv 2502.18910: 5)",
        "classes",
        gt=0,
        le=1000,
    )
    length_unit: Literal["tokens", "words", "characters"] = key(
        "tokens", "what a text's length is counted in"
    )
    length_edges: tuple[Annotated[float, Field(gt=0)], ...] | None = key(
        None,
        "longest length of each length class but the last, ascending, in length_unit; null: quantiles",
        min_length=1,
    )
    class_by: Literal["length", "label"] = key(
        "length",
        "classes of quantity_skew, length_and_quantity, pathological and plato_label: length classes, or the values "
        "of data.label_field",
    )
    classes_per_client: int = key(
        2, "classes of each client under pathological (arXiv 1602.05629: 2)", "classes", gt=0
    )
    examples_per_client: int | None = key(
        None,
        "equal share of a client under iid, length_skew, label_skew, pathological and plato_label; null: as many as "
        "the corpus allows, and 1000 under plato_label, as in Plato's example",
        "examples",
        gt=0,
    )
    min_examples: int = key(
        2,
        "least examples of a client under quantity_skew, length_and_quantity, natural and plato_quantity",
        "examples",
        gt=0,
    )


class InstructionConfig(Node):
    """Instruction data: prompts and answers in place of plain texts."""

    format: Literal["off", "rows", "client_lines", "natural_instructions", "flexlora"] = key(
        "off",
        "off: plain texts; rows: one example for each row of data.source; client_lines: a JSONL file with one line "
        "for each client, its examples in lists; natural_instructions: that repository's task files, client = task "
        "(arXiv 2204.07705); flexlora: files local_{training,eval,test}_<client>.json (arXiv 2402.11505, code)",
    )
    instruction_field: str = key("instruction", "rows: column that holds the instruction", min_length=1)
    input_field: str | None = key(
        "input", "rows: column that holds the input, which may be empty; null: there is none", min_length=1
    )
    output_field: str = key(
        "output",
        "rows: column that holds the answer: a text, or a list of texts of which the first is to be learned",
        min_length=1,
    )
    task_field: str | None = key(None, "rows: column that holds the task; null: there is none", min_length=1)
    category_field: str | None = key(
        None, "rows: column that holds the task's category; null: there is none", min_length=1
    )
    part_field: str | None = key(
        None,
        "rows: column that says whether a client trains on a row (train, training) or keeps it for its own evaluation "
        "(eval, validation, dev) or test (test); null: data.client_test_fraction decides",
        min_length=1,
    )
    template: Literal["alpaca", "natural_instructions", "custom"] = key(
        "alpaca",
        "the prompt: Alpaca's, as in the code of arXiv 2402.11505; definition and input, as in arXiv 2204.07705; or "
        "custom_template",
    )
    custom_template: str | None = key(
        None,
        "a prompt of your own with {instruction} and {input}, each at most once; the answer follows it directly",
        min_length=1,
    )
    custom_template_without_input: str | None = key(
        None, "the same where the input is empty; null: custom_template", min_length=1
    )
    loss_on: Literal["answer", "all"] = key(
        "answer",
        "tokens that are learned: the answer and the end of sequence, or the prompt as well (as the code of arXiv "
        "2402.11505 does)",
    )
    hold_out: Literal["none", "task", "category"] = key(
        "none",
        "global test set of clients that no one trains on: whole tasks, or all tasks of whole categories, are held "
        "out; none: data.test_split or data.test_fraction decides",
    )
    hold_out_fraction: float = key(
        0.1, "share of the tasks or categories that is held out, drawn with run.seed", "fraction", gt=0, lt=1
    )
    hold_out_names: tuple[Annotated[str, Field(min_length=1)], ...] = key(
        (), "the tasks or categories to hold out; empty: drawn"
    )
    examples_per_task: int | None = key(
        None,
        "natural_instructions: at most so many training instances of each task, drawn with run.seed; null: all",
        "examples",
        gt=0,
    )
    test_examples_per_task: int | None = key(
        100,
        "held-out tasks, or those of data.test_split: the first so many examples of each are the test set (arXiv "
        "2204.07705: 100); null: all",
        "examples",
        gt=0,
    )
    skip_clients: tuple[Annotated[int, Field(ge=0)], ...] = key(
        (), "flexlora: clients to leave out, whose files may be missing, such as [967]"
    )


class DataConfig(Node):
    """The corpus and how a text becomes training data."""

    source: str = key(
        EMBEDDED,
        "embedded (docstrings of this Python's standard library), a Hugging Face dataset id, or a local "
        "JSONL, JSON, CSV, parquet or text file or a folder of such files; data.instruction.format says what else",
        min_length=1,
    )
    subset: str | None = key(
        None,
        "configuration name of a Hugging Face dataset that has several; natural_instructions: folder of the lists of "
        "tasks below splits, null: default",
        min_length=1,
    )
    train_split: str = key("train", "split that the clients hold", min_length=1)
    test_split: str | None = key(
        None,
        "split of the global test set; null: data.test_fraction of the training split is held out before the "
        "partition",
        min_length=1,
    )
    test_fraction: float = key(
        0.1, "share of the training split held out when data.test_split is null", "fraction", gt=0, lt=1
    )
    text_field: str = key("text", "column that holds the text", min_length=1)
    label_field: str | None = key(
        None,
        "column with a class label, for label_skew and data.partition.class_by=label; instruction files: the category",
        min_length=1,
    )
    client_field: str | None = key(
        None,
        "column with a natural client, for data.partition.name=natural; embedded: the module of a docstring; "
        "instruction files: the client",
        min_length=1,
    )
    max_examples: int | None = key(
        None, "use at most this many training examples, drawn with run.seed; null: all", "examples", gt=0
    )
    max_tokens: int = key(
        128,
        "longest sequence; a longer text is cut at its end, instruction data in the prompt (arXiv 2502.18910: 128)",
        "tokens",
        gt=1,
    )
    on_empty: Literal["error", "drop"] = key(
        "error", "what to do with a text that leaves no label token: stop, or drop it and count it"
    )
    client_test_fraction: float = key(
        0.1,
        "share of each client's examples that it never trains on: its own test set; not used where instruction data "
        "says which examples these are and data.partition.name is natural",
        "fraction",
        ge=0,
        lt=1,
    )
    instruction: InstructionConfig = Field(default_factory=InstructionConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)


class ModelConfig(Node):
    """The frozen base model."""

    name_or_path: str = key(
        EMBEDDED,
        "embedded (a tiny OPT, trained once in seconds and cached), a Hugging Face model id, or a local "
        "folder of a causal language model",
        min_length=1,
    )
    revision: str | None = key(None, "branch, tag or commit on the hub", min_length=1)
    tokenizer: str | None = key(
        None, "id or folder of the tokenizer; null: the one beside the model", min_length=1
    )
    trust_remote_code: bool = key(False, "let a hub repository run its own Python code")
    allow_pickle: bool = key(False, "accept weights in PyTorch's pickle format as well; they can run code")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = key(
        "auto",
        "type of the base weights and of the products with them; auto: bfloat16 on a GPU, float32 on a CPU; adapters, "
        "their gradients and their optimizers stay in float32 (float64 for float64)",
    )
    quantization: Literal["none", "int8", "nf4", "fp4"] = key(
        "none",
        "bits in which the weights of linear modules but the output head are kept: 8 (int8), 4 (nf4: NormalFloat, "
        "arXiv 2305.14314; fp4), by bitsandbytes (pip install 'fedsim[quantization]'); products take the dequantized "
        "weight in model.dtype",
    )
    sharding: Literal["none", "zero3"] = key(
        "none",
        "zero3: no process holds the whole base; the weights are split over the processes of a group and gathered "
        "module by module, by DeepSpeed's ZeRO-3 (pip install 'fedsim[deepspeed]'); slower, for bases that do not fit",
    )
    sharding_group_size: int | None = key(
        None,
        "processes that share one copy of the base under sharding; a divisor of their number; null: all of them",
        "processes",
        ge=2,
    )
    offload: Literal["none", "cpu"] = key(
        "none", "under sharding, cpu: keep the parts in main memory, and gather on the GPU"
    )
    max_memory_gib: float | None = key(
        None,
        "refuse a base whose weights, or this process's part of them, take more; null: no limit",
        "GiB",
        gt=0,
    )
    cpu_linear: Literal["auto", "torch", "onednn"] = key(
        "auto",
        "products with the frozen weights on a CPU: torch's own, or oneDNN's with weights packed once, which takes "
        "about twice the linear weights' memory more; auto: oneDNN on CPUs where it is known to pay",
    )
    dropout: Literal["off", "as_config"] = key(
        "off",
        "the base's own dropout in local training; as_config: as its config says, which is what the papers' "
        "code does, since Hugging Face's trainer puts the model into training mode",
    )


class TierConfig(Node):
    """A resource tier: clients with the same LoRA ranks."""

    share: float = key(
        1.0, "probability of a client being of this tier; shares are divided by their sum", gt=0
    )
    rank: int = key(..., "LoRA rank", gt=0)
    module_ranks: dict[str, Annotated[int, Field(gt=0)]] = key(
        {}, "other ranks for some modules, by their names or the ends of them"
    )


class RankPhaseConfig(Node):
    """LoRA ranks from a round on."""

    from_round: int = key(..., "first round of the phase, counted from 0", "rounds", ge=0)
    scale: float = key(
        ..., "factor on all LoRA ranks, which are rounded, halves up, to 1 at least", gt=0, le=1
    )


class LoraConfig(Node):
    """The adapter that clients train."""

    rank: int = key(2, "LoRA rank (arXiv 2502.18910: 2)", gt=0)
    lora_alpha: float = key(
        16.0,
        "LoRA alpha; the product B A is scaled by lora_alpha / rank (arXiv 2402.11505 and Plato: 16)",
        gt=0,
    )
    dropout: float = key(
        0.05, "dropout on the adapter's input (arXiv 2402.11505 and Plato: 0.05)", "probability", ge=0, lt=1
    )
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = key(
        ("q_proj", "v_proj"),
        "names, or ends of dotted names, of the linear modules that get an adapter",
        min_length=1,
    )
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(rank) instead (arXiv 2312.03732)")
    tiers: tuple[TierConfig, ...] = key(
        (),
        "resource tiers with LoRA ranks of their own, such as [{share: 0.8, rank: 8}, {share: 0.2, rank: 30, "
        "module_ranks: {fc1: 200, fc2: 200}}]; each client is of one tier for the whole run; empty: all have lora.rank",
    )
    distribution: (
        Literal[
            "homogeneous",
            "uniform",
            "heavy_tail_light",
            "heavy_tail_light_readme",
            "normal",
            "normal_code",
            "heavy_tail_strong",
            "heavy_tail_strong_readme",
            "by_size",
        ]
        | None
    ) = key(
        None,
        "instead of lora.tiers: the resource types 1 to 4 of arXiv 2402.11505 (LoRA rank 8; 30; 30, and 200 on the "
        "feed-forward; 200) with shares in percent of homogeneous 100/0/0/0, uniform 25/25/25/25, heavy_tail_light "
        "80/5/5/10 (.._readme 85/5/5/5), normal 5.75/44.25/44.25/5.75 (.._code 5.75/5.75/44.25/44.25), "
        "heavy_tail_strong 5/5/10/80 (.._readme 5/5/5/85); by_size: ranks below lora.rank that grow with a client's "
        "data, as in HLoRA (arXiv 2503.00813)",
    )
    rank_scale: float = key(
        1.0,
        "factor on the LoRA ranks of arXiv 2402.11505's types, for a base of another size; ranks are rounded, to 1 at "
        "least, and lora.lora_alpha stays as it is",
        gt=0,
        le=100,
    )
    rank_schedule: tuple[RankPhaseConfig, ...] = key(
        (),
        "LoRA ranks that change with the round, such as [{from_round: 0, scale: 0.25}, {from_round: 20, scale: 1.0}]; "
        "before the first phase, and when empty, ranks are whole",
    )


class CohortConfig(Node):
    """Which clients take part in a round. Set one of size, fraction and client_ids."""

    sampling: Literal["fixed", "poisson", "flexlora"] = key(
        "fixed",
        "fixed: exactly so many clients, without replacement; poisson: each client by itself with probability size / "
        "num_clients, as differential privacy needs it; a round may then be empty; flexlora: as fixed, but the very "
        "clients that the code of arXiv 2402.11505 draws (its seed is run.seed=42)",
    )
    size: int | None = key(
        8,
        "clients of a round, drawn without replacement; null when one of the others is set",
        "clients",
        gt=0,
    )
    fraction: float | None = key(
        None, "share of all clients, rounded down, at least one client", "fraction", gt=0, le=1
    )
    client_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = key(
        None, "the same clients in every round, counted from 0", min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _size_gives_way(cls, node: Any) -> Any:
        """The default size stands only while neither of the other two is set."""
        if not isinstance(node, dict) or "size" in node:
            return node
        others_are_set = any(node.get(other) is not None for other in ("fraction", "client_ids"))
        return {**node, "size": None} if others_are_set else node

    def clients_a_round(self, num_clients: int) -> float:
        """Clients of a round, of so many in all; a whole number, unless they are drawn independently, then the mean."""
        if self.client_ids is not None:
            return len(self.client_ids)
        if self.fraction is None:
            assert self.size is not None
            return self.size
        if self.sampling == "poisson":
            return self.fraction * num_clients
        # the epsilon keeps 0.3 of 10 clients at 3, not 2
        return max(1, math.floor(self.fraction * num_clients + 1e-9))


class OutageConfig(Node):
    """Clients that cannot be drawn in some rounds."""

    from_round: int = key(..., "first round of the outage, counted from 0", "rounds", ge=0)
    until_round: int = key(..., "first round in which the clients are back", "rounds", gt=0)
    client_ids: tuple[Annotated[int, Field(ge=0)], ...] = key((), "who; empty: a share of all clients")
    share: float = key(
        1.0, "share of all clients, drawn with run.seed and rounded down", "fraction", gt=0, le=1
    )


class DeviceConfig(Node):
    """The hardware and the link of a client, as simulated."""

    tokens_per_s: float = key(..., "tokens of local training in a second", "tokens/s", gt=0)
    uplink_mbps: float = key(..., "from the client to the server", "Mbit/s", gt=0)
    downlink_mbps: float = key(..., "from the server to the client", "Mbit/s", gt=0)


class SlownessConfig(Node):
    """A random factor on the simulated time of local training."""

    name: Literal["none", "lognormal", "pareto", "uniform"] = key(
        "none",
        "lognormal: exp(spread z); pareto: at least 1, with tail index spread; uniform: in [1, 1 + spread)",
    )
    spread: float = key(1.0, "see name", gt=0, le=1000)
    each_round: bool = key(True, "drawn anew in each round; false: once for each client")


class CorruptionConfig(Node):
    """Updates that arrive broken, to see what the server does with them."""

    probability: float = key(0.0, "of an update", "probability", ge=0, le=1)
    kind: Literal["nan", "inf", "scaled"] = key(
        "nan", "nan, inf: a value of each factor becomes that; scaled: the update is multiplied by scale"
    )
    scale: float = key(100.0, "kind=scaled: factor on the update")


class ClientsConfig(Node):
    """How reliable clients are, and how fast; a simulated clock runs where devices are given."""

    availability: float = key(
        1.0, "probability with which a client can be drawn in a round", "probability", gt=0, le=1
    )
    outages: tuple[OutageConfig, ...] = key(
        (),
        "clients that cannot be drawn in some rounds, such as [{from_round: 3, until_round: 5, share: 0.5}]",
    )
    dropout: float = key(
        0.0, "probability with which a drawn client never reports back", "probability", ge=0, lt=1
    )
    over_selection: float = key(
        1.0,
        "clients drawn for each one wanted, rounded up; the server goes on with the first that report",
        ge=1,
        le=100,
    )
    deadline_s: float | None = key(
        None,
        "simulated seconds after which the server no longer waits for a client; null: it waits for all",
        "seconds",
        gt=0,
    )
    devices: tuple[DeviceConfig, ...] = key(
        (),
        "one for all clients, or one for each resource tier in their order, such as [{tokens_per_s: 500, "
        "uplink_mbps: 10, downlink_mbps: 50}]; empty: no clock",
    )
    slowness: SlownessConfig = Field(default_factory=SlownessConfig)
    corruption: CorruptionConfig = Field(default_factory=CorruptionConfig)


class OptimizerConfig(Node):
    """The client's optimizer, fresh in each local run."""

    name: Literal["adamw", "sgd"] = key("adamw", "adamw (FedIT, CLLoRA) or sgd (FedAvg of arXiv 2402.11505)")
    lr: float = key(5e-3, "peak learning rate", ge=0)
    weight_decay: float = key(0.0, "decoupled for adamw, added to the gradient for sgd", ge=0)
    beta1: float = key(0.9, "adamw: decay of the gradient mean", ge=0, lt=1)
    beta2: float = key(0.999, "adamw: decay of the squared gradient mean", ge=0, lt=1)
    eps: float = key(1e-8, "adamw: added to the denominator", gt=0)
    momentum: float = key(0.0, "sgd: momentum", ge=0, lt=1)


class ScheduleConfig(Node):
    """The learning rate within one local run."""

    name: Literal["constant", "linear", "cosine"] = key(
        "linear", "after warm-up: constant, or decayed to 0 at the end of the local run"
    )
    warmup_steps: int = key(0, "steps from 0 to the peak learning rate", "steps", ge=0)


class PackConfig(Node):
    """How the cohort is cut into packs, the unit of work of a process, and how a pack is worked off."""

    num_packs: int = key(
        4,
        "packs of a round, never more than its clients; results depend on it (to rounding) and not on the number of "
        "processes, so set it to a multiple of the largest number of processes you use",
        "packs",
        gt=0,
    )
    max_slots: int = key(
        8,
        "most clients of a pack that train at the same time, fewer where LoRA ranks are very large; the others wait "
        "for a free slot",
        "clients",
        gt=0,
    )
    max_tokens: int | None = key(
        None,
        "most tokens that go through the base at once; null: 8192 on a GPU, 2048 on a CPU; a larger micro-batch of one "
        "client stays whole",
        "tokens",
        gt=0,
    )
    keep_updates_on: Literal["auto", "device", "cpu"] = key(
        "auto",
        "where trained adapters wait for the end of the round; auto: on the GPU up to a sixteenth of its memory, what "
        "is beyond in main memory; results do not depend on it",
    )


class LrPhaseConfig(Node):
    """The learning rate from a round on."""

    from_round: int = key(..., "first round of the phase, counted from 0", "rounds", ge=0)
    lr_scale: float = key(..., "factor on training.optimizer.lr, not on the factor of an earlier phase", gt=0)


class TrainingConfig(Node):
    """Local training of a client. Set local_epochs or local_steps."""

    local_epochs: int | None = key(
        1, "passes over the client's data in a round; null when local_steps is set", "epochs", gt=0
    )
    local_steps: int | None = key(None, "optimizer steps of a client in a round", "steps", gt=0)
    batch_size: int = key(8, "examples of a forward pass", "examples", gt=0)
    gradient_accumulation_steps: int = key(
        1, "forward passes of an optimizer step; the loss is the mean over all label tokens of the step", gt=0
    )
    trainer: Literal["auto", "packed", "sequential"] = key(
        "auto",
        "packed: the clients of a pack go through the base together; sequential: one after another; auto: packed, or "
        "sequential with a warning where the model cannot be packed",
    )
    gradient_checkpointing: bool = key(
        False, "packed trainer: compute activations again in the backward pass instead of keeping them"
    )
    on_not_finite: Literal["fail", "drop"] = key(
        "fail",
        "a client whose loss or adapter is not finite ends the run, or is left out of the round and counted",
    )
    max_update_norm: float | None = key(
        None,
        "largest norm of a client's update, over all its factors together; null: any that is finite",
        gt=0,
    )
    on_large_update: Literal["fail", "drop", "clip"] = key(
        "fail",
        "an update above max_update_norm ends the run, is left out of the round, or is scaled down to it; counted and "
        "logged",
    )
    max_grad_norm: float | None = key(
        1.0, "clip each client's gradient to this norm; null: do not clip", gt=0
    )
    proximal_mu: float = key(
        0.0,
        "FedProx (arXiv 1812.06127): adds mu/2 times the squared distance from the received factors",
        ge=0,
    )
    round_schedule: tuple[LrPhaseConfig, ...] = key(
        (),
        "learning rates of clients that change with the round, such as [{from_round: 15, lr_scale: 0.5}], which is "
        "what the code of arXiv 2402.11505 does; before the first phase, and when empty, the factor is 1",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    pack: PackConfig = Field(default_factory=PackConfig)

    @model_validator(mode="before")
    @classmethod
    def _epochs_give_way(cls, node: Any) -> Any:
        """The default local_epochs stands only while local_steps is not set."""
        if isinstance(node, dict) and "local_epochs" not in node and node.get("local_steps") is not None:
            return {**node, "local_epochs": None}
        return node


STRATEGY_NAMES = (
    "fedavg",
    "local",
    "centralized",
    "flexlora",
    "flexlora_delta",
    "flexlora_partitioned",
    "hlora",
    "hetlora",
    "hetlora_naive",
    "rbla",
    "flora",
    "fedex",
    "ffa",
    "rolora",
    "fedsa",
    "fedsvd",
    "florist",
    "slora",
    "scaffold",
)
STRATEGY_PATTERN = rf"^({'|'.join(STRATEGY_NAMES)}|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"


OPTION_PATTERN = r"^[A-Za-z_]\w*="


class HetLoraConfig(Node):
    """Strategy hetlora (arXiv 2401.06432)."""

    pruning_factor: float = key(
        0.99, "gamma: share of its rank that a client keeps when it prunes itself; 1: no pruning", gt=0, le=1
    )
    tail_penalty: float = key(
        1e-3, "lambda: weight of the penalty on the rank rows that pruning would cut", ge=0
    )
    min_rank: int = key(1, "least LoRA rank after pruning", gt=0)


class FloristConfig(Node):
    """Strategy florist (arXiv 2506.09199)."""

    energy: float = key(
        0.99, "share of the squared singular values that the global adapter keeps", "fraction", gt=0, le=1
    )


class SloraConfig(Node):
    """Strategy slora (arXiv 2308.06522)."""

    rounds: int = key(
        5, "rounds of sparse full-weight training before LoRA (arXiv 2402.11505: 5)", "rounds", gt=0
    )
    density: float = key(
        0.0012,
        "share of the weights that train in these rounds (arXiv 2402.11505: 0.0012)",
        "fraction",
        gt=0,
        le=1,
    )
    tier_densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = key(
        (),
        "instead of density: the share for clients of each tier, in the order of lora.tiers, or of types 1 to 4 with "
        "lora.distribution (code of arXiv 2402.11505: [0.0012, 0.0246, 0.0822, 0.1222]); the weights of a smaller "
        "share are among those of every larger one; empty: density for all",
        "fraction",
    )
    then: Literal["fedavg", "flexlora", "hetlora", "hetlora_naive"] = key(
        "fedavg", "strategy of the rounds after them; strategy.hetlora holds for hetlora here too"
    )


class StrategyConfig(Node):
    """The federated method."""

    name: str = key(
        "fedavg",
        "one of "
        + ", ".join(STRATEGY_NAMES)
        + "; or a class of your own as package.module:Class (docs/strategies.md describes all)",
        pattern=STRATEGY_PATTERN,
    )
    options: tuple[Annotated[str, Field(pattern=OPTION_PATTERN)], ...] = key(
        (), "arguments for a class of your own, each as name=value"
    )
    hetlora: HetLoraConfig = Field(default_factory=HetLoraConfig)
    florist: FloristConfig = Field(default_factory=FloristConfig)
    slora: SloraConfig = Field(default_factory=SloraConfig)


class ServerOptimizerConfig(Node):
    """A server optimizer around a strategy that averages factors (arXiv 2003.00295; fedavgm: arXiv 1909.06335)."""

    name: Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = key(
        "none", "none: the mean of the cohort is the next adapter"
    )
    lr: float | None = key(
        None,
        "server learning rate; null: 1 for fedavgm, else 0.01, which is our choice: the paper tunes it",
        gt=0,
    )
    beta1: float = key(0.9, "decay of the mean change; not used by fedadagrad", ge=0, lt=1)
    beta2: float = key(0.99, "fedadam, fedyogi: decay of the mean squared change", ge=0, lt=1)
    tau: float = key(1e-3, "added to the root of the mean squared change; not used by fedavgm", gt=0)


class PrivacyConfig(Node):
    """Client-level differential privacy (arXiv 1710.06963), for strategies that average factors."""

    clip_norm: float | None = key(
        None, "norm to which each client's whole update is clipped; null: no differential privacy", gt=0
    )
    noise_multiplier: float = key(
        1.0, "standard deviation of the noise on the sum of updates / clip_norm", ge=0
    )
    delta: float = key(1e-5, "delta of the (epsilon, delta) that is reported as privacy/epsilon", gt=0, lt=1)


class AggregationConfig(Node):
    """How the server combines updates."""

    client_weights: Literal["examples", "tokens", "uniform"] = key(
        "examples", "weight of a client: its training examples, its label tokens, or 1"
    )
    svd_device: Literal["cpu", "cuda"] = key(
        "cpu", "where the server's mathematics runs: on the CPU, or on the GPU of the process"
    )
    svd_placement: Literal["root", "sharded"] = key(
        "root",
        "root: rank 0 aggregates all modules, as the papers do; sharded: each process some of them, with equal bits",
    )
    server_optimizer: ServerOptimizerConfig = Field(default_factory=ServerOptimizerConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)


class AnswersConfig(Node):
    """Scores of the global model's answers on the global test set; for instruction data."""

    metric: Literal["off", "generated", "teacher_forced", "teacher_forced_published"] = key(
        "off",
        "generated: Rouge-L and exact match of greedy answers; teacher_forced: Rouge-L of next-token guesses over the "
        "whole text, which is no measure of answers; ..._published: the same without the shift by one token, as in the "
        "code of arXiv 2402.11505",
    )
    max_new_tokens: int = key(128, "most tokens of a generated answer", "tokens", gt=0)
    max_examples: int | None = key(
        None, "use at most this many test examples, drawn with run.seed; null: all", "examples", gt=0
    )


class EvaluationConfig(Node):
    """What is measured, and how often."""

    every_rounds: int = key(
        1, "evaluate after every so many rounds, and always after the last", "rounds", gt=0
    )
    client_test: Literal["common", "own_split", "off"] = key(
        "common",
        "test set of a client's adapter before and after local training: the global test set (as Plato does, "
        "which arXiv 2502.18910 most likely used), the client's own held-out examples, or none",
    )
    max_test_examples: int | None = key(
        None, "use at most this many test examples, drawn with run.seed; null: all", "examples", gt=0
    )
    max_client_test_examples: int | None = key(
        100, "as above, for the test of one client; null: all", "examples", gt=0
    )
    batch_tokens: int = key(4096, "most tokens of an evaluation batch, padding included", "tokens", gt=0)
    answers: AnswersConfig = Field(default_factory=AnswersConfig)


class EarlyStoppingConfig(Node):
    """Whether to stop before the last round, and which state to export."""

    metric: Literal["off", "test_loss", "validation_loss", "test_rouge_l", "validation_rouge_l"] = key(
        "off",
        "what must go on improving, in rounds that are evaluated; test: the global model after the round, on the "
        "global test set; validation: the global model before the round, on what its clients keep for their own "
        "evaluation, weighted by their training examples (code of arXiv 2402.11505); rouge_l: as in evaluation.answers",
    )
    patience: int = key(
        3,
        "evaluations in a row without improvement that are put up with; one more stops the run (arXiv 2402.11505: 3, "
        "so it stops at the fourth)",
        "evaluations",
        ge=0,
    )
    min_delta: float = key(0.0, "an improvement must be larger than this", ge=0)
    from_round: int = key(
        0, "evaluations in rounds before this one, counted from 0, do not count", "rounds", ge=0
    )
    export: Literal["best", "last"] = key(
        "best",
        "the state that becomes adapter/: that of the best evaluation, whose checkpoint is kept, or the last one",
    )


class CommConfig(Node):
    """How processes talk to each other."""

    backend: Literal["auto", "gloo", "nccl"] = key("auto", "auto: nccl on GPUs, gloo on CPUs")
    timeout_s: float = key(
        1800.0,
        "a collective that takes longer ends the run; longest imbalance of a round",
        "seconds",
        gt=0,
        le=1e7,
    )
    join_timeout_s: float = key(
        600.0,
        "how long a process waits for the others at the start, and no longer than timeout_s",
        "seconds",
        gt=0,
    )


class CheckpointConfig(Node):
    """Resumable state on disk."""

    every_rounds: int = key(
        1, "write a checkpoint after every so many rounds, and after the last", "rounds", gt=0
    )
    keep_last: int = key(
        2,
        "how many of the newest checkpoints to keep, besides the best with early_stopping",
        "checkpoints",
        gt=0,
    )


class WandbConfig(Node):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = key(
        "offline",
        "offline needs no account: upload later with `wandb sync`; online without a login is recorded "
        "offline",
    )
    project: str = key("fedsim", "project", min_length=1)
    entity: str | None = key(None, "team or user; null: the account's default", min_length=1)
    group: str | None = key(None, "group of runs, for example one sweep", min_length=1)
    name: str | None = key(None, "name shown for the run; null: run.name", min_length=1)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = key((), "tags of the run")
    log_adapter: bool = key(True, "store the final adapter as an artifact")


class TrackingConfig(Node):
    """What is shown and recorded while the run goes on."""

    progress: Literal["auto", "live", "plain", "off"] = key(
        "auto", "auto: a live display in a terminal, plain lines elsewhere"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig)


class Config(Node):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    cohort: CohortConfig = Field(default_factory=CohortConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    comm: CommConfig = Field(default_factory=CommConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
