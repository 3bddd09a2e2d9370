"""CLIP's tokenizer: texts to token ids, from whichever files a checkpoint has (openai/CLIP clip/simple_tokenizer.py).

    tokenizer = Tokenizer("checkpoint/", vocabulary=49408, context=77)   # tokenizer.json, vocab.json + merges.txt, or
    tokenizer(["a photo of a dog"])                                      # bpe_simple_vocab_16e6.txt.gz -> ids [1, 77]

Of a file only vocabulary and merges are taken. All that happens to a text before is the same for every file, and is
OpenAI's: ftfy, HTML entities twice, spaces, lower case, a regular expression, bytes. Hugging Face's tokenizer.json
describes less (no ftfy), which gives other ids for 9 of the 48 golden strings. What is a letter is for the `tokenizers`
library to say, whose Unicode is older than that of the original's `regex`: of letters added since, ids may differ.

Rows are filled up with 0, as OpenAI does, whatever a checkpoint pads with: the mask is causal and a text is read at its
first end, so that what follows the end changes nothing.
"""
import functools
import gzip
import html
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # the last two ids of a vocabulary
MERGES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")  # OpenAI's file, as it is called everywhere
MAX_BYTES = 64 << 20  # of a file, unpacked; the largest of CLIP's has 4 MB
SUFFIX = "</w>"  # of a symbol that ends a word
# Special tokens, contractions, runs of letters, single digits, runs of what else is not a space; upper case is gone by
# then, but not every letter that equals one without regard to case, such as the long s.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
  """A text as it is split into tokens: mended, without entities, with single spaces, in lower case."""
  import ftfy
  return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def find(folder) -> Path | None:
  """The file of a folder that a tokenizer is made from, None if there is none."""
  folder = Path(folder)
  if not (folder / "merges.txt").is_file():
    names = ("tokenizer.json", *MERGES)
  else:
    names = ("tokenizer.json", "vocab.json", *MERGES)
  return next((folder / name for name in names if (folder / name).is_file()), None)


class Tokenizer:
  """Calling it turns texts into ids int32 [n, context]; its files are read, and checked, at the first call.

  Args:
    path: a tokenizer.json, a vocab.json with its merges.txt beside it, a file of merges as OpenAI's, plain or gzipped,
      or a folder with one of these.
    vocabulary: V, the number of tokens that the text tower knows; of a file of merges as many lines are taken.
    context: tokens of a row, start and end included.

  Raises:
    ValueError: no such file; at the first call, one that is damaged or belongs to another text tower.
  """

  def __init__(self, path, vocabulary: int, context: int):
    path = Path(path).expanduser()
    self.path = find(path) if path.is_dir() else path
    if self.path is None or not self.path.is_file():
      raise ValueError(f"{path.name}: no tokenizer is there; expected tokenizer.json, vocab.json with merges.txt, "
                       f"OpenAI's {MERGES[0]}, or a folder with one of these")
    self.vocabulary, self.context = vocabulary, context

  def __call__(self, texts: Iterable[str], truncate: bool = False) -> np.ndarray:
    """Ids [n, context] int32: start, text, end, zeros.

    Args:
      texts: n strings, or one.
      truncate: cut texts that are too long, their last id then being the end.

    Raises:
      ValueError: a text has more than `context` tokens, or is no string.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = np.zeros((len(texts), self.context), np.int32)
    for row, text in zip(ids, texts):
      found = [self.vocabulary - 2, *self.encode(text), self.vocabulary - 1]
      if len(found) > self.context:
        if not truncate:
          raise ValueError(f"the text {shortened(text)} has {len(found)} tokens, start and end included; expected at "
                           f"most {self.context}: shorten it, or have it cut with --truncate, in Python truncate=True")
        found = [*found[:self.context - 1], found[-1]]
      row[:len(found)] = found
    return ids

  def encode(self, text: str) -> list[int]:
    """The ids of one text, without start and end. As in OpenAI's, special tokens in it become their ids."""
    if not isinstance(text, str):
      raise ValueError(f"a text is {text!r}; expected a string")
    split, ids_of = self._parts
    return [i for word, _ in split.pre_tokenize_str(clean(text)) for i in ids_of(word)]

  @functools.cached_property
  def _parts(self):
    """(what splits a text into words, word -> ids)."""
    from tokenizers import Regex, models, pre_tokenizers
    vocab, merges = read(self.path, self.vocabulary)
    model = models.BPE(vocab, merges, end_of_word_suffix=SUFFIX)
    as_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    @functools.lru_cache(maxsize=1 << 16)
    def ids_of(word: str) -> tuple[int, ...]:
      if word in SPECIAL:
        return (vocab[word],)
      (symbols, _), = as_symbols.pre_tokenize_str(word)
      return tuple(token.id for token in model.tokenize(symbols))

    return pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True), ids_of


def shortened(text: str) -> str:
  """A text in quotes for a message, the middle of a long one left out."""
  return repr(text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}")


