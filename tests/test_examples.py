"""The programs in examples/, with a tiny model: what they ask is answered, and what they make of it is right."""

import json

import pytest

from tests.serving import serving, write_model

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving([write_model(tmp_path_factory.mktemp("models") / "tiny", window=4096)]) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.base, api_key="none")


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "pears.txt").write_text("A pear is a fruit.\n\n" + "It is green or yellow. " * 30)
    (tmp_path / "ships.md").write_text("A ship sails on the sea.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_passages_keep_paragraphs_together(documents):
    from examples.passages import LENGTH, passages

    found = list(passages(documents))
    assert [name for name, _ in found] == ["pears.txt", "pears.txt", "ships.md"]
    assert found[0][1] == "A pear is a fruit." and len(found[1][1]) > LENGTH


@pytest.mark.parametrize("library", ["langchain", "llamaindex"])
def test_a_question_is_answered_from_the_nearest_passages(server, documents, library):
    pytest.importorskip({"langchain": "langchain_openai", "llamaindex": "llama_index.llms.openai_like"}[library])
    if library == "langchain":
        from examples.retrieval_langchain import answer
    else:
        from examples.retrieval_llamaindex import answer
    found = answer(server.base, "tiny", documents, "A ship sails on the sea.")
    assert found.sources[0] == "ships.md" and len(found.sources) == 2 and found.text
    assert found == answer(server.base, "tiny", documents, "A ship sails on the sea.")


def test_an_assistant_makes_the_calls_that_the_model_asks_for(client):
    from examples.assistant import answer, run

    text, made = answer(client, "tiny", "How much is 2 + 3?", first="required")
    assert len(made) == 1 and made[0].partition("(")[0] in ("calculate", "weekday") and " = " in made[0] and text
    assert run("calculate", '{"expression": "17 * 23"}') == "391"
    assert run("weekday", '{"date": "2026-03-01"}') == "Sunday"
    for name, arguments in (
        ("calculate", '{"expression": "__import__(\'os\')"}'),
        ("calculate", '{"expression": "1/0"}'),
        ("calculate", '{"expression": "("}'),
        ("weekday", '{"date": "tomorrow"}'),
        ("weekday", "{}"),
        ("delete", "{}"),
    ):
        assert run(name, arguments).startswith("error: ")


def test_a_story_goes_on_from_the_chosen_beginning(client):
    from examples.story import Story

    def told():
        story = Story(client, "tiny", "a lighthouse", seed=4, length=15)
        first, second = story.beginnings(2)
        assert first != second
        story.take(second)
        pieces = list(story.go_on("It snows."))
        assert len(pieces) > 2 and "".join(pieces) == story.paragraphs[1]
        return story

    assert told().paragraphs == told().paragraphs


def test_a_served_model_grades_answers(client, tmp_path, server, monkeypatch, capsys):
    from examples import judge

    found = judge.grade(client, "tiny", "How much is 2 + 3?", "5")
    assert 1 <= found.grade <= 5 and 1 <= found.expected <= 5
    assert found == judge.grade(client, "tiny", "How much is 2 + 3?", "5")
    rows = tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "2 + 3?", "answer": text}) + "\n" for text in ("5", "\x1b[31m")))
    monkeypatch.setattr("sys.argv", ["judge", str(rows), "--base-url", server.base, "--model", "tiny"])
    judge.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "\x1b" not in lines[1]
