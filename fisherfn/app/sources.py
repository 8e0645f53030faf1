"""Where a model comes from: the packaged one, a local directory, or the model hub.

Everything that can be known without the weights (is it there, is it a causal language model, does
it have a tokenizer) is settled here, before minutes are spent on loading.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherfn.app.packaged import NAME, packaged_model
from fisherfn.core.errors import DataError, FisherError, OptionError, UnsupportedError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model",
)  # fmt: skip
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A causal language model without its weights.

    `where` is what transformers loads from, `conversion_seconds` what the packaged model took to
    convert in this run (0 from the cache), `context` the tokens it can read (None: any number).
    """

    name: str
    where: str
    config: Any
    tokenizer: Any
    conversion_seconds: float = 0.0

    @property
    def vocabulary(self) -> int:
        """Number of classes of the prediction."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Largest number of tokens the model can read."""
        size = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return size if isinstance(size, int) and size > 0 else None

    @property
    def pad(self) -> int:
        """Token to fill up with. The attention mask hides it, so any in the vocabulary will do."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and 0 <= pad < self.vocabulary else 0

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens the model is used to."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])


def open_source(model: str | None) -> Source:
    """Return the config and the tokenizer of a model.

    Args:
        model: A directory, an id on the model hub, or None for the packaged model.

    Raises:
        DataError: Not there, or files missing or broken.
        UnsupportedError: Not a causal language model, or the packaged one is not installed.
    """
    transformers = import_transformers()
    if model is None:
        start = time.perf_counter()
        directory, made = packaged_model()
        seconds = time.perf_counter() - start if made else 0.0
        name, where = NAME, str(directory)
    else:
        name, where, seconds = model, locate(model), 0.0
    with _translated("config", name, where):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    check_causal(config, name)
    with _translated("tokenizer", name, where):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    return Source(name, where, config, tokenizer, seconds)


def locate(model: str) -> str:
    """Return what to give to transformers: a checked local directory, or a hub id.

    Raises:
        DataError: No such directory, or files missing in it.
    """
    path = Path(model).expanduser()
    if path.is_file():
        raise DataError(
            f"--model: expected a directory, got the file {path}. Name the one it is in."
        )
    if not path.is_dir():
        if not HUB_ID.fullmatch(model):
            raise DataError(f"--model: no such directory: {path}.")
        return model
    if not (path / "config.json").is_file():
        raise DataError(
            f"--model: no config.json in {path}. Save the model there with save_pretrained."
        )
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise DataError(
            f"--model: no tokenizer in {path} (say, tokenizer.json). Save it there with "
            "tokenizer.save_pretrained."
        )
    if not any(True for pattern in WEIGHT_PATTERNS for _ in path.glob(pattern)):
        raise DataError(
            f"--model: no weights in {path} (*.safetensors or pytorch_model*.bin). Save the model "
            "there with save_pretrained."
        )
    return str(path)


def check_causal(config: Any, name: str) -> None:
    """Refuse models that do not predict the next token.

    Raises:
        UnsupportedError: Naming the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    architectures = list(getattr(config, "architectures", None) or [])
    known = config.model_type in CAUSAL and not getattr(config, "is_encoder_decoder", False)
    heads = {
        head
        for value in CAUSAL.values()
        for head in ((value,) if isinstance(value, str) else value)
    }
    if known and (not architectures or heads.intersection(architectures)):
        return
    what = ", ".join(architectures) or config.model_type
    raise UnsupportedError(
        f"--model: fim computes the Fisher of causal language models, got {what} in {name}. For "
        "other models use the library: ff.functional and ff.diagonal."
    )


def import_transformers() -> Any:
    """Return the module transformers, silenced.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import gguf
        import safetensors
        import transformers
        from huggingface_hub.utils import logging as hub_logging
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"language models need {error.name}, which is not installed. "
            "Install it with: pip install 'fisherfn[lm]'"
        ) from error
    del gguf, safetensors
    hub_logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def _translated(part: str, name: str, where: str) -> Iterator[None]:
    """Turn whatever transformers makes of missing or broken files into one line of ours."""
    try:
        yield
    except FisherError:
        raise
    except Exception as error:
        reason = first_line(error)
        if Path(where).is_dir():
            raise DataError(f"--model: cannot read the {part} in {where}: {reason}") from error
        raise DataError(
            f"--model: {name} is no directory here, and the model hub did not give its {part}: "
            f"{reason} Give a local directory, or check the name and the network."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of a message, ended by a full stop."""
    text = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return text[:300].rstrip(".") + "."


def check_exact(longest: int, vocabulary: int, budget: int) -> None:
    """Refuse an exact Fisher that the library would refuse later, when the weights are loaded.

    It takes a column for each class but one, at each position.

    Raises:
        OptionError: With the count, naming the kinds to take instead.
    """
    columns = longest * (vocabulary - 1)
    if columns > budget:
        raise OptionError(
            f"--fisher: exact takes {columns} columns ({longest} positions x {vocabulary} classes "
            f"but one) for the longest sample, more than {budget}. Take mc or curvature_prop, "
            "which estimate the same matrix without bias, or lower --max-length."
        )
