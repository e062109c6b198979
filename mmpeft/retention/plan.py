"""Which tokens run together: every shared prefix once, rows packed full, one plan for both sides.

Sorted token sequences that start alike stand next to each other. Laid out in that order, each adds
only the tokens its predecessor does not have, and the row is a tree: a token attends to itself and
its ancestors, at the position it has in its own sequence (tree attention: Cai et al. 2024, arXiv
2401.10774, section 3.1.2). The choices of an item, items with one template and few-shot examples
share what they have in common; a start that is long and common to many sequences (a few-shot
header) is taken out and encoded once for all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

ROW_TOKENS = 256  # a row's width; attention over a row is quadratic in it
BATCH_TOKENS = 2048
HEADER_TOKENS = 32  # a shorter common start is cheaper inside the rows
HEADER_SEQUENCES = 16

Tokens = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Question:
    """The log-likelihood of `answer` behind `context`, both token ids and not empty."""

    context: Tokens
    answer: Tokens

    @property
    def tokens(self) -> Tokens:
        """What the model reads; the last answer token is only predicted."""
        return (*self.context, *self.answer[:-1])


@dataclass
class Row:
    """A packed tree. `parents[i]` is the column of token i's predecessor (-1: the header)."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[Question, list[int]]] = field(default_factory=list)

    def visible(self) -> torch.Tensor:
        """(T, T) bool: row i sees its ancestors and itself."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


@dataclass
class Batch:
    """Rows behind one header."""

    header: Tokens
    rows: list[Row]

    @property
    def questions(self) -> list[Question]:
        return [question for row in self.rows for question, _ in row.reads]


def plan(
    questions: Sequence[Question], share: bool = True, behind_header: int = HEADER_SEQUENCES
) -> list[Batch]:
    """Batches that answer every (distinct) question; the order given does not matter.

    With `share` off every sequence stands alone in its row, padded on the right: what any causal
    model can run. `behind_header` is the least number of sequences for which a header is taken out.
    """
    by_tokens: dict[Tokens, list[Question]] = {}
    for question in sorted(set(questions)):
        by_tokens.setdefault(question.tokens, []).append(question)
    if not share:
        alone = sorted(by_tokens.values(), key=lambda own: -len(own[0].tokens))
        return _batches((), [_lay(Row(), own, (), ()) for own in alone])
    pools: dict[Tokens, list[list[Question]]] = {}
    for header, members in _headers(sorted(by_tokens), by_tokens, behind_header):
        pools.setdefault(header, []).extend(by_tokens[tokens] for tokens in members)
    return [
        batch
        for header, groups in sorted(pools.items())
        for batch in _batches(header, _rows(header, groups))
    ]


def _headers(tokens: list[Tokens], by_tokens: dict, least: int, depth: int = 0):
    """Split sorted sequences into those behind one long common start and the rest: ().

    Goes down the tree of sequences until a node has a start worth taking out.
    """
    if len(tokens) < least:
        yield (), tokens
        return
    # a header must end before the first answer token is predicted
    limit = min(len(question.context) for one in tokens for question in by_tokens[one]) - 1
    common = min(shared(tokens[0], tokens[-1]), limit)
    if common >= HEADER_TOKENS:
        yield tokens[0][:common], tokens
    elif depth >= HEADER_TOKENS:
        yield (), tokens
    else:
        for _, branch in groupby(tokens, key=lambda one: one[: depth + 1]):
            yield from _headers(list(branch), by_tokens, least, depth + 1)


def shared(one: Tokens, other: Tokens) -> int:
    """Length of the common start."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _rows(header: Tokens, groups: list[list[Question]]) -> list[Row]:
    rows, before = [], ()
    for own in sorted(groups, key=lambda own: own[0].tokens):
        tokens = own[0].tokens[len(header) :]
        if rows and len(rows[-1].tokens) + len(tokens) - shared(before, tokens) <= ROW_TOKENS:
            _lay(rows[-1], own, header, before)
        else:
            rows.append(_lay(Row(), own, header, ()))
        before = tokens
    return rows


def _lay(row: Row, own: list[Question], header: Tokens, before: Tokens) -> Row:
    """Add the questions of one sequence behind `before`, the sequence laid last."""
    tokens = own[0].tokens[len(header) :]
    kept = shared(before, tokens)
    path = _path(row, len(before))[:kept]
    for depth in range(kept, len(tokens)):
        row.parents.append(path[-1] if path else -1)
        row.depths.append(len(header) + depth)
        path.append(len(row.tokens))
        row.tokens.append(tokens[depth])
    for question in own:
        first = len(question.context) - 1 - len(header)
        row.reads.append((question, path[first : first + len(question.answer)]))
    return row


def _path(row: Row, length: int) -> list[int]:
    """Columns of the sequence laid last, root first."""
    columns, column = [], len(row.tokens) - 1
    # sorted order: the last token laid ends the last sequence, unless that added nothing
    while column >= 0 and len(columns) < length:
        columns.append(column)
        column = row.parents[column]
    return columns[::-1]


def _batches(header: Tokens, rows: list[Row]) -> list[Batch]:
    """Rows of about one length together; wide rows few at a time."""
    batches: list[Batch] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        last = batches[-1] if batches else None
        if last and (len(last.rows) + 1) * len(last.rows[0].tokens) <= BATCH_TOKENS:
            last.rows.append(row)
        else:
            batches.append(Batch(header, [row]))
    return batches
