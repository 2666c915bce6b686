"""Rules that tie several keys together, checked before anything is loaded."""

import re
from collections.abc import Iterator

from fedsim.config.clients_section import ClientsConfig, CohortConfig, over_selected
from fedsim.config.data_section import DataConfig, InstructionConfig, PartitionConfig
from fedsim.config.evaluation_section import EvaluationConfig
from fedsim.config.keys import all_keys, show
from fedsim.config.messages import refuse
from fedsim.config.model_section import LoraConfig, ModelConfig
from fedsim.config.node import EMBEDDED
from fedsim.config.run_section import RunConfig
from fedsim.config.schema import Config
from fedsim.config.strategy_section import AggregationConfig, StrategyConfig
from fedsim.config.training_section import OptimizerConfig, TrainingConfig

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
UNUSED_BY_EMBEDDED_MODEL = ("revision", "tokenizer", "trust_remote_code", "allow_pickle")
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
LEAST_CLASSES = {"length_skew": 2, "length_and_quantity": 2, "pathological": 2, "plato_label": 2}
UNUSED_BY_OPTIMIZER = {"adamw": ("momentum",), "sgd": ("beta1", "beta2", "eps")}


def cross_checks(config: Config) -> None:
    """Refuses values that do not go together, or that would silently do nothing.

    Raises:
        ConfigError: one line that names every problem.
    """
    refuse(
        [
            *_cohort(config.cohort, config.data.partition.num_clients),
            *_clients(config),
            *_published_cohorts(config.cohort, config.run),
            *_data(config.data),
            *_partition(config.data),
            *_model(config.model, config.run),
            *_sharding(config),
            *_lora(config.lora),
            *_training(config.training),
            *_checkpointing(config.training, config.model),
            *_strategy(config.strategy),
            *_slora(config),
            *_scaffold(config),
            *_aggregation(config.aggregation, config.run),
            *_privacy(config),
            *_evaluation(config.evaluation, config.data),
            *_early_stopping(config),
            *_comm(config),
        ]
    )


def _one_of(section: str, values: dict[str, object]) -> Iterator[str]:
    """Exactly one of the keys of a section is set."""
    names = [f"{section}.{name}" for name in values]
    are_set = [f"{section}.{name}={show(value)}" for name, value in values.items() if value is not None]
    choice = f"{', '.join(names[:-1])} and {names[-1]}"
    if not are_set:
        yield f"one of {choice} must be set, got null for all"
    if len(are_set) > 1:
        yield f"only one of {choice} may be set, got {' and '.join(are_set)}; set the others to null"


def _unused(section: str, node: object, names: tuple[str, ...], because: str) -> Iterator[str]:
    """Keys that the rest of the configuration makes meaningless stay at their defaults."""
    for name in names:
        default, got = all_keys()[f"{section}.{name}"].default, getattr(node, name)
        if (list(got) if isinstance(got, tuple) else got) != default:
            yield f"{section}.{name} must stay at its default {show(default)} {because}, got {show(got)}"


def _cohort(cohort: CohortConfig, num_clients: int) -> Iterator[str]:
    limit = f"data.partition.num_clients={num_clients}"
    yield from _one_of(
        "cohort", {"size": cohort.size, "fraction": cohort.fraction, "client_ids": cohort.client_ids}
    )
    if cohort.size is not None and cohort.size > num_clients:
        yield f"cohort.size must be in [1, {limit}], got {cohort.size}"
    if cohort.sampling != "fixed" and cohort.client_ids is not None:
        yield f"cohort.sampling must be fixed when cohort.client_ids is set, got {show(cohort.sampling)}"
    if cohort.client_ids is not None:
        outside = [client_id for client_id in cohort.client_ids if client_id >= num_clients]
        if outside:
            yield f"cohort.client_ids must be below {limit}, got {show(outside)}"
        twice = sorted({i for i in cohort.client_ids if cohort.client_ids.count(i) > 1})
        if twice:
            yield f"cohort.client_ids must name each client once, got {show(twice)} more than once"


