"""What a caption can be, and which text of it a training step sees.

A caption is a string, a list of strings of which one is drawn each time, or, where there are several caption columns,
a tuple of (weight, string or list) pairs. Class labels, integers, pass through.
"""

import re


def is_blank(caption):
    """Whether there is no text; a list has one as soon as it has an element."""
    return caption is None or caption == [] or isinstance(caption, str) and not caption.strip()


def is_caption(caption):
    """Whether every text that may be drawn is one."""
    if isinstance(caption, tuple):
        return bool(caption) and all(is_caption(part) for _, part in caption)
    if isinstance(caption, list):
        return bool(caption) and all(map(_is_text, caption))
    return _is_text(caption)


def _is_text(text):
    try:
        return isinstance(text, str) and bool(text.strip()) and bool(text.encode())
    except UnicodeEncodeError:  # half of an escaped character, which no tokenizer takes
        return False


def join_columns(values, weights=None):
    """The caption that the values of one or several columns make; columns that are blank are left out."""
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # a dataset of numpy's
    if len(values) == 1:
        return values[0]
    parts = tuple((w, value) for w, value in zip(weights or [1] * len(values), values) if not is_blank(value))
    return parts or None


def draw_text(caption, rng):
    """One text of a caption, or the class label, from a `numpy.random.Generator`."""
    if isinstance(caption, tuple):
        weights = [weight for weight, _ in caption]
        caption = caption[rng.choice(len(caption), p=[weight / sum(weights) for weight in weights])][1]
    return caption[rng.integers(len(caption))] if isinstance(caption, list) else caption


def all_texts(caption):
    """Every text, or the label, that `draw_text` can give."""
    if isinstance(caption, tuple):
        return {text for _, part in caption for text in all_texts(part)}
    return set(caption) if isinstance(caption, list) else {caption}


def label_number(value):
    """A class label from 0 on, given as an integer or its digits; -1 of anything else."""
    is_number = isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).strip().isdecimal()
    return int(value) if is_number and int(value) < 2**31 else -1


def with_trigger_word(text, word):
    """`text` with `word` in front, unless it has it already; nothing is put before a dropped caption."""
    if not text or word is None or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{word}, {text}"
