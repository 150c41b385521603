"""Arithmetic, choices, last words and documents."""

import json
import re

import numpy as np
import pytest

from jet_jax.evaluation import splits
from jet_jax.evaluation.arithmetic import arithmetic
from jet_jax.evaluation.choices import choice_rows, cloze, read_records
from jet_jax.evaluation.documents import perplexity_rows


def texts_of(tokenizer, rows):
    """The text of each row's segments, last target included."""
    for tokens, targets, ids in zip(rows.tokens, rows.targets, rows.segment_ids, strict=True):
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            yield tokenizer.decode([*tokens[here], targets[here][-1]])


@pytest.mark.parametrize("kind", ["addition", "subtraction", "chain"])
def test_arithmetic_is_right_and_its_splits_share_no_question(kind, tokenizer):
    questions = {}
    for split in splits.SPLITS:
        rows = arithmetic(tokenizer, 1, 8, 192, kind=kind, digits=2, split=split)
        assert rows.num_items == 32
        lines = [line for text in texts_of(tokenizer, rows) for line in text.split("\n") if line]
        assert len(lines) == 8 * (4 + 4)
        for line in lines:
            question, answer = line.split(" = ")
            assert eval(question) == int(answer) >= 0
        questions[split] = {line.split(" =")[0] for line in lines}
        answer = tokenizer.decode(rows.targets[rows.answers == 1])
        assert re.fullmatch(r" \d+\n", answer)
    assert not questions["search"] & questions["test"] | questions["tuning"] & questions["test"]


def test_arithmetic_without_enough_questions_or_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="raise digits"):
        arithmetic(tokenizer, 0, 100, 128, digits=1, num_queries=1)
    with pytest.raises(ValueError, match="set it to at least"):
        arithmetic(tokenizer, 0, 1, 16)
    with pytest.raises(ValueError, match="kind='division' is unknown"):
        arithmetic(tokenizer, 0, 1, 16, kind="division")


RECORDS = [
    {"question": "Who is it?", "choices": ["Anne", "Mr. Elliot"], "answer": 1},
    {"question": "Where was she? " * 20, "choices": ["in Bath", "at sea", "here"], "answer": 0},
]


def test_choices_follow_their_question(tmp_path, tokenizer):
    path = tmp_path / "records.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in RECORDS))
    rows = choice_rows(tokenizer, read_records(path), 40)
    np.testing.assert_array_equal(rows.groups, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(rows.right, [False, True, True, False, False])
    found = [tokenizer.decode(rows.targets[rows.answers == i]) for i in range(1, 6)]
    assert found == [" Anne", " Mr. Elliot", " in Bath", " at sea", " here"]
    texts = list(texts_of(tokenizer, rows))
    assert "Question: Who is it?\nAnswer: Mr. Elliot" in texts
    long = [text for text in texts if "Where" in text]  # cut at the beginning, all alike
    assert len({text.split("\nAnswer:")[0] for text in long}) == 1 and len(long) == 3
    chosen = choice_rows(tokenizer, RECORDS, 40, split=splits.split_of(RECORDS[0]["question"]))
    assert chosen.num_items in (2, 5) and chosen.groups[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer": 0}', r"line 2: no key 'choices' \(keys: answer, question\)"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer=2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "b"}', "must be the index"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ("[1]", "line 2: expected an object"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_a_bad_record_is_named_by_its_line(line, message, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_cloze_asks_for_last_words_of_sentences(tokenizer, documents):
    rows = cloze(tokenizer, documents, 0, 8, 96, is_repeated=True, min_gap=8, split="search")
    assert rows.tokens.shape[1] == 96 and rows.num_items >= 4
    source = " ".join(text for text in documents if splits.split_of(text) == "search")
    for row, (tokens, answers) in enumerate(zip(rows.tokens, rows.answers, strict=True)):
        (first, *_) = np.flatnonzero(answers)
        before = tokenizer.decode(tokens[: first + 1])
        word = tokenizer.decode(rows.targets[row][answers > 0])
        # Tokens may be cut within a letter, at the beginning.
        assert re.search(re.escape(before.lstrip("\ufffd") + word) + "[.!?]", source)
        assert re.search(rf"\b{word.strip()}\b", before)
        assert word.strip() not in tokenizer.decode(tokens[first - 7 : first + 1]).split()
    with pytest.raises(ValueError, match="none of"):
        cloze(tokenizer, ["Too short."], 0, 8, 96, split=None)


def test_each_token_of_a_document_is_predicted_once(tokenizer, documents):
    texts = documents[:3]
    rows = perplexity_rows(tokenizer, texts, 64)
    assert rows.num_items == 3
    for number, text in enumerate(texts, 1):
        ids = tokenizer.encode(text)
        assert sorted(ids[1:]) == sorted(rows.targets[rows.answers == number])
    assert ((rows.answers > 0) == (rows.segment_ids > 0)).all()
    with pytest.raises(ValueError, match="documents is empty"):
        perplexity_rows(tokenizer, [], 64)
    with pytest.raises(ValueError, match="no document has two tokens"):
        perplexity_rows(tokenizer, ["a"], 64)


def test_documents_belong_to_one_split(documents):
    found = [splits.documents_of(documents, split) for split in splits.SPLITS]
    assert sorted(text for part in found for text in part) == sorted(documents)
    with pytest.raises(ValueError, match="none of the 1 documents"):
        other = next(s for s in splits.SPLITS if s != splits.split_of("a"))
        splits.documents_of(["a"], other)