def _clients(config: Config) -> Iterator[str]:
    """Unreliable clients and the simulated clock."""
    clients, num_clients = config.clients, config.data.partition.num_clients
    yield from _clock(clients)
    for index, outage in enumerate(clients.outages):
        where = f"clients.outages[{index}]"
        if outage.until_round <= outage.from_round:
            yield f"{where}.until_round must be above from_round={outage.from_round}, got {outage.until_round}"
        outside = [client_id for client_id in outage.client_ids if client_id >= num_clients]
        if outside:
            yield f"{where}.client_ids must be below data.partition.num_clients={num_clients}, got {show(outside)}"
        if outage.client_ids and outage.share != 1:
            yield f"{where}.share must stay at its default 1.0 when client_ids is set, got {show(outage.share)}"
    if clients.corruption.kind != "scaled":
        because = f"when clients.corruption.kind is {clients.corruption.kind}"
        yield from _unused("clients.corruption", clients.corruption, ("scale",), because)
    if clients.over_selection > 1:
        yield from _over_selection(config.cohort, clients.over_selection, num_clients)
    if config.cohort.sampling == "flexlora":
        because = "with cohort.sampling=flexlora, whose cohorts are those of the published code"
        yield from _unused("clients", clients, ("availability", "outages"), because)
    if config.strategy.name == "centralized" and clients != ClientsConfig():
        yield "clients must be left at its defaults with strategy.name=centralized, which has no clients to lose"


def _clock(clients: ClientsConfig) -> Iterator[str]:
    """Keys that need simulated times."""
    if clients.devices:
        return
    because = "when clients.devices is empty, without which there is no simulated clock"
    yield from _unused("clients", clients, ("over_selection", "deadline_s"), because)
    yield from _unused("clients.slowness", clients.slowness, ("name", "spread", "each_round"), because)


def _over_selection(cohort: CohortConfig, factor: float, num_clients: int) -> Iterator[str]:
    if cohort.sampling != "fixed" or cohort.client_ids is not None:
        yield (
            "clients.over_selection must be 1 unless a fixed number of clients is drawn (cohort.size or "
            f"cohort.fraction, cohort.sampling=fixed), got {show(factor)}"
        )
        return
    wanted = int(cohort.clients_a_round(num_clients))
    if over_selected(wanted, factor) > num_clients:
        yield (
            f"clients.over_selection times the cohort of {wanted} clients must be at most "
            f"data.partition.num_clients={num_clients}, got {show(factor)}"
        )


def _published_cohorts(cohort: CohortConfig, run: RunConfig) -> Iterator[str]:
    """That code makes a seed of 32 bits from the round and its own seed (`server.cohort.published_seed`)."""
    largest = (2**32 - 1) // (20 * max(1, run.rounds - 1)) - 200
    if cohort.sampling == "flexlora" and run.seed > largest:
        yield (
            f"run.seed must be at most {largest} with cohort.sampling=flexlora and run.rounds={run.rounds}, whose "
            f"seeds have 32 bits, got {run.seed}"
        )


def _data(data: DataConfig) -> Iterator[str]:
    if data.source == EMBEDDED:
        yield from _unused("data", data, UNUSED_BY_EMBEDDED_DATA, "when data.source is embedded")
    if data.test_split is not None:
        yield from _unused("data", data, ("test_fraction",), "when data.test_split is set")
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
    if partition.name in ("plato_label", "plato_quantity"):  # clients overlap
        times, why = 1, why.partition(" times ")[2] or "1"
    if data.max_examples < least * times:
        yield f"data.max_examples must be null or at least {why}, got {data.max_examples}"


