"""The plan: every question once, shared prefixes once, one plan whatever the order."""

import random
from itertools import pairwise

import pytest

from mmpeft.retention.plan import (
    BATCH_TOKENS,
    HEADER_SEQUENCES,
    HEADER_TOKENS,
    ROW_TOKENS,
    Question,
    plan,
    shared,
)


def tree(seed: int, count: int = 120, words: int = 3, longest: int = 12) -> list[Question]:
    """Questions that branch a lot; some behind a common start of 40 tokens."""
    rng = random.Random(seed)
    headers = [(), tuple(rng.choices(range(words), k=40)), tuple(rng.choices(range(words), k=50))]
    return [
        Question(
            (*rng.choice(headers), *rng.choices(range(words), k=rng.randint(1, longest))),
            tuple(rng.choices(range(words), k=rng.randint(1, 4))),
        )
        for _ in range(count)
    ]


def read(batch, row, columns) -> list[tuple[list[int], int]]:
    """For each column: all tokens the model has read there, and the position of the last."""
    found = []
    for column in columns:
        path, at = [], column
        while at >= 0:
            path.append(at)
            assert row.parents[at] < at  # a parent stands before its children
            at = row.parents[at]
        path = path[::-1]
        assert [row.depths[c] for c in path] == [
            len(batch.header) + i for i in range(len(path))
        ]  # every token at its own position
        assert row.visible()[column].nonzero().flatten().tolist() == path
        found.append((list(batch.header) + [row.tokens[c] for c in path], row.depths[column]))
    return found


def check(questions, batches):
    """Brute force: at each column read stands exactly what precedes that answer token."""
    answered = [question for batch in batches for question in batch.questions]
    assert sorted(answered) == sorted(set(questions))
    for batch in batches:
        for row in batch.rows:
            assert len(row.tokens) == len(row.depths) == len(row.parents)
            for question, columns in row.reads:
                assert len(columns) == len(question.answer)
                seen = read(batch, row, columns)
                for i, (tokens, depth) in enumerate(seen):
                    assert tokens == [*question.context, *question.answer[:i]]
                    assert depth == len(question.context) + i - 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_trees_are_read_as_brute_force_reads_them(seed, share):
    questions = tree(seed)
    check(questions, plan(questions, share))


def test_a_shared_prefix_is_stored_once():
    # 1 2 3 -> {4, 5 6}; 1 2 7 -> {8}; 9 -> {9}
    questions = [
        Question((1, 2, 3), (4,)), Question((1, 2, 3), (5, 6)), Question((1, 2, 7), (8,)),
        Question((9,), (9,)),
    ]  # fmt: skip
    (batch,) = plan(questions)
    (row,) = batch.rows
    assert batch.header == ()
    assert row.tokens == [1, 2, 3, 5, 7, 9]  # the last token of an answer is only predicted
    assert row.parents == [-1, 0, 1, 2, 1, -1]
    assert row.depths == [0, 1, 2, 3, 2, 0]
    assert {q: columns for q, columns in row.reads} == {
        questions[0]: [2], questions[1]: [2, 3], questions[2]: [4], questions[3]: [5],
    }  # fmt: skip


def test_without_sharing_every_sequence_stands_alone():
    questions = tree(0)
    rows = [row for batch in plan(questions, share=False) for row in batch.rows]
    assert all(row.parents == list(range(-1, len(row.tokens) - 1)) for row in rows)
    assert len(rows) == len({question.tokens for question in questions})


@pytest.mark.parametrize("share", [True, False])
def test_the_order_of_the_questions_changes_nothing(share):
    questions = tree(7)
    shuffled = [*questions, *questions[:20]]  # nor do repetitions
    random.Random(1).shuffle(shuffled)
    assert plan(shuffled, share) == plan(questions, share)


def test_nothing_to_ask_is_no_batch():
    assert plan([]) == plan([], share=False) == []


@pytest.mark.parametrize(
    ("sequences", "length", "expected"),
    [
        (HEADER_SEQUENCES, HEADER_TOKENS, HEADER_TOKENS),
        (HEADER_SEQUENCES, HEADER_TOKENS + 9, HEADER_TOKENS + 9),
        (HEADER_SEQUENCES - 1, HEADER_TOKENS, 0),
        (HEADER_SEQUENCES, HEADER_TOKENS - 1, 0),
    ],
)
def test_a_long_common_start_is_taken_out(sequences, length, expected):
    start = tuple(range(100, 100 + length))
    questions = [Question((*start, i, 1), (2, 3)) for i in range(sequences)]
    batches = plan(questions)
    assert {len(batch.header) for batch in batches} == {expected}
    check(questions, batches)


def test_every_task_has_its_own_header():
    starts = [tuple(range(k, k + 40)) for k in (100, 200)]
    questions = [Question((*start, i), (2,)) for start in starts for i in range(20)]
    questions += [Question((5, i), (2,)) for i in range(20)]
    batches = plan(questions)
    assert sorted({batch.header for batch in batches}) == [(), *starts]
    check(questions, batches)


def test_a_header_never_swallows_the_position_before_the_first_answer():
    """One context ends inside what all of them share."""
    start = tuple(range(100, 150))
    questions = [Question(start[:40], start[40:])]
    questions += [Question(start, (i,)) for i in range(20)]
    questions += [Question((*start, i), (3,)) for i in range(20)]
    batches = plan(questions)
    assert max(len(batch.header) for batch in batches) == 39
    check(questions, batches)
    # the whole context is the header but for its last token, which predicts
    same = [Question(start, (i, 1)) for i in range(20)]
    batches = plan(same)
    assert batches[0].header == start[:-1]
    check(same, batches)


def test_rows_and_batches_are_no_wider_than_they_may_be():
    rng = random.Random(3)
    questions = [
        Question(tuple(rng.choices(range(50), k=rng.randint(1, 150))), (1, 2)) for _ in range(100)
    ]
    questions += [Question(tuple(rng.choices(range(50), k=ROW_TOKENS + 100)), (1,))]
    batches = plan(questions)
    check(questions, batches)
    assert sum(len(batch.rows) for batch in batches) > 10
    for batch in batches:
        widths = [len(row.tokens) for row in batch.rows]
        assert len(batch.rows) == 1 or max(widths) * len(widths) <= BATCH_TOKENS
        for row in batch.rows:
            sequences = {question.tokens for question, _ in row.reads}
            assert len(row.tokens) <= ROW_TOKENS or len(sequences) == 1
    tokens = sum(len(row.tokens) for batch in batches for row in batch.rows)
    assert tokens <= sum(len(question.tokens) for question in questions)


def test_shared_tokens_are_counted_by_hand():
    """120 sorted sequences in one row take what each does not share with the one before it."""
    questions = [question for question in tree(11, longest=4) if len(question.context) < 40][:20]
    sequences = sorted({question.tokens for question in questions})
    expected = len(sequences[0])
    expected += sum(len(b) - shared(a, b) for a, b in pairwise(sequences))
    (batch,) = plan(questions)
    assert [len(row.tokens) for row in batch.rows] == [expected]
