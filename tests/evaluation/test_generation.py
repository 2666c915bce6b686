"""Answers by greedy generation, and teacher-forced guesses."""

import numpy as np
import pytest
import torch

from fedsim.errors import AdapterError, ConfigError, ModelError
from fedsim.evaluation.generation import GeneratedAnswers, Questions, TeacherForcedGuesses, questions_of
from fedsim.evaluation.rouge import answer_metrics, merge_scores
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.peft_format import save_peft_adapter
from fedsim.models.adapted import AdaptedModel
from fedsim.models.generate import GreedyGenerator, stop_tokens
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from tests.helpers import VOCABULARY, make_store, random_texts, tiny_opt, word_tokenizer

CPU = torch.device("cpu")
MODULES = ["q_proj", "v_proj", "fc1", "down_proj"]
NEW = 12


def tiny_llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).to(dtype).eval()


def opt(dtype=torch.float32):
    return tiny_opt(dtype, init_std=0.5)


def targets_of(model):
    present = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return find_targets(model, [name for name in MODULES if name in present])


def random_adapter(model, scale=0.3, dtype=torch.float32):
    """Ranks and scalings differ from module to module."""
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for index, (path, (i, o)) in enumerate(targets_of(model).items()):
        rank = 2 + index % 2
        down, up = torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator)
        modules[path] = LoraFactors(down.to(dtype) * scale, up.to(dtype) * scale, 16 / rank / 8)
    return AdapterState(modules)


def random_prompts(count=9, vocabulary=VOCABULARY, longest=20):
    generator = np.random.default_rng(3)
    return [generator.integers(3, vocabulary, generator.integers(1, longest)) for _ in range(count)]


def with_peft(model, adapter, folder):
    from peft import PeftModel

    save_peft_adapter(adapter, folder, "base", MODULES)
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def alone(model, prompts, new=NEW, stop=None):
    """Each prompt by itself through `generate`, so without padding; up to the stop token, which is left out."""
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=stop,
            pad_token_id=1,
        )
        answer = output[0, len(prompt) :].tolist()
        answers.append(answer[: answer.index(stop)] if stop in answer else answer)
    return answers


def wrapped(kind, model):
    targets = targets_of(model)
    return AdaptedModel(model, targets, CPU) if kind == "adapted" else StackedModel(model, targets, CPU)


def flat(batches):
    return [tokens.tolist() for batch in batches for tokens in batch]


