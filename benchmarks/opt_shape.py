"""A tokenizer for models of the shape of OPT that are made here: the embedded one, with as many entries as OPT has."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from fedsim.models.embedded import embedded_tokenizer_folder


def write_tokenizer(folder: Path, num_entries: int) -> None:
    """Save it to a model folder. fedsim refuses a tokenizer that has far fewer entries than the model has rows.

    Args:
        num_entries: rows of the model's embedding; the entries that are added occur in no text.
    """
    AutoTokenizer.from_pretrained(embedded_tokenizer_folder()).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"<never {i}>": i for i in range(num_entries) if i not in taken}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
