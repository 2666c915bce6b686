"""Rules that tie several keys together."""

import pytest

from fedsim.config.loader import load_config
from fedsim.errors import ConfigError

CORPUS = ("data.source=corpus.jsonl",)
DEVICE = "clients.devices=[{tokens_per_s: 9, uplink_mbps: 1, downlink_mbps: 2}]"
MODEL = ("model.name_or_path=facebook/opt-125m",)

SCAFFOLD = [
    "strategy.name=scaffold",
    "training.optimizer.name=sgd",
    "training.max_grad_norm=null",
    "aggregation.client_weights=uniform",
]

REFUSED = [
    (["cohort.size=50"], "cohort.size must be in [1, data.partition.num_clients=20], got 50"),
    (["data.partition.num_clients=4"], "cohort.size must be in [1, data.partition.num_clients=4], got 8"),
    (
        ["cohort.size=null"],
        "one of cohort.size, cohort.fraction and cohort.client_ids must be set, got null for all",
    ),
    (
        ["cohort.size=3", "cohort.fraction=0.5"],
        "only one of cohort.size, cohort.fraction and cohort.client_ids may be set, got cohort.size=3 and "
        "cohort.fraction=0.5; set the others to null",
    ),
    (
        ["cohort.fraction=0.5", "cohort.client_ids=[1]"],
        "may be set, got cohort.fraction=0.5 and cohort.client_ids=[1]",
    ),
    (
        ["cohort.client_ids=[0,20,21]"],
        "cohort.client_ids must be below data.partition.num_clients=20, got [20, 21]",
    ),
    (
        ["cohort.client_ids=[1,2,1]"],
        "cohort.client_ids must name each client once, got [1] more than once",
    ),
    (
        ["clients.deadline_s=60"],
        "clients.deadline_s must stay at its default null when clients.devices is empty, without which there is no "
        "simulated clock, got 60",
    ),
    (
        ["clients.slowness.name=pareto"],
        "clients.slowness.name must stay at its default 'none' when clients.devices is empty",
    ),
    (
        [DEVICE, "clients.over_selection=3"],
        "clients.over_selection times the cohort of 8 clients must be at most data.partition.num_clients=20, got 3",
    ),
    (
        [DEVICE, "clients.over_selection=1.5", "cohort.sampling=poisson"],
        "clients.over_selection must be 1 unless a fixed number of clients is drawn",
    ),
    (
        ["clients.availability=0.9", "cohort.sampling=flexlora"],
        "clients.availability must stay at its default 1.0 with cohort.sampling=flexlora, whose cohorts are those",
    ),
    (
        ["clients.outages=[{from_round: 3, until_round: 3}]"],
        "clients.outages[0].until_round must be above from_round=3, got 3",
    ),
    (
        ["clients.outages=[{from_round: 0, until_round: 3, client_ids: [4, 20], share: 0.5}]"],
        "clients.outages[0].client_ids must be below data.partition.num_clients=20, got [20]",
    ),
    (
        ["clients.corruption.scale=5"],
        "clients.corruption.scale must stay at its default 100.0 when clients.corruption.kind is nan, got 5",
    ),
    (
        ["training.on_large_update=clip"],
        "training.on_large_update must stay at its default 'fail' when training.max_update_norm is null, got 'clip'",
    ),
    (
        ["strategy.name=centralized", "clients.dropout=0.1"],
        "clients must be left at its defaults with strategy.name=centralized, which has no clients to lose",
    ),
    (
        ["training.local_epochs=1", "training.local_steps=3"],
        "only one of training.local_epochs and training.local_steps may be set, got training.local_epochs=1 and",
    ),
    (["training.local_epochs=null"], "one of training.local_epochs and training.local_steps must be set"),
    (
        ["training.local_steps=3", "training.schedule.warmup_steps=4"],
        "training.schedule.warmup_steps must be at most training.local_steps=3, got 4",
    ),
    (
        ["training.optimizer.name=sgd", "training.optimizer.beta1=0.5"],
        "training.optimizer.beta1 must stay at its default 0.9 when training.optimizer.name is sgd, which does "
        "not use it, got 0.5",
    ),
    (
        ["training.optimizer.momentum=0.9"],
        "training.optimizer.momentum must stay at its default 0.0 when training.optimizer.name is adamw",
    ),
    (
        ["evaluation.client_test=own_split", "data.client_test_fraction=0"],
        "data.client_test_fraction must be > 0 when evaluation.client_test is own_split, got 0.0",
    ),
    (
        ["evaluation.batch_tokens=64"],
        "evaluation.batch_tokens must be at least data.max_tokens=128, got 64",
    ),
    (
        ["data.partition.num_length_classes=1"],
        "data.partition.num_length_classes must be at least 2 when data.partition.name is length_skew, got 1; use "
        "data.partition.name=iid for no skew",
    ),
    (
        ["data.partition.name=quantity_skew", "data.partition.examples_per_client=5"],
        "data.partition.examples_per_client must stay at its default null when data.partition.name is "
        "quantity_skew, which draws the sizes, got 5",
    ),
    (
        ["data.partition.name=plato_quantity", "data.partition.examples_per_client=5"],
        "data.partition.examples_per_client must stay at its default null when data.partition.name is plato_quantity, "
        "which does not use it, got 5",
    ),
    (
        ["data.partition.quantity_alpha=0.1"],
        "data.partition.quantity_alpha must stay at its default null when data.partition.name is length_skew",
    ),
    (
        [*CORPUS, "data.label_field=topic", "data.partition.class_by=label"],
        "data.partition.class_by must stay at its default 'length' when data.partition.name is length_skew",
    ),
    (
        ["data.partition.classes_per_client=3"],
        "data.partition.classes_per_client must stay at its default 2 when data.partition.name is length_skew",
    ),
    (
        [*CORPUS, "data.partition.name=label_skew"],
        "data.label_field must be set when data.partition.name is label_skew, got null",
    ),
    (
        [*CORPUS, "data.partition.name=pathological", "data.partition.class_by=label"],
        "data.label_field must be set when data.partition.name is pathological with class_by=label, got null",
    ),
    (
        [*CORPUS, "data.partition.name=natural"],
        "data.client_field must be set when data.partition.name is natural, got null",
    ),
    (
        ["data.partition.length_edges=[20,20,50]"],
        "data.partition.length_edges must be strictly ascending, got [20.0, 20.0, 50.0]",
    ),
    (
        ["data.partition.length_edges=[20,50]", "data.partition.num_length_classes=3"],
        "data.partition.num_length_classes must stay at its default 5 when data.partition.length_edges is set, got 3",
    ),
    (["data.partition.length_edges=[]"], "data.partition.length_edges must"),
    (
        ["data.partition.name=pathological", "data.partition.classes_per_client=6"],
        "data.partition.num_length_classes must be at least 6 when data.partition.name is pathological, got 5",
    ),
    (
        [
            "data.partition.name=pathological",
            "data.partition.classes_per_client=3",
            "data.partition.length_edges=[20]",
        ],
        "data.partition.length_edges must be at least 3 classes when data.partition.name is pathological, got 2",
    ),
    (
        ["data.partition.name=plato_label", "data.partition.num_length_classes=1"],
        "data.partition.num_length_classes must be at least 2 when data.partition.name is plato_label, got 1",
    ),
    (
        ["data.partition.name=pathological", "data.partition.examples_per_client=7"],
        "data.partition.examples_per_client must be null or a multiple of data.partition.classes_per_client=2, got 7",
    ),
    (
        ["data.partition.name=natural", "data.max_examples=30"],
        "at least data.partition.num_clients=20 times data.partition.min_examples=2, got 30",
    ),
    (
        [
            "data.partition.name=plato_label",
            "data.partition.examples_per_client=40",
            "data.max_examples=30",
        ],
        "data.max_examples must be null or at least data.partition.examples_per_client=40, got 30",
    ),
    (["run.device=cpu", "comm.backend=nccl"], "comm.backend must be auto or gloo when run.device is cpu"),
    (
        ["model.quantization=nf4", "model.dtype=float64"],
        "model.dtype must be float32, bfloat16, float16 or auto when model.quantization is nf4, got 'float64'",
    ),
    (
        ["model.quantization=int8", "model.cpu_linear=onednn"],
        "model.cpu_linear must be auto or torch when model.quantization is int8, got 'onednn'",
    ),
    (
        ["model.quantization=fp4", "run.merged_model=true"],
        "run.merged_model must be false when model.quantization is fp4",
    ),
    (
        ["data.text_field=review"],
        "data.text_field must stay at its default 'text' when data.source is embedded",
    ),
    (
        ["data.label_field=topic"],
        "data.label_field must stay at its default null when data.source is embedded",
    ),
    (["data.client_field=author"], "data.client_field must stay at its default null"),
    (["data.subset=en"], "data.subset must stay at its default null"),
    (["data.train_split=all"], "data.train_split must stay at its default 'train'"),
    (["data.test_split=test"], "data.test_split must stay at its default null"),
    (
        [*CORPUS, "data.test_split=test", "data.test_fraction=0.2"],
        "data.test_fraction must stay at its default 0.1 when data.test_split is set, got 0.2",
    ),
    (
        ["data.max_examples=19"],
        "data.max_examples must be null or at least data.partition.num_clients=20, got 19",
    ),
    (
        ["data.max_examples=99", "data.partition.examples_per_client=5"],
        "at least data.partition.num_clients=20 times data.partition.examples_per_client=5, got 99",
    ),
    (
        ["data.max_examples=99", "data.partition.name=quantity_skew", "data.partition.min_examples=5"],
        "at least data.partition.num_clients=20 times data.partition.min_examples=5, got 99",
    ),
    (
        ["model.revision=main"],
        "model.revision must stay at its default null when model.name_or_path is embedded",
    ),
    (["model.tokenizer=gpt2"], "model.tokenizer must stay at its default null"),
    (["model.trust_remote_code=true"], "model.trust_remote_code must stay at its default false"),
    (["model.allow_pickle=true"], "model.allow_pickle must stay at its default false"),
    (
        ["lora.target_modules=[q_proj,v_proj,q_proj]"],
        "lora.target_modules must name each module once, got ['q_proj'] more than once",
    ),
    (
        ["strategy.name=slora", "strategy.slora.rounds=9", "run.rounds=8"],
        "strategy.slora.rounds must be at most run.rounds=8, since no LoRA factors are made before",
    ),
    (
        [
            "aggregation.privacy.clip_norm=1.0",
            "aggregation.privacy.noise_multiplier=1.0",
            "aggregation.privacy.delta=0.5",
            "cohort.sampling=poisson",
            "aggregation.client_weights=uniform",
        ],
        "aggregation.privacy.delta must be below 1 / data.partition.num_clients=0.05",
    ),
    (["strategy.name=fedprox"], "got 'fedprox'; set strategy.name=fedavg and training.proximal_mu for it"),
    (
        ["strategy.name=FedAdam"],
        "set strategy.name=fedavg and aggregation.server_optimizer.name=fedadam for it",
    ),
    ([*SCAFFOLD, "training.proximal_mu=0.1"], "training.proximal_mu must be 0 with strategy.name=scaffold"),
    (
        [*SCAFFOLD, "training.max_update_norm=1.0", "training.on_large_update=clip"],
        "training.on_large_update must be fail with strategy.name=scaffold",
    ),
    (
        [*SCAFFOLD, "training.max_update_norm=1.0", "training.on_large_update=drop"],
        "training.on_large_update must be fail with strategy.name=scaffold",
    ),
    (
        [*SCAFFOLD, "clients.corruption.probability=0.1"],
        "clients.corruption.probability must be 0 with strategy.name=scaffold",
    ),
]

