"""Prompt templates as data, and texts that are rendered from them when they are asked for.

A text is a prompt and an answer. `Spans` says which characters are whose, so that truncation can spare the answer.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TRAIN, EVAL, TEST = 0, 1, 2
"""What an example is for, in the eyes of its client: `PromptedTexts.parts`."""

SLOT = re.compile(r"\{(instruction|input)\}")


class Spans(NamedTuple):
    """Character positions in a rendered text; an absent piece is an empty range.

    The instruction is `text[instruction_start:instruction_end]`, the input likewise, the answer `text[prompt_end:]`.
    """

    instruction_start: int
    instruction_end: int
    input_start: int
    input_end: int
    prompt_end: int


@dataclass(frozen=True, slots=True)
class Template:
    """How an instruction and an input become a prompt; the answer follows it directly.

    Attributes:
        with_input: the prompt where there is an input, with the slots {instruction} and {input}.
        without_input: the prompt where the input is empty.
        ends_sentences: white space around an instruction or input goes, and a full stop follows one that does not
            end in punctuation.
    """

    with_input: str
    without_input: str
    ends_sentences: bool = False

    def render(self, instruction: str, input_text: str) -> tuple[str, Spans]:
        """The prompt, and where its pieces are."""
        if self.ends_sentences:
            instruction, input_text = _sentence(instruction), _sentence(input_text)
        pieces = SLOT.split(self.with_input if input_text else self.without_input)
        values = {"instruction": instruction, "input": input_text}
        found = {"instruction": (0, 0), "input": (0, 0)}
        length = 0
        for place in range(1, len(pieces), 2):
            name = pieces[place]
            length += len(pieces[place - 1])
            pieces[place] = values[name]
            found[name] = (length, length + len(values[name]))
            length = found[name][1]
        text = "".join(pieces)
        return text, Spans(*found["instruction"], *found["input"], len(text))


TEMPLATES = {
    # Alpaca's, as alpaca-lora and the code of arXiv 2402.11505 word it; Stanford's own ends without the line break.
    "alpaca": Template(
        with_input=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
        without_input=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n"
        ),
    ),
    # Definition and input without examples (arXiv 2204.07705). Departs from Tk-Instruct's code where the input is
    # empty: it writes "Input: ." then.
    "natural_instructions": Template(
        with_input=(
            "Definition: {instruction}\n\nNow complete the following example -\nInput: {input}\nOutput: "
        ),
        without_input="Definition: {instruction}\n\nNow complete the following example -\nOutput: ",
        ends_sentences=True,
    ),
}
"""`data.instruction.template` -> template."""


def choose_template(name: str, custom: str | None, custom_without_input: str | None) -> Template:
    """The template of a name; `custom` stands for the two texts, of which the second defaults to the first."""
    if name != "custom":
        return TEMPLATES[name]
    assert custom is not None, "the configuration is checked before"
    return Template(custom, custom if custom_without_input is None else custom_without_input)


@dataclass(frozen=True)
class PromptedTexts(Sequence[str]):
    """n texts, each a prompt and its first reference answer, rendered when asked for.

    Attributes:
        template: of the prompts.
        instructions, inputs: n of each; an input may be empty.
        references: n lists of acceptable answers; the first is the one to learn.
        parts: (n,) int8, TRAIN, EVAL or TEST.
        tasks, categories: n names, or None where the corpus has none.
    """

    template: Template
    instructions: Sequence[str]
    inputs: Sequence[str]
    references: Sequence[Sequence[str]]
    parts: NDArray[np.int8]
    tasks: Sequence[str] | None = None
    categories: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.render(place)[0] for place in range(*index.indices(len(self)))]
        return self.render(index)[0]

    def render(self, index: int) -> tuple[str, Spans]:
        """A whole text, and where its pieces are."""
        prompt, spans = self.template.render(self.instructions[index], self.inputs[index])
        return prompt + self.answer(index), spans

    def answer(self, index: int) -> str:
        """The answer to learn; empty where an example has none."""
        references = self.references[index]
        return references[0] if references else ""

    def select(self, indices: Ints) -> "PromptedTexts":
        """The texts at `indices`, in that order."""
        chosen = indices.tolist()
        return PromptedTexts(
            self.template,
            [self.instructions[index] for index in chosen],
            [self.inputs[index] for index in chosen],
            [self.references[index] for index in chosen],
            self.parts[indices],
            None if self.tasks is None else [self.tasks[index] for index in chosen],
            None if self.categories is None else [self.categories[index] for index in chosen],
        )


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in string.punctuation else f"{text}."
