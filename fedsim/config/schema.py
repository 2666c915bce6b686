"""The configuration tree: every key, its type, default, unit and meaning.

The tree mirrors the package. Its defaults are the embedded quick start: `fedsim.main` needs no file.
Every node is frozen, refuses unknown keys and never converts a value of the wrong type.
"""

from pydantic import Field

from fedsim.config.clients_section import ClientsConfig, CohortConfig
from fedsim.config.data_section import DataConfig
from fedsim.config.evaluation_section import EarlyStoppingConfig, EvaluationConfig
from fedsim.config.model_section import LoraConfig, ModelConfig
from fedsim.config.node import Node
from fedsim.config.run_section import CheckpointConfig, CommConfig, RunConfig, TrackingConfig
from fedsim.config.strategy_section import AggregationConfig, StrategyConfig
from fedsim.config.training_section import TrainingConfig


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
