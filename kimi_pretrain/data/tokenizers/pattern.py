"""How Kimi K2 cuts text before byte-pair merges: no merge crosses one of these pieces.

The expression is the one of the released tokenizer: runs of Han by themselves, words by
case with English contractions, digits in threes, punctuation with its newlines, white
space. Its letter classes are intersected with "not Han" (``&&``), which fancy-regex
(tiktoken) and Oniguruma (tokenizers) both read, Python's ``re`` does not.
"""

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

K2_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
