"""Which candidates become a pair: laws over all small cases, and examples done by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import GoldRanking, MadePairs
from logitlake_teacher.pairs.candidates import Candidate, distinct, normalised, usable
from logitlake_teacher.pairs.selection import NoPair, Rated, SelectedPair, select

EOS_ID = 1


def candidate(text: str, length: int = 3) -> Candidate:
    """A candidate of `length` tokens, EOS included, whose ids follow from its text."""
    ids = [10 + (sum(map(ord, text)) + 7 * place) % 50 for place in range(length - 1)]
    return Candidate(np.array([*ids, EOS_ID], np.int32), text, np.full(length, -0.5, np.float32))


def rated(text: str, rating: float, length: int = 3) -> Rated:
    """The same with a rating."""
    return Rated(candidate(text, length), float(np.float32(rating)))


def options(ratio: float = 1e6, difference: int | None = None) -> MadePairs:
    """Options of which only the length balance matters here."""
    return MadePairs(
        type="made", ranking=GoldRanking(type="gold"), max_length_ratio=ratio, max_length_difference=difference
    )


# Few values, so that ties and equal lengths are common.
FIELDS = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.3, 0.1, 0.3, 1.7]), st.integers(2, 9)), min_size=0, max_size=7
).map(lambda pairs: [rated(f"text {place}", *pair) for place, pair in enumerate(pairs)])
MARGINS = st.sampled_from([0.1, 0.5, 1.0, 2.5, 4.0])
GOLDS = st.one_of(st.none(), st.tuples(st.sampled_from([0.1, 1.0]), st.integers(2, 9)))
BALANCES = st.tuples(st.sampled_from([1.0, 1.5, 3.0, 1e6]), st.sampled_from([None, 0, 1, 4]))


def gold_of(field: tuple[float, int] | None) -> Rated | None:
    """The data's answer, where there is one."""
    return None if field is None else rated("gold", *field)


@given(FIELDS, MARGINS, BALANCES, GOLDS)
def test_a_pair_has_its_margin_and_its_balance(
    field: Sequence[Rated], margin: float, balance: tuple[float, int | None], gold: tuple[float, int] | None
) -> None:
    """Always: chosen >= rejected + margin, lengths within the balance, and no pair is left where one was possible."""
    ratio, difference = balance
    selected = select(field, margin, options(ratio, difference), gold_of(gold))

    def fits(one: Rated, other: Rated) -> bool:
        short, long = sorted(len(side.candidate.response_ids) for side in (one, other))
        balanced = long <= ratio * short and (difference is None or long - short <= difference)
        return one.rating - other.rating >= margin and balanced

    best = [gold_of(gold)] if gold is not None else list(field)
    possible = [(one, other) for one in best if one for other in field if one is not other and fits(one, other)]
    if isinstance(selected, NoPair):
        assert possible == []
        return
    assert fits(selected.chosen, selected.rejected)
    assert selected.margin == max(one.rating - other.rating for one, other in possible)
    assert selected.chosen_rank < selected.rejected_rank
    assert list(selected.ratings) == sorted(selected.ratings, reverse=True)
    assert selected.ratings[selected.chosen_rank - 1] == selected.chosen.rating
    assert selected.ratings[selected.rejected_rank - 1] == selected.rejected.rating


