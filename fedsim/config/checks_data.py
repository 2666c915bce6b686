"""Rules about data, instruction data and the partition that tie several keys together."""

import re
from collections.abc import Iterator

from fedsim.config.data_section import DataConfig, InstructionConfig, PartitionConfig
from fedsim.config.keys import show
from fedsim.config.node import EMBEDDED
from fedsim.config.rules import unused_keys

UNUSED_BY_EMBEDDED_DATA = ("subset", "train_split", "test_split", "text_field", "label_field", "client_field")
COLUMNS_OF_ROWS = (
    "instruction_field",
    "input_field",
    "output_field",
    "task_field",
    "category_field",
    "part_field",
)
HAVE_COLUMNS = ("client_lines", "natural_instructions", "flexlora")
"""Instruction formats that know their clients, tasks and categories by themselves."""
USERS_OF_PARTITION_KEYS = {
    "quantity_alpha": ("length_and_quantity",),
    "class_by": ("quantity_skew", "length_and_quantity", "pathological", "plato_label"),
    "classes_per_client": ("pathological",),
    "examples_per_client": ("iid", "length_skew", "label_skew", "pathological", "plato_label"),
}
"""Key below data.partition -> the partitioners that use it."""
DRAWS_SIZES = ("quantity_skew", "length_and_quantity", "natural", "plato_quantity")
USERS_OF_TOLERATED_KEYS = {
    "min_examples": DRAWS_SIZES,
    "dirichlet_alpha": (
        "length_skew",
        "quantity_skew",
        "length_and_quantity",
        "label_skew",
        "plato_label",
        "plato_quantity",
    ),
}
"""The same of keys that may be set for other partitioners too, since sweeps over partitions share them."""
USERS_OF_KEYS = {**USERS_OF_TOLERATED_KEYS, **USERS_OF_PARTITION_KEYS}
LEAST_CLASSES = {"length_skew": 2, "length_and_quantity": 2, "pathological": 2, "plato_label": 2}


def check_data(data: DataConfig) -> Iterator[str]:
    """Sources, splits and examples of the data."""
    if data.source == EMBEDDED:
        yield from unused_keys("data", data, UNUSED_BY_EMBEDDED_DATA, "when data.source is embedded")
    if data.test_split is not None:
        yield from unused_keys("data", data, ("test_fraction",), "when data.test_split is set")
    yield from _instruction(data, data.instruction)
    if data.instruction.format != "off":
        yield from _hold_out(data, data.instruction)
    if data.max_examples is None:
        return
    partition = data.partition
    least, times = 1, partition.num_clients
    why = f"data.partition.num_clients={partition.num_clients}"
    if partition.name in DRAWS_SIZES:
        least = partition.min_examples
        why += f" times data.partition.min_examples={least}"
    elif partition.examples_per_client is not None:
        least = partition.examples_per_client
        why += f" times data.partition.examples_per_client={least}"
    if partition.name in ("plato_label", "plato_quantity") or ":" in partition.name:  # clients may overlap
        times, why = 1, why.partition(" times ")[2] or "1"
    if data.max_examples < least * times:
        yield f"data.max_examples must be null or at least {why}, got {data.max_examples}"


def _instruction(data: DataConfig, instruction: InstructionConfig) -> Iterator[str]:
    """Keys of a format that is not in use, and templates."""
    section, form = "data.instruction", instruction.format
    because = f"when {section}.format is {form}"
    if form == "off":
        names = tuple(name for name in InstructionConfig.model_fields if name != "format")
        yield from unused_keys(section, instruction, names, because)
        return
    if data.source == EMBEDDED:
        yield f"{section}.format must be off when data.source is embedded, got {show(form)}"
    yield from unused_keys("data", data, ("text_field",), because)
    if form != "rows":
        yield from unused_keys(section, instruction, COLUMNS_OF_ROWS, because)
    if form != "natural_instructions":
        yield from unused_keys(section, instruction, ("examples_per_task",), because)
    if form != "flexlora":
        yield from unused_keys(section, instruction, ("skip_clients",), because)
    if form in ("client_lines", "flexlora"):
        yield from unused_keys("data", data, ("subset",), because)
    custom = ("custom_template", "custom_template_without_input")
    if instruction.template != "custom":
        yield from unused_keys(section, instruction, custom, "unless data.instruction.template is custom")
        return
    if instruction.custom_template is None:
        yield f"{section}.custom_template must be set when {section}.template is custom, got null"
    for name in custom:
        yield from _template(f"{section}.{name}", getattr(instruction, name))


