"""Prompts: templates filled with class names, and what is wrong with either in one line."""
from collections import Counter
from collections.abc import Sequence

from transferlab.tokenizer import SPECIAL, clean, shortened


def names(class_names: Sequence[str]) -> tuple[str, ...]:
  """Class names as they stand in a prompt: "_" and runs of spaces as one space.

  Raises:
    ValueError: one is empty, or says the same as another once cleaned ("Sea_Lake", "sea lake"): their prompts would be
      the same and nothing could tell them apart.
  """
  found = tuple(" ".join(_checked("class name", name).replace("_", " ").split()) for name in class_names)
  cleaned = [clean(name) for name in found]
  if "" in cleaned:
    index = cleaned.index("")
    raise ValueError(f"class {index} has the name {class_names[index]!r}, which is empty once cleaned; give it a name")
  name, count = max(Counter(cleaned).items(), key=lambda item: item[1], default=("", 0))
  if count > 1:
    same = [repr(each) for each, one in zip(class_names, cleaned) if one == name]
    raise ValueError(f"the class names {', '.join(same[:3])} are the same once cleaned, {name!r}; expected a name of "
                     "its own for every class")
  return found


def templates(given: str | Sequence[str]) -> tuple[str, ...]:
  """Templates, one or several, checked.

  Raises:
    ValueError: there is none, or one without exactly one {} for the class name.
  """
  given = (given,) if isinstance(given, str) else tuple(given)
  if not given:
    raise ValueError("there is no template; expected one or more such as 'a photo of a {}.'")
  for template in given:
    if (found := _checked("template", template).count("{}")) != 1:
      raise ValueError(f"the template {shortened(template)} has {found} places for a class name; expected exactly one "
                       "{}, as in 'a photo of a {}.'")
  return given


def fill(given: str | Sequence[str], class_names: Sequence[str]) -> list[str]:
  """Every template filled with every class name: C * T prompts, those of a class together, in the templates' order.

  Raises:
    ValueError: as `names` and `templates`.
  """
  given = templates(given)
  return [template.replace("{}", name) for name in names(class_names) for template in given]


def _checked(what: str, text) -> str:
  """A text that holds no special token, which would be read as the end of the prompt, wherever it stands."""
  if not isinstance(text, str):
    raise ValueError(f"a {what} is {text!r}; expected a string")
  if special := next((token for token in SPECIAL if token in clean(text)), None):
    raise ValueError(f"the {what} {shortened(text)} holds {special}, which marks the start or the end of a text; take "
                     "it out")
  return text
