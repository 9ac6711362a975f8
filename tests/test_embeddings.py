"""Text embeddings: the files give what the encoders give, damage is found, and the encoders leave memory."""

import threading
from types import SimpleNamespace

import pytest
import torch

from flowbp.backbones import load_backbone
from flowbp.runtime.embeddings import EmbeddingCache, default_cache, embed_once, encoder_hash

TEXTS = ["a red circle", "two blue stars", "a green square", "three circles"]


def shapes():
    return load_backbone("shapes", max_sequence_length=1)


def files(root):
    return sorted(root.rglob("*.safetensors"))


def test_files_give_what_the_encoders_give_and_the_encoders_leave_memory(tmp_path):
    backbone = shapes()
    live = backbone.encode(TEXTS), backbone.encode([""])
    embed_once(backbone, TEXTS + TEXTS, tmp_path)
    assert backbone.pipe.text_encoder is None and backbone.pipe.text_encoder_2 is None
    torch.testing.assert_close(backbone.encode(TEXTS), live[0])
    torch.testing.assert_close(backbone.encode([""]), live[1])
    assert len(files(tmp_path)) == len(TEXTS) + 1 and not list(tmp_path.rglob("*.partial"))


def test_an_embedding_does_not_depend_on_what_was_embedded_with_it(tmp_path):
    alone, together = shapes(), shapes()
    embed_once(alone, TEXTS[:1], tmp_path / "alone")
    embed_once(together, TEXTS, tmp_path / "together")
    a, b = alone.encode(TEXTS[:1]), together.encode(TEXTS[:1])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_run_encodes_nothing(tmp_path):
    embed_once(shapes(), TEXTS, tmp_path)
    again = shapes()
    again.encode = lambda prompts: pytest.fail(f"encoded {prompts}")
    embed_once(again, TEXTS[::-1], tmp_path)
    assert again.encode(TEXTS)["pooled_projections"].shape[0] == len(TEXTS)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-8]), lambda path: path.write_bytes(b"")],
    ids=["flipped bit", "cut short", "empty"],
)
def test_a_damaged_file_is_computed_again_with_one_line_of_log(damage, tmp_path, caplog):
    backbone = shapes()
    live = backbone.encode(TEXTS)
    embed_once(backbone, TEXTS, tmp_path)
    folder = files(tmp_path)[0].parent
    damage(EmbeddingCache(folder, torch.device("cpu")).path(TEXTS[1]))
    with caplog.at_level("WARNING"):
        repaired = shapes()
        embed_once(repaired, TEXTS, tmp_path)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["1 of 5 cached embeddings"]
    torch.testing.assert_close(repaired.encode(TEXTS), live)


def test_a_file_of_another_prompt_is_stale(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path, torch.device("cpu"))
    cache.fill(lambda prompts: {"text": torch.ones(len(prompts), 2)}, ["a", "b"])
    cache.path("a").replace(cache.path("c"))
    cache.fill(lambda prompts: {"text": torch.zeros(len(prompts), 2)}, ["b", "c"])
    assert cache(["b", "c"])["text"].tolist() == [[1, 1], [0, 0]]
    assert "1 of 2 cached embeddings" in caplog.text


def test_whatever_changes_an_embedding_changes_the_folder():
    names = [encoder_hash(shapes()), encoder_hash(load_backbone("shapes", max_sequence_length=2))]
    assert encoder_hash(shapes()) == names[0]
    retrained, retokenized = shapes(), shapes()
    retrained.pipe.text_encoder.get_parameter("text_projection.weight").mul_(1.001)
    retokenized.pipe.tokenizer_2.add_tokens(["hexagon"])
    assert len({*names, encoder_hash(retrained), encoder_hash(retokenized)}) == 4


def test_writers_of_the_same_prompts_do_not_disturb_one_another(tmp_path):
    texts = [str(i) for i in range(40)]
    caches = [EmbeddingCache(tmp_path, torch.device("cpu")) for _ in range(4)]
    encode = lambda prompts: {"text": torch.tensor([[float(p)] for p in prompts])}  # noqa: E731
    threads = [threading.Thread(target=cache.fill, args=(encode, texts)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        caches[0](texts)["text"].flatten().tolist() == [float(t) for t in texts] and len(list(tmp_path.iterdir())) == 40
    )


def test_a_prompt_that_was_not_embedded_says_the_way_out(tmp_path):
    backbone = shapes()
    embed_once(backbone, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="data.embeddings=live"):
        backbone.encode(["a purple hexagon"])


def test_a_full_disk_is_told_before_it_is_written(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, torch.device("cpu"))
    cache.fill(encode := lambda prompts: {"text": torch.ones(len(prompts), 3)}, [""])
    room = cache.path("").stat().st_size  # for one
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=room))
    with pytest.raises(OSError, match="2 embeddings need .* data.cache=FOLDER or FLOWBP_CACHE"):
        cache.fill(lambda prompts: pytest.fail("wrote"), ["a", "b"])
    cache.fill(encode, ["a"])


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FLOWBP_CACHE")
    assert default_cache() == tmp_path / "flowbp"
    monkeypatch.setenv("FLOWBP_CACHE", str(tmp_path / "big"))
    assert default_cache() == tmp_path / "big"
