"""Prompts: reading, and an order that depends on the seed and the position alone."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp.runtime.data import Prompt, PromptStream, load_prompts, sample_seeds


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue square \n")
    assert load_prompts(str(path)) == [Prompt("a red circle"), Prompt("a blue square")]


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_prompts(str(tmp_path / "empty.txt"))


def test_an_epoch_serves_every_prompt_once_and_epochs_differ():
    prompts = [Prompt(str(i)) for i in range(12)]
    stream = PromptStream(prompts, seed=0)
    first = [p for i in range(3) for p in stream.batch(i, 4)]
    second = [p for i in range(3, 6) for p in stream.batch(i, 4)]
    assert sorted(first) == sorted(prompts) == sorted(second) and first != second


def test_any_batch_can_be_asked_for_directly():
    prompts = [Prompt(str(i)) for i in range(7)]
    in_order = PromptStream(prompts, seed=3)
    batches = [in_order.batch(i, 4) for i in range(9)]
    asked = PromptStream(prompts, seed=3)
    assert asked.batch(8, 4) == batches[8] and asked.batch(0, 4) == batches[0]


def test_sample_seeds_differ_by_sample_and_by_key():
    seeds = sample_seeds(1, 2, count=100) + sample_seeds(1, 3, count=100)
    assert len(set(seeds)) == 200 and min(seeds) >= 0
    assert sample_seeds(1, 2, count=5) == sample_seeds(1, 2, count=100)[:5]


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_prompts(str(tmp_path / "latin.txt"))


def test_the_texts_of_a_stream_are_those_that_its_batches_serve():
    stream = PromptStream([Prompt(str(i)) for i in range(7)], seed=3)
    assert sorted(stream.texts(6)) == sorted(p.text for i in range(3) for p in stream.batch(i, 2))
    assert len(stream.texts(20)) == 7


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"prompt": "a", "tag": "one"}\n\n{"prompt": "b", "include": []}\n', [("a", "one"), ("b", "")]),
        ("p.json", '["a", "b"]', [("a", ""), ("b", "")]),
        ("p.json", '[{"prompt": "a", "image_path": ["1.jpg"], "rank": [1]}]', [("a", "")]),
        ("p.json", '{"anime": ["a"], "photo": ["b"]}', [("a", "anime"), ("b", "photo")]),
        ("p.csv", 'category,prompt\none,"a, with a comma"\n,b\n', [("a, with a comma", "one"), ("b", "")]),
        ("metadata.jsonl", '{"file_name": "0001.png", "text": "a cat"}\n"a dog"\n', [("a cat", ""), ("a dog", "")]),
        ("refl_data.json", '[{"id": "12", "text": "a cat", "file": "a.png"}]', [("a cat", "")]),
        (
            "p.json",
            '{"text": ["a sign"], "Anime": ["a", {"prompt": "b", "tag": "c"}]}',
            [
                ("a sign", "text"),
                ("a", "Anime"),
                ("b", "c"),
            ],
        ),
        (
            "DrawBench.csv",
            'Prompts,Category\n"A sign that says ""NeurIPS"".",Text\n',
            [
                ('A sign that says "NeurIPS".', "Text"),
            ],
        ),
        # A row ends where a spreadsheet ended it: with empty fields, or before them.
        ("P.CSV", "id, Prompt ,Category,,\n1,a,one,,\n,,,,\n2,b\n", [("a", "one"), ("b", "")]),
        # PartiPrompts has this row; spreadsheets quote a whole field and double its quotes.
        (
            "PartiPrompts.tsv",
            'Prompt\tCategory\tNote\n"G I G G L E" painted, large\tWriting\t\n"a ""b"""\tArts\t-\n',
            [
                ('"G I G G L E" painted, large', "Writing"),
                ('a "b"', "Arts"),
            ],
        ),
        # DPG-Bench has one row for each question on a prompt.
        ("dpg_bench.csv", "item_id,text,tuple\n1,a,x\n1,a,y\n2,a,x\n3,b,x\n", [("a", ""), ("a", ""), ("b", "")]),
        ("p.csv", "prompt\na\na\n", [("a", ""), ("a", "")]),
        ("P.TXT", "{}\n", [("{}", "")]),
        ("prompts", "a\n", [("a", "")]),
    ],
)
def test_prompt_files_of_every_form_are_read(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert [tuple(prompt) for prompt in load_prompts(str(tmp_path / name))] == expected


def test_a_folder_of_styles_is_read_as_categories(tmp_path):
    for style in ("photo", "anime"):
        (tmp_path / f"{style}.json").write_text(f'["a {style}", {{"prompt": "b", "tag": "its own"}}]')
    found = [Prompt("a anime", "anime"), Prompt("b", "its own"), Prompt("a photo", "photo"), Prompt("b", "its own")]
    assert load_prompts(str(tmp_path)) == found
    (tmp_path / "notes.TXT").write_text("a cat")
    with pytest.raises(ValueError, match="holds both .json and .txt files; a folder is read as"):
        load_prompts(str(tmp_path))


def test_a_folder_of_text_files_has_no_categories(tmp_path):
    for name in ("partiprompts2.txt", "localized.TXT", "picture.png"):
        (tmp_path / name).write_text(f"a {name[0]}\n")
    assert load_prompts(str(tmp_path)) == [Prompt("a l"), Prompt("a p")]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.json", "[1]", "p.json cannot be read: 1 is neither a prompt"),
        ("p.json", "[{}]", "neither a prompt nor an object"),
        ("p.json", '{"anime": ["a"', "cannot be read: Expecting"),
        ("p.jsonl", '{"prompt": "a"}\n\n{', "p.jsonl, line 3 cannot be read"),
        ("p.csv", "caption\na\n", r"a column must be called prompt, not \['caption'\]"),
        ("p.jsonl", '{"a": 1}', r"line 1 cannot be read: .* is neither a prompt .*: its keys are \['a'\]"),
        ("p.jsonl", '{"tags": ["a", "b"], "id": ["c"]}', r"its keys are \['tags', 'id'\]"),  # categories are for .json
        ("p.jsonl", '["a", "b"]', "is neither a prompt"),
        ("p.json", '{"a": {"b": ["c"]}}', r"its keys are \['a'\]"),
        ("p.json", '{"id": "12", "file": "a.png"}', r"its keys are \['id', 'file'\]"),
        ("p.json", '{"prompt": ["a"], "category": ["b"]}', r"its keys are \['prompt', 'category'\]"),
        ("p.json", '{"anime": ["a"], "anime": ["b"]}', r"a key stands there twice: \['anime', 'anime'\]"),
        ("p.json", "[" * 100_000, "p.json cannot be read: .*recursion"),
        ("p.json", "[" + "1" * 5000 + "]", "p.json cannot be read: Exceeds the limit"),
        ("p.jsonl", '\n{"prompt": "\\ud800"}', r"p.jsonl' holds .* which is no text: save it as UTF-8"),
        ("p.txt", "a\0 \0c\0a\0t\0", "which is no text: save it as UTF-8"),
        ("p.csv", 'prompt,id\na,1\n"b,2\nc,3\n', "p.csv, line 3 cannot be read: unexpected end of data; quotes stand"),
        ("p.csv", 'prompt\n"a\nb"\n"c\n"d"\n', "p.csv, line 4 cannot be read: ',' expected"),
        ("p.csv", "prompt\n" + "a" * 200_000, "p.csv, line 2 cannot be read: field larger"),
        ("p.csv", "prompt,id\na,1\na cat, a dog,2\n", "p.csv, line 3 cannot be read: 3 fields in 2 columns"),
        ("p.csv", "id,prompt\n1\n", r"p.csv, line 2 cannot be read: .* its keys are \['id'\]"),
        ("p.csv", "prompt,prompt\na,b\n", "a key stands there twice"),
        ("p.yaml", "- a\n", "p.yaml' is of an unknown kind; the name of a prompt file ends in .txt, .json"),
        ("p.parquet", "PAR1", "is of an unknown kind"),
        ("p.csv", "prompt,category\n,a\n", "holds no prompt"),
    ],
)
def test_a_prompt_file_of_another_form_is_refused_with_the_place(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(("name", "line"), [("p.txt", "{}"), ("p.jsonl", '{{"prompt": "{}"}}'), ("p.csv", "{}")])
def test_prompts_in_any_script_and_with_any_line_ends(name, line, tmp_path):
    prompts = ["ein Bär am Fluß", "猫が二匹", "🦊 fox", "one line\u2028by JSON and by us"]
    head = ["prompt"] if name == "p.csv" else []
    for end in ("\n", "\r\n"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + end.join([*head, *map(line.format, prompts)]).encode())
        assert [prompt.text for prompt in load_prompts(str(tmp_path / name))] == prompts


def test_a_folder_without_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no .json file"):
        load_prompts(str(tmp_path))


@settings(deadline=None)
@given(
    st.sampled_from(["json", "jsonl", "csv", "tsv", "txt"]),
    st.text(alphabet='prompt",:{}[]\n\t\\\0ud8é 1', max_size=60),
)
def test_no_prompt_file_ends_in_a_foreign_error(suffix, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"p.{suffix}")
        path.write_text(text, encoding="utf-8", newline="")
        try:
            found = load_prompts(str(path))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(prompt.text.encode() and prompt.category.encode() is not None for prompt in found)