def _instruction(data: DataConfig, instruction: InstructionConfig) -> Iterator[str]:
    """Keys of a format that is not in use, and templates."""
    section, form = "data.instruction", instruction.format
    because = f"when {section}.format is {form}"
    if form == "off":
        names = tuple(name for name in InstructionConfig.model_fields if name != "format")
        yield from _unused(section, instruction, names, because)
        return
    if data.source == EMBEDDED:
        yield f"{section}.format must be off when data.source is embedded, got {show(form)}"
    yield from _unused("data", data, ("text_field",), because)
    if form != "rows":
        yield from _unused(section, instruction, COLUMNS_OF_ROWS, because)
    if form != "natural_instructions":
        yield from _unused(section, instruction, ("examples_per_task",), because)
    if form != "flexlora":
        yield from _unused(section, instruction, ("skip_clients",), because)
    if form in ("client_lines", "flexlora"):
        yield from _unused("data", data, ("subset",), because)
    custom = ("custom_template", "custom_template_without_input")
    if instruction.template != "custom":
        yield from _unused(section, instruction, custom, "unless data.instruction.template is custom")
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
        yield from _unused(section, instruction, ("hold_out_fraction", "hold_out_names"), because)
        if data.test_split is None:
            yield from _unused(section, instruction, ("test_examples_per_task",), because)
        return
    because = f"when {section}.hold_out is {chosen}"
    yield from _unused("data", data, ("test_split", "test_fraction"), because)
    if instruction.hold_out_names:
        because = f"when {section}.hold_out_names is set"
        yield from _unused(section, instruction, ("hold_out_fraction",), because)
    field = f"{chosen}_field"
    if instruction.format == "rows" and getattr(instruction, field) is None:
        yield f"{section}.{field} must be set when {section}.hold_out is {chosen}, got null"


def _partition(data: DataConfig) -> Iterator[str]:
    partition, name = data.partition, data.partition.name
    unused = tuple(key for key, users in USERS_OF_PARTITION_KEYS.items() if name not in users)
    because = f"when data.partition.name is {name}"
    because += ", which draws the sizes" if name == "quantity_skew" else ", which does not use it"
    yield from _unused("data.partition", partition, unused, because)
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
        yield from _unused("data.partition", partition, ("num_length_classes",), because)
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


def _model(model: ModelConfig, run: RunConfig) -> Iterator[str]:
    if model.name_or_path == EMBEDDED:
        yield from _unused("model", model, UNUSED_BY_EMBEDDED_MODEL, "when model.name_or_path is embedded")
    if model.quantization == "none":
        return
    because = f"when model.quantization is {model.quantization}"
    if model.dtype == "float64":
        yield f"model.dtype must be float32, bfloat16, float16 or auto {because}, got 'float64'"
    if model.cpu_linear == "onednn":
        yield f"model.cpu_linear must be auto or torch {because}, got 'onednn'"
    if run.merged_model:
        yield f"run.merged_model must be false {because}, since an adapter cannot be merged into such weights, got true"


def _sharding(config: Config) -> Iterator[str]:
    model = config.model
    if model.sharding == "none":
        yield from _unused("model", model, ("sharding_group_size", "offload"), "when model.sharding is none")
        return
    because = f"when model.sharding is {model.sharding}"
    if model.quantization != "none":
        yield f"model.quantization must be none {because}, got {show(model.quantization)}"
    if model.dtype == "float64":
        yield f"model.dtype must be float32, bfloat16, float16 or auto {because}, got 'float64'"
    if model.cpu_linear == "onednn":
        yield f"model.cpu_linear must be auto or torch {because}, got 'onednn'"
    if model.allow_pickle:
        yield f"model.allow_pickle must be false {because}, which reads parts of safetensors files, got true"
    if config.training.trainer == "sequential":
        yield f"training.trainer must be auto or packed {because}, got 'sequential'"
    if config.run.merged_model:
        yield f"run.merged_model must be false {because}, since no process holds the whole base, got true"
    if config.early_stopping.metric.startswith("validation"):
        yield f"early_stopping.metric must not be of a validation {because}, got {show(config.early_stopping.metric)}"
    if config.evaluation.answers.metric != "off":
        yield (
            f"evaluation.answers.metric must be off {because}, since texts of different lengths keep the processes "
            f"out of step, got {show(config.evaluation.answers.metric)}"
        )


