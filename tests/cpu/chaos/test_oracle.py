"""Over 8-bit pages, right answers are let through, and those of other prompts are not."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import msgspec
import pytest

from fourfold.gateway.detokenizer import Detokenizer
from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import find_source
from tests.cpu import driving
from tests.cpu.chaos.oracle import Answer, Heard, LikelyJudge
from tests.cpu.chaos.questions import draw_questions
from tests.cpu.chaos.served import coded_pages
from tests.cpu.gateway.made_tokenizers import write_default


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LikelyJudge, list[Answer]]]:
    """A judge, and what one engine answers to questions that share its steps."""
    folder = tmp_path_factory.mktemp("judged")
    served = coded_pages(folder, "cpu")
    tokenizer = load_tokenizer(find_source(str(write_default(folder / "words")), weights=False))
    questions = draw_questions(random.Random(3), 20)
    engine = served.make_engine(served.load(), running=8)
    asked = [driving.submit(q.number, q.prompt, q.sampling, q.n) for q in questions]
    news = driving.run(engine, asked)
    answers = []
    for question in questions:
        samples = []
        for index in range(question.n):
            outputs = news[question.number, index]
            detokenizer, heard = Detokenizer(tokenizer), Heard()
            heard.tokens = driving.tokens(outputs)
            heard.logprobs = [o.logprob.logprob for o in outputs if o.logprob is not None]
            heard.text = "".join(map(detokenizer.push, heard.tokens)) + detokenizer.flush()
            samples.append(heard)
        answers.append(Answer(f"request {question.number}", question, samples, whole=True))
    judge = LikelyJudge(served, tokenizer, questions)
    yield judge, answers
    judge.close()


def test_right_answers_are_let_through(judged: tuple[LikelyJudge, list[Answer]]) -> None:
    judge, answers = judged
    assert judge.complaints(answers) == []
    cut = copy.deepcopy(answers[0])
    for heard in cut.samples:
        del heard.tokens[5:], heard.logprobs[5:]
        heard.text = heard.text[:3]
    assert judge.complaints([Answer("cut", cut.question, cut.samples, whole=False)]) == []
    nothing = Answer("none", cut.question, [Heard() for _ in cut.samples], whole=True)
    assert len(judge.complaints([nothing])) == cut.question.n
    (short, *_) = judge.complaints([Answer("cut", cut.question, cut.samples, whole=True)])
    assert "5 instead of" in short


def test_pages_of_another_prompt_are_noticed(judged: tuple[LikelyJudge, list[Answer]]) -> None:
    """All answers, with 64 tokens of their prompts taken for others."""
    judge, answers = judged
    rng = random.Random(1)
    altered = []
    for answer in answers:
        prompt = list(answer.question.prompt)
        if len(prompt) < 128:
            continue
        first = 64 * rng.randrange(len(prompt) // 64)
        prompt[first : first + 64] = (rng.randint(3, 319) for _ in range(64))
        question = msgspec.structs.replace(answer.question, prompt=tuple(prompt))
        altered.append(Answer(answer.name, question, answer.samples, whole=True))
    samples = sum(answer.question.n for answer in altered)
    assert samples > 10
    assert len(judge.complaints(altered)) >= 0.8 * samples


@pytest.mark.parametrize("fault", ["lost", "repeated", "another"])
def test_a_wrong_token_is_noticed(judged: tuple[LikelyJudge, list[Answer]], fault: str) -> None:
    judge, answers = judged
    answer = next(a for a in answers if a.question.sampling.max_tokens >= 40)
    samples = copy.deepcopy(answer.samples)
    tokens, logprobs = samples[0].tokens, samples[0].logprobs
    samples[0].text = ""  # which would tell by itself
    if fault == "lost":
        del tokens[10], logprobs[10]
    elif fault == "repeated":
        tokens.insert(10, tokens[9])
        logprobs.insert(10, logprobs[9])
    else:
        tokens[10] = tokens[10] % 300 + 4
    (complaint,) = judge.complaints([Answer("wrong", answer.question, samples, whole=False)])
    assert complaint.startswith("wrong, sample 0")
