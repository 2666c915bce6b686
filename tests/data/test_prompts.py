import numpy as np
import pytest

from fedsim.data.prompts import TEMPLATES, PromptedTexts, Template, choose_template

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add the numbers.

### Input:
1 2

### Response:
"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Say {input} aloud

### Response:
"""


def test_alpacas_prompt_is_exact() -> None:
    assert TEMPLATES["alpaca"].render("Add the numbers.", "1 2")[0] == WITH_INPUT
    # what stands in a text is never a slot
    assert TEMPLATES["alpaca"].render("Say {input} aloud", "")[0] == WITHOUT_INPUT


def test_natural_instructions_prompt_is_definition_and_input() -> None:
    text, _ = TEMPLATES["natural_instructions"].render(" Add the numbers ", "1 2?\n")

    assert text == (
        "Definition: Add the numbers.\n\nNow complete the following example -\nInput: 1 2?\nOutput: "
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("given", ["", "an input."])
def test_spans_say_where_the_pieces_are(name: str, given: str) -> None:
    text, spans = TEMPLATES[name].render("A rule.", given)

    assert text[spans.instruction_start : spans.instruction_end] == "A rule."
    assert text[spans.input_start : spans.input_end] == given
    assert spans.prompt_end == len(text)


def test_a_template_of_ones_own() -> None:
    template = choose_template("custom", "{input} -> {instruction}: ", None)
    other = choose_template("custom", "{input} -> {instruction}: ", "{instruction}= ")

    assert template.render("add", "1 2")[0] == "1 2 -> add: "
    assert template.render("add", "")[0] == " -> add: "
    assert other.render("add", "")[0] == "add= "
    assert choose_template("alpaca", None, None) is TEMPLATES["alpaca"]


def test_texts_are_rendered_when_asked_for() -> None:
    texts = PromptedTexts(
        Template("{instruction}|{input}|", "{instruction}|"),
        ["a", "a", "b"],
        ["1", "", "3"],
        [["x", "y"], ["z"], []],
        np.array([0, 1, 2], dtype=np.int8),
        ["t", "t", "u"],
    )

    assert list(texts) == texts[:] == ["a|1|x", "a|z", "b|3|"]
    chosen = texts.select(np.array([2, 0]))
    assert list(chosen) == ["b|3|", "a|1|x"]
    assert chosen.tasks == ["u", "t"]
    assert chosen.categories is None
    assert chosen.parts.tolist() == [2, 0]
    assert [len(references) for references in chosen.references] == [0, 2]
