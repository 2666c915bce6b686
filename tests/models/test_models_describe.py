"""Parameter counts and adapter targets on the meta device."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from fedsim.config.model_section import ModelConfig
from fedsim.errors import ConfigError, ModelError
from fedsim.models.architecture import check_sequence_length
from fedsim.models.description import BaseDescription, describe_base

OPT_SHAPES = {
    "125m": {
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "350m": {
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
    },
    "1.3b": {
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def describe(config: PretrainedConfig, folder: Path, targets: list[str], **options: Any) -> BaseDescription:
    config.save_pretrained(folder)
    return describe_base(ModelConfig(name_or_path=str(folder)), targets, **options)


# Table 1 of arXiv 2502.18910: trainable and total parameters of OPT with LoRA rank 2 on q_proj and v_proj.
@pytest.mark.parametrize(
    ("size", "trainable", "total"),
    [("125m", 73_728, 125_313_024), ("350m", 196_608, 331_393_024), ("1.3b", 393_216, 1_316_151_296)],
)
def test_parameters_of_opt(size: str, trainable: int, total: int, tmp_path: Path) -> None:
    shape = OPT_SHAPES[size]
    config = OPTConfig(
        vocab_size=50272, max_position_embeddings=2048, ffn_dim=4 * shape["hidden_size"], **shape
    )
    description = describe(config, tmp_path, ["q_proj", "v_proj"], max_tokens=2048)
    assert description.num_lora_parameters(2) == trainable
    assert description.num_parameters + trainable == total
    assert description.vocab_size == 50272
    assert description.max_positions == 2048
    assert len(description.targets) == 2 * shape["num_hidden_layers"]


def test_targets_are_in_model_order_and_end_at_dots(tmp_path: Path) -> None:
    config = LlamaConfig(intermediate_size=24, num_key_value_heads=1, **SMALL)
    description = describe(config, tmp_path, ["mlp.down_proj", "k_proj", "model.layers.1.self_attn.q_proj"])
    assert description.targets == {
        "model.layers.0.self_attn.k_proj": (16, 8),
        "model.layers.0.mlp.down_proj": (24, 16),
        "model.layers.1.self_attn.q_proj": (16, 16),
        "model.layers.1.self_attn.k_proj": (16, 8),
        "model.layers.1.mlp.down_proj": (24, 16),
    }


def test_gpt_neox(tmp_path: Path) -> None:
    description = describe(GPTNeoXConfig(intermediate_size=32, **SMALL), tmp_path, ["query_key_value"])
    assert set(description.targets.values()) == {(16, 48)}


def test_projections_of_opt_350m_can_be_adapted(tmp_path: Path) -> None:
    config = OPTConfig(word_embed_proj_dim=8, ffn_dim=32, do_layer_norm_before=False, **SMALL)
    assert describe(config, tmp_path, ["project_in"]).targets == {"model.decoder.project_in": (8, 16)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "qproj",
            r"'qproj' is no linear module of OPTForCausalLM; it has: .*q_proj.*; did you mean 'q_proj'\?",
        ),
        ("proj", "'proj' is no linear module"),
        ("lm_head", "the output embedding, which stays frozen; OPTForCausalLM has: "),
        ("embed_tokens", "the input embedding"),
        ("self_attn", "a OPTAttention; inside it are: .*q_proj"),
        ("activation_fn", "a ReLU; OPTForCausalLM has: .*q_proj"),
    ],
)
def test_wrong_targets(target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"lora.target_modules.*{message}"):
        describe(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SMALL), tmp_path, ["v_proj", target])


def test_conv1d_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    with pytest.raises(ConfigError, match=r"'c_attn' names transformer.h.0.attn.c_attn, a Conv1D"):
        describe(config, tmp_path, ["c_attn"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(intermediate_size=32, **SMALL), "causal language model .* is of type 'bert'"),
        (T5Config(d_model=16, num_layers=1, num_heads=2), r"an encoder-decoder \(t5\)"),
    ],
)
def test_other_architectures_are_refused(config: PretrainedConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        describe(config, tmp_path, ["query"])


def test_sequences_longer_than_the_positions(tmp_path: Path) -> None:
    config = OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, **SMALL)
    describe(config, tmp_path, ["q_proj"], max_tokens=64)
    with pytest.raises(ConfigError, match=r"data.max_tokens must be at most 64, .* got 65"):
        describe(config, tmp_path, ["q_proj"], max_tokens=65)
    check_sequence_length(None, 10**6, "a model without a limit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "does not know model_type None"),
        ('{"model_type": "of-tomorrow"}', "does not know model_type 'of-tomorrow' .* newer transformers may"),
        ("[1]", "not a readable JSON object"),
        ("{", "not a readable JSON object"),
        (
            '{"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}',
            "set model.trust_remote_code=true if you trust it",
        ),
        ('{"model_type": "opt", "hidden_size": "wide"}', "cannot be used"),
        ('{"model_type": "opt", "hidden_size": 10, "num_attention_heads": 3}', "describes no model"),
    ],
)
def test_bad_config_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"model.name_or_path=.*{message}"):
        describe_base(ModelConfig(name_or_path=str(tmp_path)), ["q_proj"])