ACCEPTED = [
    [],
    SCAFFOLD,
    [*SCAFFOLD, "training.max_update_norm=1.0"],
    ["cohort.size=20"],
    ["cohort.client_ids=[19,0]"],
    ["cohort.size=null", "cohort.fraction=0.01"],
    ["training.local_steps=3", "training.schedule.warmup_steps=3"],
    ["training.schedule.warmup_steps=1000"],
    ["training.optimizer.name=sgd", "training.optimizer.momentum=0.9"],
    ["training.optimizer.name=sgd"],
    ["evaluation.client_test=own_split"],
    ["data.client_test_fraction=0"],
    ["data.partition.name=iid", "data.partition.num_length_classes=1"],
    ["data.partition.name=iid", "data.partition.dirichlet_alpha=0.1"],
    ["data.partition.length_edges=[8,20.5]"],
    ["data.partition.name=iid", "data.partition.length_edges=[8]"],
    ["data.partition.name=length_and_quantity", "data.partition.quantity_alpha=0.3"],
    ["data.partition.name=pathological", "data.partition.examples_per_client=8"],
    ["data.partition.name=natural"],
    [*CORPUS, "data.partition.name=natural", "data.client_field=author"],
    [
        *CORPUS,
        "data.partition.name=label_skew",
        "data.label_field=topic",
        "data.partition.num_length_classes=1",
    ],
    [
        *CORPUS,
        "data.partition.name=pathological",
        "data.label_field=topic",
        "data.partition.class_by=label",
        "data.partition.classes_per_client=9",
    ],
    ["data.partition.name=plato_label", "data.max_examples=10"],
    ["data.partition.name=plato_quantity", "data.max_examples=10"],
    ["run.device=cpu", "comm.backend=gloo", "model.dtype=bfloat16"],
    ["run.device=cpu", "model.dtype=float16", "model.quantization=nf4"],
    ["run.device=cuda", "model.dtype=float16", "comm.backend=gloo"],
    [*CORPUS, "data.text_field=review", "data.label_field=topic", "data.test_split=test"],
    [*CORPUS, "data.subset=en", "data.client_field=author", "data.train_split=all", "data.test_fraction=0.2"],
    [*MODEL, "model.revision=main", "model.tokenizer=gpt2", "model.trust_remote_code=true"],
    [*MODEL, "model.allow_pickle=true"],
    ["data.max_examples=20"],
    ["data.max_examples=100", "data.partition.examples_per_client=5"],
    ["strategy.name=local", "aggregation.client_weights=uniform"],
    ["strategy.name=centralized"],
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_values_that_go_together_are_accepted(overrides: list[str]) -> None:
    load_config(None, overrides)


def test_every_broken_rule_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["cohort.size=50", "model.revision=x", "training.optimizer.momentum=0.1"])

    assert [part.partition(" ")[0] for part in str(caught.value).split("; ")] == [
        "cohort.size",
        "model.revision",
        "training.optimizer.momentum",
    ]