@given(FIELDS, MARGINS, BALANCES, GOLDS, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_changes_nothing(
    field: list[Rated], margin: float, balance: tuple[float, int | None], gold: tuple[float, int] | None, order: object
) -> None:
    """A permutation gives the same pair, or the same code."""
    shuffled = list(field)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' Random has no exported type
    one = select(field, margin, options(*balance), gold_of(gold))
    other = select(shuffled, margin, options(*balance), gold_of(gold))
    if isinstance(one, NoPair) or isinstance(other, NoPair):
        assert isinstance(one, NoPair)
        assert isinstance(other, NoPair)
        assert one.code == other.code
        return
    assert (one.chosen.candidate.ids, one.rejected.candidate.ids) == (
        other.chosen.candidate.ids,
        other.rejected.candidate.ids,
    )
    assert (one.chosen_rank, one.rejected_rank) == (other.chosen_rank, other.rejected_rank)


@given(FIELDS, MARGINS, MARGINS, BALANCES)
def test_a_wider_margin_never_makes_a_pair(
    field: list[Rated], one: float, other: float, balance: tuple[float, int | None]
) -> None:
    """What passes the wider margin is the pair of the narrower one, unchanged."""
    narrow, wide = sorted((one, other))
    strict = select(field, wide, options(*balance))
    if isinstance(strict, SelectedPair):
        loose = select(field, narrow, options(*balance))
        assert isinstance(loose, SelectedPair)
        assert (loose.chosen, loose.rejected) == (strict.chosen, strict.rejected)


TEXTS = st.lists(
    st.tuples(st.sampled_from(["a red one", "A red one.", "  a  red ONE!", "two", "Two", "three"]), st.integers(2, 5)),
    max_size=8,
).map(lambda pairs: [candidate(*pair) for pair in pairs])


@given(TEXTS, st.randoms(use_true_random=False))
def test_distinct_is_idempotent_and_blind_to_order(candidates: list[Candidate], order: object) -> None:
    """Once is enough, every text is there once, and a permutation keeps the same ones."""
    kept = distinct(candidates)
    assert [one.ids for one in distinct(kept)] == [one.ids for one in kept]
    assert {normalised(one.text) for one in kept} == {normalised(one.text) for one in candidates}
    assert len({normalised(one.text) for one in kept}) == len(kept)
    shuffled = list(candidates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' Random has no exported type
    assert [one.ids for one in distinct(shuffled)] == [one.ids for one in kept]


def test_by_hand() -> None:
    """Margin 1, at most twice as long. 2.0 - (-1.0) = 3.0 would be the widest, but 9 tokens against 3 are too many;
    1.9 - (-1.0) = 2.9 of 9 and 9 tokens is the next, wider than 2.0 - 0.5 = 1.5 of 3 and 4."""
    field = [rated("best", 2.0, 3), rated("good", 1.9, 9), rated("poor", 0.5, 4), rated("worst", -1.0, 9)]
    pair = select(field, 1.0, options(2.0))
    assert isinstance(pair, SelectedPair)
    assert (pair.chosen.candidate.text, pair.rejected.candidate.text) == ("good", "worst")
    assert (pair.chosen_rank, pair.rejected_rank) == (2, 4)
    assert pair.margin == pytest.approx(2.9)


def test_equal_margins_take_the_most_similar_lengths() -> None:
    """Ratings of 0 and 1 give many pairs of margin 1; 5 and 5 tokens are closer than 5 and 7 or 3 and 7."""
    field = [rated("right", 1, 5), rated("right too", 1, 3), rated("wrong", 0, 7), rated("wrong too", 0, 5)]
    pair = select(field, 0.5, options())
    assert isinstance(pair, SelectedPair)
    assert (pair.chosen.candidate.text, pair.rejected.candidate.text) == ("right", "wrong too")


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ([], "pair_one_candidate"),
        ([rated("alone", 1)], "pair_one_candidate"),
        ([rated("one", 1.0), rated("two", 0.9)], "pair_no_margin"),
        ([rated("one", 1.0, 2), rated("two", 0.0, 9)], "pair_unbalanced"),
    ],
)
def test_why_there_is_no_pair(field: list[Rated], code: str) -> None:
    """Each reason has a code of its own and its figures."""
    why = select(field, 0.5, options(2.0))
    assert isinstance(why, NoPair)
    assert why.code == code


def test_the_datas_answer_is_chosen_only_where_it_is_better() -> None:
    """With a gold answer rated 0.2, the worst candidate is too close and the pair is refused, not turned around."""
    why = select([rated("one", 0.9), rated("two", 0.1)], 0.5, options(), gold=rated("gold", 0.2))
    assert isinstance(why, NoPair)
    assert why.code == "pair_no_margin"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A red  Seven. ", "a red seven"),
        ('"yes!"', "yes"),
        ("-5", "-5"),
        ("5%", "5%"),
        ("(1.5)", "1.5"),
        ("\uff21\u3002", "a"),  # full-width A and full stop
        ("...", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    """Case, blanks and marks around words do not tell answers apart; signs and decimal points do."""
    assert normalised(text) == expected
    assert normalised(normalised(text)) == expected


def test_what_cannot_stand_in_a_pair(tiny_teacher: object) -> None:
    """Cut off, empty, naming an image that is not there, repeated, or the data's own answer: left out and counted."""
    renderer = Renderer(tiny_teacher)  # type: ignore[arg-type]  # a Path; fixtures have no types here

    def written(text: str, *, end: bool = True, ids: list[int] | None = None) -> Candidate:
        tokens = renderer.render_response(text)[:-1].tolist() if ids is None else ids
        ids_T = np.array([*tokens, *([renderer.eos_id] if end else [])], np.int32)
        return Candidate(ids_T, renderer.decode(ids_T), np.full(len(ids_T), -1, np.float32))

    spelled = [token for sign in "<image>" for token in renderer.render_response(sign)[:-1].tolist()]
    assert renderer.image_token_id is not None
    kept, left_out = usable(
        [
            written("a red seven"),
            written("a red seven."),
            written("never ends", end=False),
            written(""),
            written("", ids=[renderer.image_token_id]),
            written("", ids=spelled),
            written("gold"),
            written("a blue two"),
        ],
        renderer,
        not_text="Gold.",
    )
    assert sorted(one.text for one in kept) == ["a blue two", "a red seven"]
    assert left_out == {
        "cut off before their end": 1,
        "empty": 2,
        "with an image placeholder": 1,
        "repeat another": 1,
        "say what the data's answer says": 1,
    }
