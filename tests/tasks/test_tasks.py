"""The synthetic tasks: bounds, splits, gold answers computed a second time."""

import functools
import pathlib
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import tasks
from jaxkv.tasks import haystack, lexicon, passages, reasoning

FOLDER = pathlib.Path(__file__).parents[2] / "models" / "needle"
NIAH = [name for name in tasks.TASKS if name.startswith("niah")]
NOISY = [*NIAH, "vt"]
NOISY = [n for n in NOISY if n not in ("niah_multikey_needles", "niah_multikey_uuid")]
ASKS = [name for name in tasks.TASKS if name not in ("ledger", "machine")]
SPLITS = ("train", "eval")
CASES = dict(
    task=st.sampled_from(sorted(tasks.TASKS)),
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 2**32),
    length=st.integers(512, 2048),
)


@functools.cache
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def count(text):
    return len(tokenizer().encode(text, add_special_tokens=False))


def draw(task, seed, *, length=1024, split="eval", **options):
    return tasks.make(
        task,
        np.random.default_rng(seed),
        length=length,
        count_tokens=count,
        split=split,
        **options,
    )


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_bound_gold_and_boundary(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    prompt, answer = sample.prompt, sample.answer
    together = count(prompt + answer)
    assert together <= length
    assert count(prompt) + count(answer) == together
    assert count(answer) < sample.max_new_tokens
    assert answer[0] in " \n" and not prompt[-1].isspace()
    assert tasks.score_all(answer, sample.outputs) == 1.0
    assert tasks.exact(answer, sample.outputs)
    assert not tasks.exact("", sample.outputs)
    assert sample == draw(task, seed, length=length, split=split)


@settings(max_examples=60, deadline=None)
@given(**CASES | {"task": st.sampled_from(NOISY)})
def test_noise_haystacks_fill_the_length(task, split, seed, length):
    # Few distractors, so that they never take the room of all the noise.
    options = {"distractors": 2} if task in ("vt", "niah_multikey") else {}
    sample = draw(task, seed, length=length, split=split, **options)
    assert count(sample.prompt + sample.answer) >= min(0.97 * length, length - 12)


@pytest.mark.parametrize("task", ["niah_multikey_needles", "niah_multikey_uuid"])
@pytest.mark.parametrize("length", [512, 2048])
def test_needle_haystacks_lack_less_than_a_needle(task, length):
    sample = draw(task, 1, length=length)
    lines = re.findall("One of the special magic .*", sample.prompt)
    missing = length - count(sample.prompt + sample.answer)
    assert 0 <= missing <= max(count("\n" + line) for line in lines) + 4


@settings(max_examples=60, deadline=None)
@given(**CASES | {"task": st.sampled_from(ASKS), "questions": st.integers(1, 8)})
def test_many_questions(task, split, seed, length, questions):
    sample = draw(task, seed, length=length, split=split, questions=questions)
    flags = [is_answer for _, is_answer in sample.segments]
    assert flags == [False, True] * (len(flags) // 2)
    assert 1 <= len(flags) // 2 <= questions
    text = "".join(text for text, _ in sample.segments)
    assert sum(count(text) for text, _ in sample.segments) == count(text) <= length


@settings(max_examples=100, deadline=None)
@given(**CASES)
def test_a_corrupted_answer_is_wrong(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    rng = np.random.default_rng(seed)
    answer = list(sample.answer)
    places = [i for i, c in enumerate(answer) if c.isalnum() and c.isascii()]
    if task in ("ledger", "machine"):
        assert reasoning.check(sample, sample.answer) == (True, 1.0)
    place = places[int(rng.integers(len(places)))]
    answer[place] = "9" if answer[place] != "9" else "1"
    wrong = "".join(answer)
    assert not tasks.exact(wrong, sample.outputs)
    assert tasks.score_all(wrong, sample.outputs) < 1
    if task in ("ledger", "machine"):
        whole, lines = reasoning.check(sample, wrong)
        gold = sample.answer.strip().split("\n")
        assert not whole and lines == pytest.approx(1 - 1 / len(gold))


def keys_of(sample):
    if sample.task == "vt":
        return set(re.findall(r"VAR ([A-Z]{5}) =", sample.prompt))
    if sample.task == "ledger":
        return set(re.findall(r"\n([a-z]+) [+-]\d", sample.prompt))
    if sample.task == "machine":
        return set(re.findall(r"\n([a-z]+): add", sample.prompt))
    return set(re.findall(r"magic \w+ for (\S+) is: ", sample.prompt))


@pytest.mark.parametrize("task", [*NIAH, "vt", "ledger", "machine"])
@pytest.mark.parametrize("split", SPLITS)
def test_keys_stay_in_their_split(task, split):
    for seed in range(4):
        keys = keys_of(draw(task, seed, split=split))
        assert keys
        for key in keys:
            whole = task in ("niah_multikey_uuid", "vt", "ledger", "machine")
            words = [key] if whole else key.split("-")
            assert {lexicon.split_of(word) for word in words} == {split}


@settings(max_examples=60, deadline=None)
@given(**CASES | {"task": st.sampled_from(NIAH)})
def test_needles_are_in_the_prompt_and_answers_follow_them(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    needles = re.findall(
        r"^One of the special magic \w+ for (\S+) is: (\S+)\.$", sample.prompt, re.M
    )
    question = sample.prompt.rpartition("\n")[2]
    asked = [key for key, _ in needles if key in question]
    held = {key: [v for k, v in needles if k == key] for key in asked}
    in_order = sorted(held, key=question.index)
    gold = [value for key in in_order for value in held[key]]
    assert tuple(gold) == sample.outputs
    assert sample.answer == " " + ", ".join(gold)
    if task not in ("niah_multikey", "niah_multikey_needles", "niah_multikey_uuid"):
        assert len(needles) == len(gold)
    else:
        assert len(needles) > 1 or length < 700
    if task == "niah_multiquery":
        assert len(held) == 4
    if task == "niah_multivalue":
        assert len(held) == 1 and len(gold) == 4


def test_depths_are_uniform():
    depths = []
    for seed in range(400):
        prompt = draw("niah_single_1", seed, length=512).prompt
        depths.append(prompt.index("One of the special") / prompt.rindex("\n"))
    shares = np.histogram(depths, bins=5, range=(0, 1))[0] / len(depths)
    assert shares.min() > 0.1 and shares.max() < 0.32


@settings(max_examples=30, deadline=None)
@given(**CASES | {"task": st.just("vt")})
def test_variable_chains_recomputed(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    holds = {}
    for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", sample.prompt, re.M):
        holds[name] = holds.get(value, value)
    asked = re.search(r"the value (\d+)", sample.prompt).group(1)
    chain = tuple(name for name, value in holds.items() if value == asked)
    assert chain == sample.outputs
    assert len(chain) == 5 if split == "eval" else 2 <= len(chain) <= 5


@settings(max_examples=30, deadline=None)
@given(**CASES | {"task": st.just("ledger")})
def test_ledger_recomputed(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    total = int(re.search(r"starts at (\d+)", sample.prompt).group(1))
    entries = re.findall(r"^([a-z]+) ([+-]\d)$", sample.prompt, re.M)
    assert len({name for name, _ in entries}) == len(entries)
    lines = []
    for name, amount in entries:
        total = (total + int(amount)) % 100
        lines.append(f"{name} {amount} {total:02d}")
    expected = "\n".join([*lines, f"total {total:02d}"])
    assert sample.answer == f"\n{expected}\n"


@settings(max_examples=30, deadline=None)
@given(**CASES | {"task": st.just("machine")})
def test_machine_recomputed(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    rule = r"^([a-z]+): add (\d), even ([a-z]+), odd ([a-z]+)$"
    rules = {m[0]: m[1:] for m in re.findall(rule, sample.prompt, re.M)}
    start = r"state (\w+) with total (\d+) and make (\d+) steps"
    state, total, steps = re.search(start, sample.prompt).groups()
    total = int(total)
    lines = []
    for step in range(int(steps), 0, -1):
        add, even, odd = rules[state]
        total = (total + int(add)) % 100
        word, after = ("odd", odd) if total % 2 else ("even", even)
        lines.append(f"{step}. {state} +{add} {total:02d} {word} {after}")
        state = after
    expected = "\n".join([*lines, f"total {total:02d}"])
    assert sample.answer == f"\n{expected}\n"


@pytest.mark.parametrize("task", ["ledger", "machine"])
@pytest.mark.parametrize("answer_tokens", [200, 1000, 4096])
def test_answer_of_a_wanted_length(task, answer_tokens):
    sample = tasks.TASKS[task](
        np.random.default_rng(3),
        answer_tokens=answer_tokens,
        count_tokens=count,
        split="eval",
    )
    assert answer_tokens - 16 <= count(sample.answer) <= answer_tokens


def test_the_walk_of_a_machine_is_long():
    for seed in range(8):
        sample = draw("machine", seed, length=4096, states=12)
        moves = re.findall(r"^\d+\. (.*)$", sample.answer, re.M)
        assert len(moves) > 200
        # A random map of 1,200 points would repeat after some 40 steps.
        assert len(set(moves)) > 100


@settings(max_examples=40, deadline=None)
@given(**CASES | {"task": st.sampled_from(["quote", "continue"])})
def test_quotes_are_verbatim(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    context = sample.prompt[: sample.prompt.rindex("\n\n")]
    assert sample.answer in context
    if task == "quote":
        number = re.search(r"section (\d+) word", sample.prompt).group(1)
        rest = context.split(f"\n\nSection {number}:", 1)[1]
        assert rest.split("\n\nSection", 1)[0] == sample.answer
    else:
        words = sample.prompt.rsplit("end of the passage: ", 1)[1]
        assert context.count(words) == 1
        rest = context.split(words, 1)[1]
        assert rest.split("\n\n", 1)[0] == sample.answer


@settings(max_examples=40, deadline=None)
@given(**CASES | {"task": st.just("edit")})
def test_edits_rename_one_identifier(task, split, seed, length):
    sample = draw(task, seed, length=length, split=split)
    asked = r"Repeat section (\d+) with every `(\w+)` changed to `(\w+)`"
    number, old, new = re.search(asked, sample.prompt).groups()
    block = sample.prompt.split(f"\n\nSection {number}:", 1)[1].split("\n\n", 1)[0]
    assert re.sub(rf"\b{old}\b", new, block) == sample.answer != block


def test_without_the_topics_text_is_made_up(monkeypatch):
    monkeypatch.setattr(passages, "topic_documents", lambda split: ())
    monkeypatch.setattr(passages, "stdlib_documents", lambda split: ())
    for seed in range(8):
        assert draw("quote", seed, length=600).answer


def test_lexicon():
    for words in (lexicon.ADJECTIVES, lexicon.NOUNS):
        assert len(set(words)) == len(words) > 250
        assert all(re.fullmatch("[a-z]+", word) for word in words)
    rng = np.random.default_rng(0)
    for split in SPLITS:
        keys = lexicon.word_keys(rng, 2000, split)
        assert len(set(keys)) == 2000
    with pytest.raises(ValueError, match="distinct"):
        lexicon.numbers(rng, 20, digits=1)


def test_scores():
    assert tasks.score_all("It is ABC, d", ("abc", "x")) == 0.5
    assert not tasks.exact("abc", ("abc", "x"))
    low, high = tasks.wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    for n in range(1, 400):
        assert tasks.wilson(0, n)[0] == 0.0 and tasks.wilson(n, n)[1] == 1.0


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="among"):
        draw("nonsense", 0)
    with pytest.raises(ValueError, match="split"):
        draw("vt", 0, split="test")
    for task in sorted(tasks.TASKS):
        with pytest.raises(ValueError, match="longer"):
            draw(task, 0, length=40)
    with pytest.raises(ValueError, match="answer_tokens"):
        reasoning.ledger(np.random.default_rng(0), count_tokens=count, split="eval")
    with pytest.raises(ValueError, match="n >= 1"):
        tasks.wilson(0, 0)


def test_noise_starts_with_any_of_its_sentences():
    prompts = [draw("niah_single_1", seed, length=512).prompt for seed in range(40)]
    starts = {prompt.split("\n")[1].split(".")[0] + "." for prompt in prompts}
    assert starts >= set(haystack.NOISE)