# --- Files -------------------------------------------------------------------------------------------------------

def read(path: Path, vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """({token: id}, merges in their order) of a tokenizer's file.

  Raises:
    ValueError: it is damaged, too large, of another kind, or for another number of tokens.
  """
  try:
    if path.suffix == ".json":
      vocab, merges = _of_json(path)
    else:
      vocab, merges = _of_merges(path, vocabulary)
  except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    reason = str(getattr(error, "strerror", None) or error)[:100]  # an OSError's text has the path
    raise ValueError(f"{path.name} cannot be read ({reason}); it is cut, damaged or of another kind: fetch "
                     "it again") from None
  if problem := _problem(vocab, merges, vocabulary):
    raise ValueError(f"{path.name} does not fit: {problem}; give the tokenizer of these weights")
  return vocab, merges


def _of_json(path: Path):
  content = json.loads(_text(path))
  model = content.get("model", content) if isinstance(content, dict) else None
  if model is content:  # a vocab.json
    if not (merges := path.with_name("merges.txt")).is_file():
      raise ValueError(f"{path.name} is a vocabulary and there is no merges.txt beside it; fetch both into one folder")
    return content, _pairs(_text(merges).splitlines(), merges.name)
  kind, end = (model.get("type"), model.get("end_of_word_suffix")) if isinstance(model, dict) else (None, None)
  if (kind, end) != ("BPE", SUFFIX):
    raise ValueError(f"{path.name} describes a {kind} model with {end!r} at the ends of words; expected CLIP's, BPE "
                     f"with {SUFFIX!r}")
  vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens", [])
  if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
    raise ValueError(f"{path.name} has no vocab and merges in its model; expected a tokenizer.json of Hugging Face")
  vocab = {**vocab, **{token.get("content"): token.get("id") for token in added if isinstance(token, dict)}}
  return vocab, _pairs(merges, path.name)


def _of_merges(path: Path, vocabulary: int):
  """OpenAI's order: bytes, bytes that end a word, merges, start and end. Its file has more merges than it uses."""
  if (wanted := vocabulary - 512 - len(SPECIAL)) < 0:
    raise ValueError(f"the text tower knows {vocabulary} tokens, fewer than the 514 without merges; {path.name} cannot "
                     "be its tokenizer")
  lines = _text(path).split("\n", wanted + 1)[1:wanted + 1]  # behind the header
  merges = _pairs([line for line in lines if line], path.name)
  if len(merges) != wanted:
    raise ValueError(f"{path.name} has {len(merges)} merges; expected {wanted} or more for {vocabulary} tokens; give "
                     "the file of these weights")
  symbols = byte_symbols()
  tokens = [*symbols, *(symbol + SUFFIX for symbol in symbols), *map("".join, merges), *SPECIAL]
  return dict(zip(tokens, range(len(tokens)))), merges


def byte_symbols() -> list[str]:
  """The character that stands for each byte, in the vocabulary's order: printable ones first, as themselves."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _pairs(lines: list, file: str) -> list[tuple[str, str]]:
  """Merges, written "in g" or ["in", "g"]."""
  pairs = [tuple(line.split()) if isinstance(line, str) else tuple(line) if isinstance(line, list) else ()
           for line in lines if not (isinstance(line, str) and line.startswith("#version"))]
  for i, pair in enumerate(pairs):
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
      raise ValueError(f"{file}: merge {i} is {str(lines[i])[:60]!r}; expected two symbols with a space between them")
  return pairs


def _problem(vocab: dict, merges: list[tuple[str, str]], vocabulary: int) -> str:
  """What is wrong with a vocabulary and its merges, "" if nothing is."""
  if not all(isinstance(token, str) and type(i) is int for token, i in vocab.items()):
    return "its vocabulary is not {token: id}"
  if sorted(vocab.values()) != list(range(vocabulary)):
    return f"its {len(vocab)} ids are not 0 … {vocabulary - 1}, of the {vocabulary} tokens that the text tower knows"
  if [vocab.get(token) for token in SPECIAL] != [vocabulary - 2, vocabulary - 1]:
    return f"{' and '.join(SPECIAL)} are not its last two tokens"
  needed = [*byte_symbols(), *(symbol + SUFFIX for symbol in byte_symbols()), *(a for pair in merges for a in pair),
            *map("".join, merges)]
  lost = next((token for token in needed if token not in vocab), None)
  return "" if lost is None else f"{lost!r} is not in its vocabulary"


def _text(path: Path) -> str:
  """A file's text, unpacked if it is gzipped."""
  with open(path, "rb") as file:
    packed = file.read(2) == b"\x1f\x8b"
  with gzip.open(path) if packed else open(path, "rb") as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    raise ValueError(f"{path.name} unpacks to more than {MAX_BYTES} bytes; refused: a tokenizer of CLIP's has 4 MB")
  return content.decode()