def _checkpointing(training: TrainingConfig, model: ModelConfig) -> Iterator[str]:
    if not training.gradient_checkpointing:
        return
    if training.trainer == "sequential":
        yield "training.gradient_checkpointing must be false with training.trainer=sequential, got true"
    if model.dropout == "as_config":
        yield (
            "training.gradient_checkpointing must be false with model.dropout=as_config, whose masks a second forward "
            "pass would not repeat, got true"
        )


def _lora(lora: LoraConfig) -> Iterator[str]:
    if lora.tiers:
        others = ("rank", "distribution", "rank_policy", "rank_scale")
        yield from _unused("lora", lora, others, "when lora.tiers is set")
    elif lora.rank_policy is not None:
        yield from _unused("lora", lora, ("distribution", "rank_scale"), "when lora.rank_policy is set")
    elif lora.distribution is None:
        yield from _unused("lora", lora, ("rank_scale",), "when lora.distribution is null")
    elif lora.distribution == "by_size":
        because = "when lora.distribution is by_size, which takes lora.rank"
        yield from _unused("lora", lora, ("rank_scale",), because)
    else:
        because = f"when lora.distribution is {lora.distribution}, whose types have ranks of their own"
        yield from _unused("lora", lora, ("rank",), because)
    begins = [phase.from_round for phase in lora.rank_schedule]
    if begins != sorted(set(begins)):
        yield f"lora.rank_schedule must have ascending values of from_round, got {show(begins)}"
    twice = sorted({name for name in lora.target_modules if lora.target_modules.count(name) > 1})
    if twice:
        yield f"lora.target_modules must name each module once, got {show(twice)} more than once"


def _training(training: TrainingConfig) -> Iterator[str]:
    yield from _one_of(
        "training", {"local_epochs": training.local_epochs, "local_steps": training.local_steps}
    )
    warmup = training.schedule.warmup_steps
    if training.local_steps is not None and warmup > training.local_steps:
        limit = f"training.local_steps={training.local_steps}"
        yield f"training.schedule.warmup_steps must be at most {limit}, got {warmup}"
    if training.max_update_norm is None:
        yield from _unused(
            "training", training, ("on_large_update",), "when training.max_update_norm is null"
        )
    yield from _optimizer(training.optimizer)
    begins = [phase.from_round for phase in training.round_schedule]
    if begins != sorted(set(begins)):
        yield f"training.round_schedule must have ascending values of from_round, got {show(begins)}"


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    because = f"when training.optimizer.name is {optimizer.name}, which does not use it"
    yield from _unused("training.optimizer", optimizer, UNUSED_BY_OPTIMIZER[optimizer.name], because)


OPTIONS_OF = ("hetlora", "florist", "slora")


def _strategy(strategy: StrategyConfig) -> Iterator[str]:
    for section in OPTIONS_OF:
        if section in (strategy.name, strategy.slora.then if strategy.name == "slora" else None):
            continue
        node = getattr(strategy, section)
        because = f"when strategy.name is {strategy.name}"
        yield from _unused(f"strategy.{section}", node, tuple(type(node).model_fields), because)
    if ":" not in strategy.name:
        yield from _unused(
            "strategy",
            strategy,
            ("options",),
            "unless strategy.name is a class of your own (package.module:Class)",
        )


