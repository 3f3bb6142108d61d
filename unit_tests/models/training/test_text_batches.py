"""Texts and batches: what is read, what counts, and that the plan depends on the seed alone."""

import itertools
import json

import pytest
from tokenizers import Tokenizer

from models.training.mtp_settings import TrainingError
from models.training.text_batches import cut_batches, make_batch, plan_batches, read_texts
from unit_tests.checkpoints import write_tokenizer

ROWS = [
    {"question": "1+1?", "answer": "2"},
    {"prompt": "Say a.", "completion": "a"},
    {"text": "plain"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write(folder, rows, name="train.jsonl"):
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return folder / name


def test_every_form_of_a_row_becomes_a_prompt_and_a_completion_that_ends(tokenizer, tmp_path):
    texts = read_texts(write(tmp_path, ROWS * 2), tokenizer, 256, 100, 1)
    decoded = {tokenizer.decode(p) + "|" + tokenizer.decode(c[:-1]) for p, c in [*texts.train, *texts.held_out]}
    assert decoded == {"Question: 1+1?\nAnswer:| 2", "Say a.|a", "|plain"}
    assert all(completion[-1] == 256 for _, completion in texts.train)
    assert (len(texts.train), len(texts.held_out)) == (5, 1)


def test_a_line_ends_where_json_lines_do(tokenizer, tmp_path):
    text = "a\u2028b\u0085c\u2029d"
    row = json.dumps({"text": text}, ensure_ascii=False)
    texts = read_texts(write(tmp_path, [row, row + "\r"]), tokenizer, None, 100, 1)
    assert [tokenizer.decode(completion) for _, completion in texts.train + texts.held_out] == [text] * 2


def test_of_a_directory_the_train_file_is_read_and_never_the_test_file(tokenizer, tmp_path):
    write(tmp_path, [{"text": "train"}] * 3)
    write(tmp_path, [{"text": "test"}] * 9, "test.jsonl")
    texts = read_texts(tmp_path, tokenizer, None, 100, 1)
    assert {tokenizer.decode(completion) for _, completion in texts.train + texts.held_out} == {"train"}
    assert len(texts.train) == 2


def test_long_texts_are_cut_to_the_limit(tokenizer, tmp_path):
    texts = read_texts(write(tmp_path, [{"prompt": "p" * 8, "completion": "c" * 8}] * 2), tokenizer, 256, 11, 1)
    assert [len(part) for part in texts.train[0]] == [8, 3]
    texts = read_texts(write(tmp_path, [{"prompt": "p" * 8, "completion": "c" * 8}] * 2), tokenizer, 256, 5, 1)
    assert [len(part) for part in texts.train[0]] == [5, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"train.jsonl:2 is not JSON"),
        ("[1]", r":2 is a list"),
        ({"words": "x"}, ":2 has the fields words"),
        ({"prompt": 3, "completion": "x"}, ":2 has the fields"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path, row, message):
    with pytest.raises(TrainingError, match=message):
        read_texts(write(tmp_path, [{"text": "a"}, row, {"text": "b"}]), tokenizer, None, 100, 1)


def test_missing_files_and_too_few_texts_are_refused(tokenizer, tmp_path):
    with pytest.raises(TrainingError, match="not readable"):
        read_texts(tmp_path, tokenizer, None, 100, 1)
    with pytest.raises(TrainingError, match="has 2 texts, --held-out takes 2"):
        read_texts(write(tmp_path, [{"text": "a"}, {"text": "b"}]), tokenizer, None, 100, 2)


def test_an_epoch_has_every_text_once_and_batches_stay_within_their_tokens():
    lens = [3 + index * 7 % 40 for index in range(200)]
    seen, batches = 0, []
    for batch in plan_batches(lens, 128, seed=1):
        batches.append(batch)
        seen += len(batch)
        if seen >= 200:
            break
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(200))
    assert all(len(batch) * max(lens[index] for index in batch) <= 128 for batch in batches)


def test_the_plan_depends_on_the_seed_alone_and_epochs_differ():
    lens = [5] * 10
    first, again, other = (list(itertools.islice(plan_batches(lens, 20, seed), 40)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[:3] != first[3:6]


def test_a_text_longer_than_a_batch_is_a_batch_by_itself():
    assert cut_batches([0, 1, 2], [50, 3, 3], 10) == [[0], [1, 2]]


def test_only_completions_count_unless_the_whole_text_does():
    assert make_batch([([1, 2], [3])], is_whole=False).is_target.tolist() == [[False, False, True]]
    assert make_batch([([1, 2], [3])], is_whole=True).is_target.tolist() == [[True, True, True]]


def test_the_digest_changes_with_the_texts(tokenizer, tmp_path):
    digests = {
        read_texts(write(tmp_path, [{"text": text}] * 3), tokenizer, None, 100, 1).digest for text in ("a", "b", "b")
    }
    assert len(digests) == 2
