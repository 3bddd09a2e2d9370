"""CLIP's tokenizer against OpenAI's own ids, the files it is made from, and the texts made of class names."""
import gzip
import json

import numpy as np
import pytest

from transferlab import prompts, tokenizer
from transferlab.tokenizer import SPECIAL, Tokenizer, byte_symbols

MERGES = ["d o", "do g</w>", "c a", "ca t</w>", "1 2</w>"]
V = 512 + len(MERGES) + 2


@pytest.fixture(scope="module")
def openai(shared):
  return Tokenizer(shared / "data" / "clip", 49408, 77)


@pytest.fixture
def merges(tmp_path):
  """OpenAI's file in small, with merges behind those that are used."""
  path = tmp_path / "merges.txt"
  path.write_text("\n".join(["#version: 0.2", *MERGES, "z z", "zz z"]) + "\n")
  return path


def vocabulary() -> dict:
  symbols = byte_symbols()
  tokens = [*symbols, *(s + "</w>" for s in symbols), *(line.replace(" ", "") for line in MERGES), *SPECIAL]
  return {token: i for i, token in enumerate(tokens)}


def hugging_face() -> dict:
  """A tokenizer.json; special tokens may stand apart from the vocabulary, merges be written as pairs."""
  vocab = vocabulary()
  added = [{"content": token, "id": vocab.pop(token)} for token in SPECIAL]
  model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": [line.split() for line in MERGES]}
  return {"added_tokens": added, "model": model}


def test_all_golden_strings_have_the_original_ids(openai, golden):
  cases = json.loads(golden("lfa_and_clip/tokenizer_golden.json").read_text())["cases"]
  assert len(cases) == 48
  for case in cases:
    assert openai.encode(case["text"]) == case["encode"], case["text"]
    assert openai(case["text"], truncate=True)[0].tolist() == case.get("tokenize77", case.get("tokenize77_truncate"))
    if case["too_long"]:
      with pytest.raises(ValueError, match="the quick brown.* has 101 tokens, .* at most 77: .*truncate=True"):
        openai([case["text"]])
    else:
      openai([case["text"]])


def test_class_prompts_have_the_original_ids(openai, golden):
  for classes in json.loads(golden("lfa_and_clip/dg_prompt_ids.json").read_text()).values():
    ids = openai(prompts.fill("a photo of a {}", classes))
    for row, expected in zip(ids, classes.values(), strict=True):
      assert row[:len(expected)].tolist() == expected and not row[len(expected):].any()


@pytest.mark.parametrize("file", ["hf_clip", "hf_clip/tokenizer.json", "hf_clip/vocab.json", "hf_clip/merges.txt",
                                  "openai_clip/bpe_small.txt.gz"])
def test_files_of_checkpoints_give_the_ids_of_their_libraries(shared, file):
  """Up to the end of a text: Hugging Face fills up with the end, OpenAI with 0."""
  folder = shared / "golden" / "checkpoints"
  ids = Tokenizer(folder / file, 1024, 77)(json.loads((folder / "hf_clip/meta.json").read_text())["prompts"])
  theirs = np.load(folder / "hf_clip" / "io.npz")["input_ids"]
  ends = ids.argmax(-1)
  np.testing.assert_array_equal(ends, theirs.argmax(-1))  # the first end
  for row, expected, end in zip(ids, theirs, ends):
    np.testing.assert_array_equal(row[:end + 1], expected[:end + 1])
  np.testing.assert_array_equal(ids, np.load(folder / "openai_clip" / "io_vit.npz")["tokens_ids"])


