"""Section `data`: the corpus, how it is read, and how it is dealt out to clients."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.config.node import EMBEDDED, Node, key, one_of_or_own

PARTITIONERS = (
    "iid",
    "length_skew",
    "quantity_skew",
    "length_and_quantity",
    "label_skew",
    "natural",
    "pathological",
    "plato_label",
    "plato_quantity",
)
PARTITIONER_PATTERN = one_of_or_own(PARTITIONERS)


class PartitionConfig(Node):
    """How examples are dealt out to clients."""

    name: str = key(
        "length_skew",
        "iid: equal shares at random; length_skew: a Dirichlet mix of length classes for each client, equal shares; "
        "quantity_skew: Dirichlet shares, balanced classes (arXiv 2502.18910); length_and_quantity: Dirichlet shares "
        "and mixes; label_skew: as length_skew, by data.label_field; natural: one client for each of the num_clients "
        "most frequent values of data.client_field; pathological: classes_per_client classes for each client "
        "(arXiv 1602.05629); plato_label, plato_quantity: the samplers that arXiv 2502.18910 most likely used, whose "
        "clients overlap. No example is in two clients under the others. Or a function of your own as "
        "package.module:function (examples/partition.py)",
        pattern=PARTITIONER_PATTERN,
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
        "(eval, validation, dev) or test (test); nobody trains on these, and data.partition.name=natural tests with "
        "them; null: data.client_test_fraction decides",
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
