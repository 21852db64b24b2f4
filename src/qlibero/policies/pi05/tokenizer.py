"""From instruction text to token ids: PaliGemma's tokenizer from a local file, or a compact policy's closed word list.

Checkpoints do not contain the tokenizer and nothing is ever downloaded: the user names a file.
`sentencepiece` and `tokenizers` are optional packages, imported only when a file of theirs is opened.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from qlibero.console import count_text
from qlibero.errors import UserError
from qlibero.identity import file_sha256, text_sha256
from qlibero.policies.structured import MAX_BYTES, Strict, fit, read_json, short

PINS = {"sentencepiece": "sentencepiece==0.2.2", "tokenizers": "tokenizers==0.23.2"}
_WORD = re.compile(r"[a-z0-9]+")
_LFS = b"version https://git-lfs.github.com/spec/"


class _WordList(Strict):
    type: Literal["words"]
    words: list[Annotated[str, Field(pattern=r"^\S+$", max_length=64)]] = Field(min_length=1, max_length=100_000)


class Tokenizer(Protocol):
    vocab_size: int

    @property
    def sha256(self) -> str:
        """Of its content: the same text and hash, the same ids."""
        ...

    def encode(self, pieces: tuple[str, ...]) -> list[int]:
        """Ids of the pieces encoded one after the other, beginning-of-sequence token first. Padding is id 0."""
        ...


class WordTokenizer:
    """A closed vocabulary of words. File: {"type": "words", "words": [...]}; ids: 0 padding, 1 beginning, 2… words."""

    def __init__(self, words: list[str]):
        self.words = list(words)
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words) + 2

    @property
    def sha256(self) -> str:
        """See `Tokenizer`."""
        return text_sha256(self.to_json())

    def encode(self, pieces: tuple[str, ...]) -> list[int]:
        found = split_words(" ".join(pieces))
        unknown = sorted(set(found) - set(self._ids))
        if unknown:
            raise UserError(
                f"the policy's vocabulary of {count_text(len(self.words), 'word')} does not know: "
                f"{', '.join(unknown)}; "
                f"it was not trained for the instruction {pieces[0]!r}"
            )
        return [1, *(self._ids[word] for word in found)]

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return json.dumps({"type": "words", "words": self.words}, indent=1) + "\n"


def split_words(text: str) -> list[str]:
    """Lower-case words of an instruction, the unit of `WordTokenizer`."""
    return _WORD.findall(text.lower())


class _SentencePiece:
    def __init__(self, path: Path):
        sentencepiece = _optional("sentencepiece", path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from None
        self.vocab_size, self.sha256 = self._model.get_piece_size(), file_sha256(path)
        if self._model.bos_id() < 0:
            raise UserError(f"{path} has no beginning-of-sequence piece; it is not PaliGemma's tokenizer")

    def encode(self, pieces: tuple[str, ...]) -> list[int]:
        ids = [self._model.encode(piece) for piece in pieces]
        return [self._model.bos_id(), *(i for part in ids for i in part)]


class _HuggingFace:
    """A `tokenizer.json` of the `tokenizers` library; its special-token template is not used, BOS comes first."""

    def __init__(self, path: Path):
        tokenizers = _optional("tokenizers", path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        self._bos = self._model.token_to_id("<bos>")
        if self._bos is None:
            raise UserError(f"{path} has no <bos> token; it is not PaliGemma's tokenizer")
        self._model.no_padding()
        self._model.no_truncation()
        self.vocab_size, self.sha256 = self._model.get_vocab_size(), file_sha256(path)

    def encode(self, pieces: tuple[str, ...]) -> list[int]:
        ids = [self._model.encode(piece, add_special_tokens=False).ids for piece in pieces]
        return [self._bos, *(i for part in ids for i in part)]


def load_tokenizer(path: Path) -> Tokenizer:
    """From a sentencepiece `.model`, a `tokenizer.json`, or a compact policy's word list (also `tokenizer.json`)."""
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist; give `tokenizer:` the path of paligemma_tokenizer.model or "
            "of a tokenizer.json (checkpoints do not contain it)"
        )
    if path.suffix == ".model":
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"tokenizer {path} has {path.stat().st_size} bytes; PaliGemma's has 4 million")
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"tokenizer {path} is a Git LFS pointer: run `git lfs pull` where it was cloned")
        return _SentencePiece(path)
    if path.suffix != ".json":
        raise UserError(f"tokenizer {path}: expected a .model (sentencepiece) or a tokenizer.json")
    content = read_json(path)
    if content.get("type") == "words":
        words = fit(_WordList, content, str(path)).words
        if len(set(words)) < len(words):
            twice = next(word for i, word in enumerate(words) if word in words[:i])
            raise UserError(f"{path}: words lists {short(twice)} twice; every later word would have another id")
        return WordTokenizer(words)
    return _HuggingFace(path)


def _optional(package: str, path: Path) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"reading {path.name} needs the package {package}: pip install {PINS[package]}") from None