def test_words_digits_and_symbols_are_split_as_in_the_original(merges):
  vocab = vocabulary()
  encode = Tokenizer(merges, V, 9).encode
  ids = lambda *tokens: [vocab[token] for token in tokens]
  assert encode("dog") == ids("dog</w>")
  assert encode(" Dog\t\nCAT ") == ids("dog</w>", "cat</w>")
  assert encode("dogcat") == ids("do", "g", "cat</w>")
  assert encode("12") == ids("1</w>", "2</w>")  # digits stand alone, whatever merges there are
  assert encode("it's--x") == ids("i", "t</w>", "'", "s</w>", "-", "-</w>", "x</w>")
  assert encode("é") == ids("Ã", "©</w>")  # by its bytes in UTF-8
  assert encode("<&amp;amp;") == ids("<", "&</w>")  # ftfy leaves entities where there is a tag
  assert encode("x'ſ") == ids("x</w>", "'", "Å", "¿</w>")  # a long s is an s without regard to case
  assert encode("ｄｏｇ") == ids("dog</w>")  # wide letters are mended
  assert encode("cat<|endoftext|>") == ids("cat</w>", SPECIAL[1])
  assert SPECIAL[1] not in [list(vocab)[i] for i in encode("!<|endoftext|>")]  # part of a run of symbols


def test_rows_are_start_text_end_and_zeros(merges):
  make = Tokenizer(merges, V, 5)
  start, end, cat = V - 2, V - 1, vocabulary()["cat</w>"]
  ids = make(["cat", "", "cat cat cat"])
  assert ids.dtype == np.int32
  assert ids.tolist() == [[start, cat, end, 0, 0], [start, end, 0, 0, 0], [start, cat, cat, cat, end]]
  assert make("cat").shape == (1, 5) and make([]).shape == (0, 5)
  with pytest.raises(ValueError, match="the text 'cat cat cat cat' has 6 tokens, .* at most 5: .*truncate=True"):
    make(["cat", "cat cat cat cat"])
  with pytest.raises(ValueError, match="a text is 3; expected a string"):
    make([3])
  assert make(["cat cat cat cat dog"], truncate=True).tolist() == [[start, cat, cat, cat, end]]


def test_every_layout_of_files_gives_the_same_ids(tmp_path, merges):
  text = "dogcat's 12 <b>"
  expected = Tokenizer(merges, V, 20)(text).tolist()
  merges.write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")  # Hugging Face's has no others
  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
  assert Tokenizer(tmp_path / "vocab.json", V, 20)(text).tolist() == expected
  assert Tokenizer(tmp_path, V, 20)(text).tolist() == expected
  content = hugging_face()
  for merged in (content["model"]["merges"], MERGES):
    content["model"]["merges"] = merged
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path / "tokenizer.json", V, 20)(text).tolist() == expected
  assert Tokenizer(tmp_path, V, 20).path.name == "tokenizer.json"
  packed = tmp_path / "own" / "bpe_simple_vocab_16e6.txt.gz"
  packed.parent.mkdir()
  packed.write_bytes(gzip.compress(merges.read_bytes()))
  assert Tokenizer(packed.parent, V, 20)(text).tolist() == expected


def change(*path, value):
  """A tokenizer.json with another value in one place, as bytes."""
  content = node = hugging_face()
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  return json.dumps(content).encode()


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", b"{", "tokenizer.json cannot be read .*fetch it again"),
    ("tokenizer.json", b"[" * 100_000, "tokenizer.json cannot be read"),
    ("tokenizer.json", b"\xff\xfe", "tokenizer.json cannot be read"),
    ("tokenizer.json", b"[1]", "describes a None model"),
    ("tokenizer.json", change("model", value=3), "describes a None model"),
    ("tokenizer.json", change("model", "type", value="Unigram"), "describes a Unigram model .*expected CLIP's, BPE"),
    ("tokenizer.json", change("model", "end_of_word_suffix", value=""), "with '' at the ends of words"),
    ("tokenizer.json", change("model", "vocab", value=[]), "has no vocab and merges"),
    ("tokenizer.json", change("model", "vocab", "dog</w>", value="x"), "its vocabulary is not {token: id}"),
    ("tokenizer.json", change("model", "vocab", "dog</w>", value=7), "its 519 ids are not 0 … 518"),
    ("tokenizer.json", change("model", "vocab", "more", value=519), "its 520 ids are not 0 … 518, of the 519 tokens"),
    ("tokenizer.json", change("added_tokens", 0, "id", value=V - 1), "ids are not"),
    ("tokenizer.json", change("model", "merges", value=[["q", "q"]]), "'qq' is not in its vocabulary"),
    ("tokenizer.json", change("model", "merges", value=["a b c"]), "merge 0 is 'a b c'; expected two symbols"),
    ("tokenizer.json", change("model", "merges", value=[3]), "merge 0 is '3'"),
    ("vocab.json", b"{}", "vocab.json is a vocabulary and there is no merges.txt beside it"),
    ("bpe.txt", b"#version\nd o\n", "bpe.txt has 1 merges; expected 5 or more for 519 tokens"),
    ("bpe.txt.gz", gzip.compress(b"#version\nd o\n")[:-4], "bpe.txt.gz cannot be read"),
    ("bpe.txt.gz", b"\x1f\x8bnothing", "bpe.txt.gz cannot be read"),
    ("bpe.txt.gz", gzip.compress(bytes(200_000)), "bpe.txt.gz unpacks to more than 120000 bytes; refused")],
    ids=lambda value: value[:40] if isinstance(value, str) else "content")