def _slora(config: Config) -> Iterator[str]:
    """Its first stage ends before the run does; densities go by tier, of which the configuration must say the order."""
    densities, lora = config.strategy.slora.tier_densities, config.lora
    if config.strategy.name != "slora":
        return
    if config.strategy.slora.rounds > config.run.rounds:
        yield (
            f"strategy.slora.rounds must be at most run.rounds={config.run.rounds}, since no LoRA factors are made "
            f"before its first stage ends, got {config.strategy.slora.rounds}"
        )
    if not densities:
        return
    key = "strategy.slora.tier_densities"
    yield from _unused("strategy.slora", config.strategy.slora, ("density",), f"when {key} is set")
    if lora.distribution == "by_size" or (lora.distribution is None and not lora.tiers):
        yield f"{key} must be empty unless lora.tiers or lora.distribution names tiers, got {show(densities)}"
        return
    expected = len(lora.tiers) if lora.tiers else 4
    if len(densities) != expected:
        whose = "tier of lora.tiers" if lora.tiers else f"type of lora.distribution={lora.distribution}"
        yield f"{key} must have {expected} values, one for each {whose}, got {show(densities)}"


def _scaffold(config: Config) -> Iterator[str]:
    """SCAFFOLD's control variates are sums of plain gradients."""
    if config.strategy.name != "scaffold":
        return
    because = (
        "with strategy.name=scaffold, whose control variates stand for plain gradients (arXiv 1910.06378)"
    )
    optimizer = config.training.optimizer
    if optimizer.name != "sgd":
        yield f"training.optimizer.name must be sgd {because}, got {show(optimizer.name)}"
    elif optimizer.momentum != 0:
        yield f"training.optimizer.momentum must be 0 {because}, got {show(optimizer.momentum)}"
    if config.training.max_grad_norm is not None:
        yield f"training.max_grad_norm must be null {because}, got {show(config.training.max_grad_norm)}"
    if config.training.proximal_mu != 0:
        yield f"training.proximal_mu must be 0 {because}, got {show(config.training.proximal_mu)}"
    if config.training.max_update_norm is not None and config.training.on_large_update != "fail":
        yield (
            f"training.on_large_update must be fail {because} and would no longer add up to the server's, got "
            f"{show(config.training.on_large_update)}"
        )
    if config.clients.corruption.probability > 0:
        yield (
            f"clients.corruption.probability must be 0 {because} and would no longer add up to the server's, got "
            f"{show(config.clients.corruption.probability)}"
        )
    if optimizer.lr == 0:
        yield f"training.optimizer.lr must be > 0 {because}, got 0"
    if config.aggregation.client_weights != "uniform":
        yield (
            "aggregation.client_weights must be uniform with strategy.name=scaffold, which minimises the unweighted "
            f"mean of the clients' losses, got {show(config.aggregation.client_weights)}"
        )


UNUSED_BY_SERVER_OPTIMIZER = {
    "none": ("lr", "beta1", "beta2", "tau"),
    "fedavgm": ("beta2", "tau"),
    "fedadam": (),
    "fedyogi": (),
    "fedadagrad": ("beta1", "beta2"),
}


def _aggregation(aggregation: AggregationConfig, run: RunConfig) -> Iterator[str]:
    optimizer, privacy = aggregation.server_optimizer, aggregation.privacy
    because = f"when aggregation.server_optimizer.name is {optimizer.name}, which does not use it"
    unused = UNUSED_BY_SERVER_OPTIMIZER[optimizer.name]
    yield from _unused("aggregation.server_optimizer", optimizer, unused, because)
    if privacy.clip_norm is None:
        because = "when aggregation.privacy.clip_norm is null"
        yield from _unused("aggregation.privacy", privacy, ("noise_multiplier", "delta"), because)
    if run.device == "cpu" and aggregation.svd_device == "cuda":
        yield "aggregation.svd_device must be cpu when run.device is cpu, got 'cuda'"