def _template(name: str, text: str | None) -> Iterator[str]:
    if text is None:
        return
    slots = re.findall(r"\{(\w+)\}", text)
    wrong = [slot for slot in slots if slot not in ("instruction", "input")]
    if wrong or not slots or len(slots) != len(set(slots)):
        yield (
            f"{name} must hold {{instruction}} or {{input}}, each at most once, and no other name in braces, got "
            f"{show(text)}"
        )


def _hold_out(data: DataConfig, instruction: InstructionConfig) -> Iterator[str]:
    section, chosen = "data.instruction", instruction.hold_out
    if chosen == "none":
        because = f"when {section}.hold_out is none"
        yield from unused_keys(section, instruction, ("hold_out_fraction", "hold_out_names"), because)
        if data.test_split is None:
            yield from unused_keys(section, instruction, ("test_examples_per_task",), because)
        return
    because = f"when {section}.hold_out is {chosen}"
    yield from unused_keys("data", data, ("test_split", "test_fraction"), because)
    if instruction.hold_out_names:
        because = f"when {section}.hold_out_names is set"
        yield from unused_keys(section, instruction, ("hold_out_fraction",), because)
    field = f"{chosen}_field"
    if instruction.format == "rows" and getattr(instruction, field) is None:
        yield f"{section}.{field} must be set when {section}.hold_out is {chosen}, got null"


def uses_key(partitioner: str, name: str) -> bool:
    """Whether a partitioner uses a key below data.partition; a function of the user's own is given dirichlet_alpha."""
    if ":" in partitioner:
        return name not in USERS_OF_KEYS or name == "dirichlet_alpha"
    return partitioner in USERS_OF_KEYS.get(name, (partitioner,))


def check_partition(data: DataConfig) -> Iterator[str]:
    """Keys that the partitioner does not use, columns that it needs, classes."""
    partition, name = data.partition, data.partition.name
    unused = tuple(key for key in USERS_OF_PARTITION_KEYS if not uses_key(name, key))
    because = f"when data.partition.name is {name}"
    because += ", which draws the sizes" if name == "quantity_skew" else ", which does not use it"
    yield from unused_keys("data.partition", partition, unused, because)
    by_label = name == "label_skew" or partition.class_by == "label"
    has_columns = data.instruction.format in HAVE_COLUMNS
    if by_label and data.label_field is None and not has_columns:
        got = "label_skew" if name == "label_skew" else f"{name} with class_by=label"
        yield f"data.label_field must be set when data.partition.name is {got}, got null"
    if name == "natural" and data.client_field is None and data.source != EMBEDDED and not has_columns:
        yield "data.client_field must be set when data.partition.name is natural, got null"
    yield from _length_classes(partition, by_label)
    share, few = partition.examples_per_client, partition.classes_per_client
    if name == "pathological" and share is not None and share % few != 0:
        yield (
            "data.partition.examples_per_client must be null or a multiple of "
            f"data.partition.classes_per_client={few}, got {share}"
        )


def _length_classes(partition: PartitionConfig, by_label: bool) -> Iterator[str]:
    name, edges = partition.name, partition.length_edges
    if edges is not None:
        because = "when data.partition.length_edges is set"
        yield from unused_keys("data.partition", partition, ("num_length_classes",), because)
        if list(edges) != sorted(set(edges)):
            yield f"data.partition.length_edges must be strictly ascending, got {show(edges)}"
    least = LEAST_CLASSES.get(name, 1)
    if name == "pathological":
        least = max(least, partition.classes_per_client)
    got = partition.num_length_classes if edges is None else len(edges) + 1
    if by_label or got >= least:
        return
    key = "num_length_classes" if edges is None else "length_edges"
    unit = "" if edges is None else " classes"
    yield (
        f"data.partition.{key} must be at least {least}{unit} when data.partition.name is {name}, got {got}; use "
        "data.partition.name=iid for no skew"
    )


def needs_own_examples(data: DataConfig, because: str) -> Iterator[str]:
    """Clients must keep examples that they do not train on."""
    rules = data.instruction
    names_parts = rules.format in ("client_lines", "flexlora") or rules.part_field is not None
    if data.client_test_fraction == 0 and not (names_parts and data.partition.name == "natural"):
        yield f"data.client_test_fraction must be > 0 {because}, got {show(data.client_test_fraction)}"