def test_bad_files_are_refused_in_a_line(tmp_path, monkeypatch, name, content, message):
  monkeypatch.setattr(tokenizer, "MAX_BYTES", 120_000)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer(tmp_path / name, V, 9)("dog")
  assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_tower_of_fewer_tokens_than_bytes_has_no_tokenizer(merges):
  with pytest.raises(ValueError, match="the text tower knows 64 tokens, fewer than the 514"):
    Tokenizer(merges, 64, 9)("dog")


def test_swapped_special_tokens_are_refused(tmp_path):
  content = hugging_face()
  for token, i in zip(content["added_tokens"], (V - 1, V - 2)):
    token["id"] = i
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="are not its last two tokens"):
    Tokenizer(tmp_path, V, 9)("dog")


def test_no_tokenizer_names_what_one_is(tmp_path):
  for path in (tmp_path, tmp_path / "nothing.json"):
    with pytest.raises(ValueError, match="expected tokenizer.json, vocab.json with merges.txt, .*bpe_simple_vocab"):
      Tokenizer(path, V, 9)


def test_templates_are_filled_class_by_class():
  assert prompts.fill(["a {}.", "the {}"], ["alarm_clock", " The_Eiffel  Tower "]) == [
      "a alarm clock.", "the alarm clock", "a The Eiffel Tower.", "the The Eiffel Tower"]
  assert prompts.fill("{}", ("{}", "a{0}")) == ["{}", "a{0}"]  # names are not templates


@pytest.mark.parametrize("templates, names, message", [
    ([], ["dog"], "there is no template; expected one or more such as"),
    ("a photo", ["dog"], "the template 'a photo' has 0 places .*exactly one {}"),
    (["{}", "{} or {}"], ["dog"], "'{} or {}' has 2 places"),
    ("a {0}", ["dog"], "has 0 places"),
    ([3], ["dog"], "a template is 3; expected a string"),
    ("{} <|EndOfText|>", ["dog"], "the template .* holds <|endoftext|>"),
    ("{}", ["dog", ""], "class 1 has the name '', which is empty once cleaned"),
    ("{}", ["dog", "_ _"], "class 1 has the name '_ _', which is empty"),
    ("{}", ["a_dog", "cat", "A  Dog"], "class names 'a_dog', 'A  Dog' are the same once cleaned, 'a dog'"),
    ("{}", ["&lt;", "<"], "are the same once cleaned"),
    ("{}", ["ﬁsh", "fish"], "are the same once cleaned"),
    ("{}", [3], "a class name is 3; expected a string"),
    ("{}", ["x &lt;|endoftext|&gt;"], r"holds <\|endoftext\|>, which marks .*take it out"),
    ("{}", ["＜|startoftext|＞"], r"holds <\|startoftext\|>")])
def test_bad_templates_and_class_names_are_refused_in_a_line(templates, names, message):
  with pytest.raises(ValueError, match=message):
    prompts.fill(templates, names)
