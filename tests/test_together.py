"""Work side by side: questions meet, errors surface, and nothing is left running."""

import threading
import time

import pytest

from assay.core.together import together


def asks(*questions):
    """Return a piece of work that asks these one after the other, and returns the answers."""
    return lambda seat: [seat.ask(q) for q in questions]


class Oracle:
    """Answers in capitals, and remembers which questions it got at once."""

    def __init__(self):
        self.heard = []

    def __call__(self, questions):
        self.heard.append([*questions])
        return [q.upper() for q in questions]


def test_questions_that_are_asked_at_the_same_time_are_answered_together():
    oracle = Oracle()
    assert [*together([asks("a", "b", "c"), asks("d", "e")], oracle, 2)] == [["D", "E"], ["A", "B", "C"]]
    assert oracle.heard == [["a", "d"], ["b", "e"], ["c"]]


def test_at_most_so_many_are_under_way_and_the_next_begins_when_one_has_ended():
    oracle = Oracle()
    assert [*together([asks("a"), asks("b", "c"), asks("d", "e")], oracle, 2)] == [["A"], ["B", "C"], ["D", "E"]]
    assert oracle.heard == [["a", "b"], ["c", "d"], ["e"]]


def test_work_that_asks_nothing_is_done_too():
    assert [*together([lambda _: 1, lambda _: 2], Oracle(), 8)] == [1, 2]
    assert not [*together([], Oracle(), 8)]


def test_only_one_piece_runs_at_a_time():
    inside, most = [], []

    def work(seat):
        for _ in range(20):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()
            seat.ask("a")

    assert len([*together([work] * 4, Oracle(), 4)]) == 4
    assert max(most) == 1


def test_time_that_others_took_is_not_ones_own(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(questions):
        now[0] += sum(map(len, questions))
        return questions

    def work(question):
        def ask(seat):
            now[0] += 100  # before the first question each has its own time
            begin = time.perf_counter()
            seat.ask(question)
            return time.perf_counter() - begin - seat.waited

        return ask

    assert [*together([work("a"), work("a" * 9)], slow, 2)] == pytest.approx([1, 9])


@pytest.mark.parametrize("where", ["work", "answer", "interrupted", "consumer"])
def test_an_error_ends_all_pieces_and_their_threads(where):
    before, ended = threading.active_count(), []

    def answer(questions):
        if where == "answer":
            raise LookupError
        return questions

    def patient(seat):
        try:
            while True:
                seat.ask("a")
        finally:
            ended.append(1)

    def failing(seat):
        seat.ask("b")
        if where == "consumer":
            return
        raise KeyboardInterrupt if where == "interrupted" else LookupError

    parts = together([patient, failing, patient], answer, 3)
    if where == "consumer":
        next(parts)
        parts.close()
    else:
        with pytest.raises(KeyboardInterrupt if where == "interrupted" else LookupError):
            next(parts)
    assert len(ended) == 2
    assert threading.active_count() == before
