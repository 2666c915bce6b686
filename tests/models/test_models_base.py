"""Loading base models and tokenizers from local folders and the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from fedsim.config.model_section import ModelConfig
from fedsim.errors import ConfigError, ModelError
from fedsim.models.base import HASHED_BYTES, build_base, fingerprint
from fedsim.models.description import describe_base
from fedsim.models.targets import find_targets
from fedsim.models.tokenizer import build_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SMALL),
    "opt_post_norm": OPTConfig(ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False, **SMALL),
    "llama": LlamaConfig(intermediate_size=24, num_key_value_heads=1, **SMALL),
    "gpt_neox": GPTNeoXConfig(intermediate_size=32, **SMALL),
}
TARGETS = {"opt": "q_proj", "opt_post_norm": "q_proj", "llama": "q_proj", "gpt_neox": "query_key_value"}


def save_tokenizer(folder: Path, num_entries: int) -> None:
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    words |= {f"w{index}": index for index in range(len(words), num_entries)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_model(folder: Path, architecture: str = "opt", num_entries: int = 40) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).save_pretrained(folder)
    save_tokenizer(folder, num_entries)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    return build_base(ModelConfig(name_or_path=str(folder), **settings), "cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_folder(architecture: str, tmp_path: Path) -> None:
    base = load(save_model(tmp_path, architecture))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {base.dtype} == {torch.float32}
    assert base.pad_id == 1
    assert base.tokenizer("w7 w9")["input_ids"] == [7, 9]
    assert len(find_targets(base.model, [TARGETS[architecture]])) == 2
    ids = torch.arange(4, 12)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    assert torch.equal(base.model(ids).logits, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_as_configured(dtype: str, tmp_path: Path) -> None:
    base = load(save_model(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_of_tensors_larger_than_its_sample(dtype: torch.dtype) -> None:
    """Of a base of real size, no tensor is hashed whole."""
    model = torch.nn.Linear(1024, 1500).to(dtype)
    assert model.weight.numel() * model.weight.element_size() > HASHED_BYTES
    before = fingerprint(model)
    with torch.no_grad():
        model.weight.view(-1)[1_234_567] += 1  # between two values of the sample
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_does_not_depend_on_the_parts_of_its_sum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(1024, 1500).to(dtype)
    whole = fingerprint(model)
    monkeypatch.setattr("fedsim.models.base.SUMMED_VALUES", 100_001)
    assert fingerprint(model) == whole


def test_fingerprint_sees_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    for hashed_bytes in (2**20, 8):
        monkeypatch.setattr("fedsim.models.base.HASHED_BYTES", hashed_bytes)
        base = load(tmp_path)
        assert fingerprint(load(tmp_path).model) == base.fingerprint
        for parameter in base.model.parameters():
            before = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(before, torch.tensor(9.0))
            assert fingerprint(base.model) != base.fingerprint
            parameter.view(-1)[-1] = before
        assert fingerprint(base.model) == base.fingerprint


def test_pickle_needs_consent(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights in safetensors format .* set model.allow_pickle=true"):
        load(tmp_path)
    assert load(tmp_path, allow_pickle=True).fingerprint
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no weights"):
        load(tmp_path, allow_pickle=True)


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_model(tmp_path)
    name = "model.decoder.layers.1.fc1.weight"
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=rf"1 tensors are missing, such as {name}"):
        load(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match=r"cannot be loaded|of another shape"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"its weights in .* cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("num_entries", "message"),
    [
        (41, r"has 41 entries \(highest id 40\), .* has 40 embedding rows, too few"),
        (4, r"has 4 entries \(highest id 3\), .* has 40 embedding rows, more than twice as many"),
    ],
)
def test_tokenizer_of_another_model(num_entries: int, message: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "other", num_entries)
    with pytest.raises(
        ModelError, match=rf"model.tokenizer must fit the model: .*{message}; set model.tokenizer"
    ):
        load(tmp_path / "model", tokenizer=str(tmp_path / "other"))


def test_tokenizer_from_another_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "other", 30)
    assert len(load(tmp_path / "model", tokenizer=str(tmp_path / "other")).tokenizer) == 30


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a/b/c", "no spaces allowed"]
)
def test_a_missing_folder_names_the_key(name: str) -> None:
    for function in (build_tokenizer, lambda config: build_base(config, "cpu")):
        with pytest.raises(
            ModelError, match=r"model.name_or_path must be a Hugging Face model id or an existing"
        ):
            function(ModelConfig(name_or_path=name))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no tokenizer in"):
        load(tmp_path)
    save_tokenizer(tmp_path, 40)
    with pytest.raises(ModelError, match=r"is no model folder, it has no config.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"is a file, not a folder"):
        load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded .*; set model.tokenizer"):
        load(tmp_path)


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.revision is for hub models only, got 'main'"):
        load(save_model(tmp_path), revision="main")


def test_tokenizer_code_needs_trust(tmp_path: Path) -> None:
    text = '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"set model.trust_remote_code=true if you trust it"):
        build_tokenizer(ModelConfig(name_or_path=str(tmp_path)))


def test_hub_without_network() -> None:
    """The tests run with HF_HUB_OFFLINE=1, and no such model is cached."""
    with pytest.raises(ModelError) as raised:
        build_tokenizer(ModelConfig(name_or_path="someone/no-such-model"))
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "model.name_or_path=someone/no-such-model",
        "local folder",
        "HF_HOME",
        "hf download",
        "HF_HUB_OFFLINE",
    ):
        assert part in message


def answer(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # its arguments, a response of the network library, differ between versions
    error.args = ("the hub says no. It is long.\nVery long.",)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "model.name_or_path=someone/model is neither a local folder"),
        (errors.GatedRepoError, "is gated: accept its terms"),
        (errors.RevisionNotFoundError, "model.revision=v2 does not exist"),
        (errors.HfHubHTTPError, r"the hub cannot be reached \(the hub says no\); give a local folder"),
        (errors.HfHubHTTPError.__bases__[0], r"the hub cannot be reached \(the hub says no\)"),
        (ConnectionError, r"the hub cannot be reached \(the hub says no\); give a local folder"),
    ],
)
def test_answers_of_the_hub(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        build_tokenizer(ModelConfig(name_or_path="someone/model", revision="v2"))


@pytest.mark.parametrize("reachable", [True, False])
def test_a_snapshot_of_the_hub_or_its_cache(
    reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    asked = []

    def model_info(api: Any, name: str, *, revision: str, timeout: float) -> None:
        assert (name, revision, timeout > 0) == ("someone/model", "v2", True)
        if not reachable:
            raise ConnectionError("no network")

    def snapshot(name: str, **options: Any) -> str:
        assert (name, options["revision"]) == ("someone/model", "v2")
        assert options["local_files_only"] is not reachable
        asked.extend(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    base = build_base(ModelConfig(name_or_path="someone/model", revision="v2"), "cpu")
    assert base.name == "someone/model"
    assert "*.safetensors" in asked
    assert not {"*.bin", "*.py"} & set(asked)


@pytest.mark.parametrize("name", ["tiny_opt", "stories260K"])
def test_real_models(name: str, shared: Path) -> None:
    config = ModelConfig(name_or_path=str(shared / "models" / name))
    base = build_base(config, "cpu")
    description = describe_base(config, ["q_proj", "v_proj"], base.tokenizer)
    assert sum(parameter.numel() for parameter in base.model.parameters()) == description.num_parameters
    assert find_targets(base.model, ["q_proj", "v_proj"]) == description.targets
    assert base.dtype == torch.float32  # tiny_opt is stored in float16
    ids = base.tokenizer("Once upon a time, there was a little girl named", return_tensors="pt")["input_ids"]
    loss = base.model(input_ids=ids, labels=ids).loss.item()
    assert loss < torch.log(torch.tensor(float(len(base.tokenizer)))).item()


def test_opt_tokenizer(shared: Path) -> None:
    """Ids from the OPT test of transformers."""
    tokenizer = build_tokenizer(ModelConfig(name_or_path=str(shared / "models" / "opt_tokenizer")))
    assert tokenizer("A photo of a cat")["input_ids"] == [2, 250, 1345, 9, 10, 4758]