def _privacy(config: Config) -> Iterator[str]:
    """What the accountant assumes."""
    if config.aggregation.privacy.clip_norm is None:
        return
    because = "with aggregation.privacy.clip_norm set"
    num_clients, delta = config.data.partition.num_clients, config.aggregation.privacy.delta
    if delta >= 1 / num_clients:
        yield (
            f"aggregation.privacy.delta must be below 1 / data.partition.num_clients={1 / num_clients:g}, or telling "
            f"all of one client would count as private, got {show(delta)}"
        )
    if config.cohort.sampling != "poisson":
        yield (
            f"cohort.sampling must be poisson {because}, since the privacy accountant counts on it, got "
            f"{show(config.cohort.sampling)}"
        )
    if config.aggregation.client_weights != "uniform":
        yield (
            f"aggregation.client_weights must be uniform {because}, since one client must not count more than another, "
            f"got {show(config.aggregation.client_weights)}"
        )


def _evaluation(evaluation: EvaluationConfig, data: DataConfig) -> Iterator[str]:
    if evaluation.client_test == "own_split":
        yield from _own_examples(data, "when evaluation.client_test is own_split")
    answers = evaluation.answers
    if answers.metric == "off":
        because = "when evaluation.answers.metric is off"
        yield from _unused("evaluation.answers", answers, ("max_new_tokens", "max_examples"), because)
    elif data.instruction.format == "off":
        yield (
            "evaluation.answers.metric must be off for plain text, whose examples have no answers, got "
            f"{show(answers.metric)}; set data.instruction.format for instruction data"
        )
    if answers.metric.startswith("teacher_forced"):
        because = f"when evaluation.answers.metric is {answers.metric}"
        yield from _unused("evaluation.answers", answers, ("max_new_tokens",), because)
    if evaluation.batch_tokens < data.max_tokens:
        yield (
            f"evaluation.batch_tokens must be at least data.max_tokens={data.max_tokens}, got "
            f"{evaluation.batch_tokens}"
        )


def _own_examples(data: DataConfig, because: str) -> Iterator[str]:
    """Clients must keep examples that they do not train on."""
    rules = data.instruction
    names_parts = rules.format in ("client_lines", "flexlora") or rules.part_field is not None
    if data.client_test_fraction == 0 and not (names_parts and data.partition.name == "natural"):
        yield f"data.client_test_fraction must be > 0 {because}, got {show(data.client_test_fraction)}"


def _early_stopping(config: Config) -> Iterator[str]:
    rule, strategy = config.early_stopping, config.strategy
    if rule.metric == "off":
        names = tuple(name for name in type(rule).model_fields if name != "metric")
        yield from _unused("early_stopping", rule, names, "when early_stopping.metric is off")
        return
    if rule.metric.startswith("validation"):
        yield from _own_examples(config.data, f"when early_stopping.metric is {rule.metric}")
        if config.aggregation.privacy.clip_norm is not None:
            yield (
                "early_stopping.metric must be off or of the test set with aggregation.privacy.clip_norm set, since "
                f"the privacy accountant does not count what validation tells about clients, got {show(rule.metric)}"
            )
    if rule.metric.endswith("rouge_l") and config.evaluation.answers.metric == "off":
        yield f"evaluation.answers.metric must not be off when early_stopping.metric is {rule.metric}, got 'off'"
    if rule.from_round >= config.run.rounds:
        yield (
            f"early_stopping.from_round must be below run.rounds={config.run.rounds}, got {rule.from_round}; set "
            "early_stopping.metric=off to run all rounds"
        )
    if strategy.name == "slora" and rule.from_round < strategy.slora.rounds:
        yield (
            f"early_stopping.from_round must be at least strategy.slora.rounds={strategy.slora.rounds} with "
            f"strategy.name=slora, whose first rounds train no adapter, got {rule.from_round}"
        )


def _comm(config: Config) -> Iterator[str]:
    if config.run.device == "cpu" and config.comm.backend == "nccl":
        yield "comm.backend must be auto or gloo when run.device is cpu, got 'nccl'"