@pytest.mark.parametrize("kind", ["adapted", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [opt, tiny_llama])
def test_left_padded_batches_equal_generate_of_peft(make, dtype, kind, tmp_path):
    adapter = random_adapter(make(), dtype=dtype)
    prompts = random_prompts()
    batches = [prompts[:5], prompts[5:8], prompts[8:]]
    oracle = with_peft(make(dtype), adapter, tmp_path)
    free = alone(oracle, prompts)
    generator = GreedyGenerator(wrapped(kind, make(dtype)), 1, ())
    assert flat(generator.answers(adapter, batches, NEW)) == free
    plain = alone(make(dtype), prompts)
    assert flat(generator.answers(None, batches, NEW)) == plain
    assert plain != free, "contrast: the adapter is what answers"
    assert len({token for answer in free for token in answer}) > 10, "not one token again and again"

    stop = free[0][3]
    ended = alone(oracle, prompts, stop=stop)
    assert flat(GreedyGenerator(wrapped(kind, make(dtype)), 1, [0, stop]).answers(adapter, batches, NEW)) == [
        answer[: answer.index(0)] if 0 in answer else answer for answer in ended
    ]
    assert len({len(answer) for answer in ended}) > 1, "some end early, others do not"


@pytest.mark.parametrize("kind", ["adapted", "stacked"])
def test_a_pretrained_llama(kind, shared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time", "The cat", "Lily and her dog went to the park. They", "One day, Tim"]
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    adapter = random_adapter(load(), scale=0.15)
    oracle = alone(with_peft(load(), adapter, tmp_path), prompts, 20, 2)
    model = load()
    generator = GreedyGenerator(wrapped(kind, model), 0, stop_tokens(model, tokenizer))
    assert flat(generator.answers(adapter, [prompts], 20)) == oracle
    plain = flat(generator.answers(None, [prompts], 20))
    assert plain == alone(load(), prompts, 20, 2) != oracle
    assert tokenizer.decode(plain[0]).startswith(", there was a little girl named Lily."), (
        "its published sample"
    )


@pytest.mark.parametrize("checkpoint_gradients", [False, True])
def test_the_engine_goes_on_as_before(checkpoint_gradients):
    model = opt()
    store, examples = make_store(random_texts(8)), np.arange(8)
    adapter = random_adapter(model)
    stacked = StackedModel(model, targets_of(model), CPU, checkpoint_gradients=checkpoint_gradients)
    scorer, generator = PackedScorer(stacked), GreedyGenerator(stacked, 1, ())
    settings = model.generation_config
    [before] = scorer.losses([adapter], store, [examples])
    first = flat(generator.answers(adapter, [random_prompts()], NEW))
    np.testing.assert_array_equal(scorer.losses([adapter], store, [examples])[0], before)
    with pytest.raises(AdapterError):
        generator.answers(AdapterState({}), [random_prompts()], NEW)
    np.testing.assert_array_equal(scorer.losses([adapter], store, [examples])[0], before)
    assert flat(generator.answers(adapter, [random_prompts()], NEW)) == first
    assert model.generation_config is settings
    stacked.unwrap()
    padded = AdaptedModel(model, targets_of(model), CPU)
    loss = PaddedScorer(padded, 1)
    [expected] = loss.losses([adapter], store, [examples])
    np.testing.assert_allclose(expected, before, rtol=1e-5)
    assert flat(GreedyGenerator(padded, 1, ()).answers(adapter, [random_prompts()], NEW)) == first


def test_settings_in_the_models_files_are_not_used():
    prompts = random_prompts()
    expected = alone(opt(), prompts)
    model = opt()
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, suppress_tokens=expected[0]
    )
    generator = GreedyGenerator(AdaptedModel(model, targets_of(model), CPU), 1, ())
    assert flat(generator.answers(None, [prompts], NEW)) == expected


def test_stop_tokens_are_the_tokenizers_and_the_models():
    model, tokenizer = opt(), word_tokenizer()
    assert stop_tokens(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = [7, 2, 5]
    assert stop_tokens(model, tokenizer) == (2, 5, 7)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert stop_tokens(model, tokenizer) == ()


def test_a_model_that_cannot_generate_is_refused():
    body = opt().model
    with pytest.raises(ModelError, match="generate text to be scored on answers, and OPTModel is not"):
        GreedyGenerator(AdaptedModel(body, {}, CPU), 1, ())


def questions(count=11):
    generator = np.random.default_rng(5)
    prompts = random_prompts(count)
    targets = [generator.integers(3, VOCABULARY, generator.integers(1, 6)) for _ in range(count)]
    tokenizer = word_tokenizer()
    texts = tuple((tokenizer.decode(target.tolist()), "w3 w4 w5") for target in targets)
    return Questions(tuple(prompts), tuple(targets), texts)


def test_any_share_of_the_batches_gives_the_same_scores():
    model, asked, tokenizer = opt(), questions(), word_tokenizer()
    adapter = random_adapter(model)
    generator = GreedyGenerator(StackedModel(model, targets_of(model), CPU), 1, ())
    tests = [
        GeneratedAnswers(generator, tokenizer, asked, 6, 60, 64),
        TeacherForcedGuesses(generator, tokenizer, asked, 50),
    ]
    for test in tests:
        assert len(test.batches) > 3
        assert sorted(np.concatenate(test.batches).tolist()) == list(range(len(asked)))
        whole = merge_scores(test.measure(adapter))
        parts = {}
        for rank in range(3):
            parts |= test.measure(adapter, range(rank, len(test.batches), 3))
        assert test.measure(adapter, []) == {}
        joined = merge_scores(parts)
        assert joined.predictions == whole.predictions
        assert joined.examples.tolist() == list(range(len(asked)))
        clients = [example % 3 for example in range(len(asked))]
        assert answer_metrics(joined, clients) == answer_metrics(whole, clients)
    one_by_one = flat(generator.answers(adapter, [[prompt] for prompt in asked.prompts], 6))
    generated = merge_scores(tests[0].measure(adapter))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in one_by_one]
    assert list(generated.predictions) == texts, "in example order, whatever the batches"


def test_questions_of_an_instruction_corpus():
    class Answers:
        answer_start = np.array([3, 1])

        def references(self, index):
            return (("w8", "w9"), ("w4",))[index]

    class Store:
        answers = Answers()

        def sequence(self, index):
            return (np.array([2, 6, 7, 8, 2], dtype=np.int32), np.array([2, 4], dtype=np.int32))[index]

    asked = questions_of(Store(), np.array([1, 0]))
    assert [prompt.tolist() for prompt in asked.prompts] == [[2], [2, 6, 7]]
    assert [target.tolist() for target in asked.targets] == [[4], [8, 2]]
    assert asked.references == (("w4",), ("w8", "w9"))
    with pytest.raises(ConfigError, match=r"needs instruction data.*got plain text"):
        questions_of(make_store(random_texts(3)), np.arange(3))


def test_a_right_answer_scores_one():
    """A stub in the model's place answers rightly."""
    asked = questions()

    class Knows:
        def answers(self, adapter, batches, max_new_tokens):
            texts = {
                prompt.tobytes(): target for prompt, target in zip(asked.prompts, asked.targets, strict=True)
            }
            return [[texts[prompt.tobytes()] for prompt in prompts] for prompts in batches]

    test = GeneratedAnswers(Knows(), word_tokenizer(), asked, 6, 60, None)
    scores = merge_scores(test.measure(AdapterState({})))
    assert scores.rouge_l.tolist() == scores.exact_match.tolist() == [1.0] * len(asked)


def test_an_answer_must_fit_the_positions_of_the_model():
    asked = questions()
    longest = max(map(len, asked.prompts))
    GeneratedAnswers(None, word_tokenizer(), asked, 64 - longest, 60, 64)
    with pytest.raises(
        ConfigError, match=rf"longest prompt \({longest} tokens\) must be at most 64 together"
    ):
        GeneratedAnswers(None, word_tokenizer(), asked, 65 - longest, 60, 64)


@pytest.mark.parametrize("kind", ["adapted", "stacked"])
def test_teacher_forced_guesses_are_those_of_single_sequences(kind):
    model = opt(torch.float64)
    adapter = random_adapter(model)
    sequences = random_prompts()
    batched = flat(GreedyGenerator(wrapped(kind, model), 1, ()).teacher_forced(adapter, [sequences]))
    single = AdaptedModel(opt(torch.float64), targets_of(opt()), CPU)
    single.load(adapter)
    for sequence, guesses in zip(sequences, batched, strict=True):
        ids = torch.from_numpy(sequence)[None]
        assert guesses == single.logits(ids, torch.ones_like(ids)).argmax(-1)[0].tolist()


def test_the_published_form_compares_guesses_with_the_tokens_they_are_not_for():
    """A stub in the model's place guesses each next token rightly, and w9 after the last."""
    asked = Questions((np.array([2, 3, 4]),), (np.array([5, 6]),), (("w5 w6",),))

    class Knows:
        def teacher_forced(self, adapter, batches):
            return [[np.append(sequence[1:], 9) for sequence in sequences] for sequences in batches]

    def scored(**form):
        test = TeacherForcedGuesses(Knows(), word_tokenizer(), asked, 50, **form)
        return merge_scores(test.measure(AdapterState({})))

    shifted, published = scored(), scored(published=True)
    assert shifted.predictions == ("w3 w4 w5 w6",)
    assert shifted.rouge_l[0] == 1.0
    assert published.predictions == ("w3 w4 w5 w6 w9",), "one guess is for no token"
    assert published.rouge_l[0] == pytest.approx(2 * (4 / 5) / (4 / 5 + 1))
