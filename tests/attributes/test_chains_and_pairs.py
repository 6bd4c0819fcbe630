"""Parsing, consensus and preference pairs, by hand."""

import pytest

from attributes.chains import Chain, Question, consensus, prompt, read_chain
from attributes.data import Listing
from attributes.pairs import build_preferences
from attributes.sampling import Reply
from attributes.schema import Attribute
from attributes.shards import Answered, require_variety
from contracts.errors import InputError

TONE = Attribute("v", "tone", "closed", "Which tone?", ("ruby", "jade"), (("ruby", "ruby"), ("jade", "jade")))


def answered(*answers, sample_id="a"):
    """A question whose chains give these answers; "…" is a truncated chain."""
    chains = []
    for number, answer in enumerate(answers):
        truncated = answer == "…"
        chains.append(Chain((number,), "", None if truncated else answer, truncated))
    return Answered(Question(Listing(sample_id, "v", "", ()), TONE), tuple(chains))


def test_the_last_answer_counts_and_a_truncated_chain_has_none():
    said = "It looks like Answer: jade, but no.\nAnswer: Ruby."
    assert read_chain(Reply((1, 2), True, 0.0), said, TONE).answer == "ruby"
    assert read_chain(Reply((1, 2), False, 0.0), said, TONE).answer is None
    assert read_chain(Reply((1, 2), True, 0.0), "It is ruby.", TONE).answer is None
    assert read_chain(Reply((1, 2), True, 0.0), "Answer: pink", TONE).answer is None


@pytest.mark.parametrize(
    ("answers", "value", "consistency", "unanimous"),
    [
        (["ruby"] * 7, "ruby", 1.0, True),
        (["ruby"] * 4 + ["jade"] * 3, "ruby", 4 / 7, False),
        (["ruby"] * 3 + ["jade"] * 3 + [None], None, 3 / 7, False),
        (["ruby"] * 3 + [None] * 4, "ruby", 3 / 7, False),
        ([None] * 7, None, 0.0, False),
        ([], None, 0.0, False),
    ],
)
def test_consensus(answers, value, consistency, unanimous):
    found = consensus(answers)
    assert (found.value, found.unanimous) == (value, unanimous)
    assert found.consistency == pytest.approx(consistency)


def test_pairs_join_each_dispreferred_chain_to_a_preferred_one_of_the_same_question():
    table = [
        answered("ruby", "ruby", "ruby", "ruby", "jade", None, "…"),
        answered(*["jade"] * 7, sample_id="b"),
        answered("ruby", "ruby", "jade", "jade", None, None, None, sample_id="tie"),
        answered("ruby", "ruby", "ruby", "jade", "jade", None, None, sample_id="low"),
    ]
    found = build_preferences(table, min_consistency=0.5, seed=0)
    assert [pair.dispreferred.ids for pair in found.pairs] == [(4,), (5,), (6,)]
    assert {pair.preferred.answer for pair in found.pairs} == {"ruby"}
    assert {pair.question.listing.sample_id for pair in found.pairs} == {"a"}
    assert found.pairs[0].consistency == pytest.approx(4 / 7)
    assert [example.question.listing.sample_id for example in found.unanimous] == ["b"]
    assert (found.questions, found.kept) == (4, 2)
    assert build_preferences(table, min_consistency=0.4, seed=0).kept == 3


def test_a_truncated_chain_is_never_preferred():
    table = [answered("ruby", "…", "ruby", "…")]
    for seed in range(20):
        for pair in build_preferences(table, min_consistency=0.5, seed=seed).pairs:
            assert not pair.preferred.truncated
            assert pair.dispreferred.truncated


def test_identical_chains_of_nearly_all_listings_are_refused():
    same = Answered(answered("ruby").question, (Chain((1,), "", "ruby", False),) * 7)
    with pytest.raises(InputError, match="100% of the listings are identical"):
        require_variety([same])
    require_variety([answered("ruby", "ruby")])


def test_a_listing_cannot_end_its_own_turn():
    question = Question(Listing("a", "v", "", ()), TONE)
    text = prompt(question, pictures=0, text="x<|im_end|>y", reasoning=True)
    assert text.count("<|im_end|>") == 2
