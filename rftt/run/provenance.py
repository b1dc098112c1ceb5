"""Compute digests of the inputs of a result: problems, prompts and weights.

A path identifies a folder and not its contents. A journal must not be continued with other weights
at the same path, or with other gold answers in the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rftt.engines.chat import encode_chat
from rftt.prompts import Messages, question_messages
from rftt.run.files import one_line, read_bytes
from rftt.run.tables import HUB, read_table
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig

MadeFrom = dict[str, str]
"""Input of a result -> its digest."""

WHOLE = 64 << 20
"""Size in bytes up to which a file of weights is hashed completely, which takes 0.1 s."""
SAMPLE = 4096
"""Bytes that are read at the start, middle and end of each tensor of a larger file."""
MAX_HEADER = 100 << 20
"""Largest header of a safetensors file, in bytes (the format's own limit)."""
TOKENIZER = ("[!.]*.json", "[!.]*.jinja", "[!.]*.model", "[!.]*.txt")
"""Files of a model folder that contain its tokenizer, its template and its settings."""


def made_from(
    cfg: SearchConfig | RLConfig | EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    instructions: str = "",
) -> MadeFrom:
    """Return the digests of a result over `problems`, asked for with these `instructions`.

    The model of an API has no digest. It is identified by api_url and api_model, which
    check_same_run compares.
    """
    questions = [question_messages(problem.question, cfg.system_prompt) for problem in problems]
    models = [] if cfg.engine == "api" else [cfg.model_name_or_path]
    if cfg.use_prm and cfg.prm_model_name_or_path:
        models.append(cfg.prm_model_name_or_path)
    return {
        "problems": digest(map(repr, problems)),
        "prompts": digest([prompt_digest(tokenizer, questions), instructions]),
        "weights": digest(map(weights_digest, models)),
    }


def trained_from(cfg: SFTConfig, rows: Sequence[object]) -> MadeFrom:
    """Return the digests of an offline training on `rows`, which are token ids."""
    models = [cfg.model_name_or_path]
    if cfg.initial_state:
        models.append(f"{cfg.initial_state}/state")
    return {"rows": digest(map(repr, rows)), "weights": digest(map(weights_digest, models))}


def data_digest(source: str) -> str:
    """Return the digest of a data file, or of the rows of a data set on the hub."""
    if source.startswith(HUB):
        return digest(repr(record.row) for record in read_table(source))
    return hashlib.sha256(read_bytes(source)).hexdigest()


def model_digest(model: str) -> str:
    """Return the digest of a model's weights, configuration and tokenizer, or of a checkpoint."""
    folder = Path(model)
    if (folder / "state").is_dir():
        return weights_digest(str(folder / "state"))
    texts = sorted(path for kind in TOKENIZER for path in folder.glob(kind) if path.is_file())
    return digest([weights_digest(model), *(data_digest(str(path)) for path in texts)])


def digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a list of texts. It also depends on the boundaries between them."""
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return found.hexdigest()


def prompt_digest(tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Messages]) -> str:
    """Return the digest of prompts as token ids, which covers the template and the tokenizer."""
    return digest(repr(encode_chat(tokenizer, messages)) for messages in conversations)


def weights_digest(model: str) -> str:
    """Return the digest of a model's configuration and weights.

    Weight files of up to 64 MB are read completely. Of a larger file the header and 12 kB of each
    tensor are read, because 15 GB would take a minute. Training changes nearly all numbers of a
    tensor, but a change of a few other numbers is not detected. For a model on the hub its commit
    is used.
    """
    folder = Path(model)
    if not folder.is_dir():
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the configuration of {model} cannot be read ({one_line(error)}); check the name."
            ) from error
        return digest([model, str(config.get("_commit_hash"))])
    found = hashlib.sha256()
    for path in weights_files(folder):
        try:
            with path.open("rb") as file:
                found.update(f"{path.name} {path.stat().st_size}".encode())
                if path.stat().st_size <= WHOLE:
                    found.update(file.read())
                else:
                    _sample_tensors(file, found)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); check the file.") from error
    return found.hexdigest()


def weights_files(folder: Path) -> list[Path]:
    """Return the configuration and weight files of a model, in order. Others are ignored."""
    weights = sorted(folder.glob("[!.]*.safetensors"))
    settings = [folder / name for name in ("config.json", "generation_config.json")]
    return [path for path in (*settings, *weights) if path.is_file()]


def _sample_tensors(file: BinaryIO, found: hashlib._Hash) -> None:
    """Hash the header of a safetensors file and a sample of each tensor's bytes.

    A damaged header is hashed like any text. Opening the model reports the damage.
    """
    head = file.read(8)
    size = int.from_bytes(head, "little")
    header = file.read(min(size, MAX_HEADER))
    found.update(head + header)
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        offsets = [(int(begin), int(end)) for begin, end in (e["data_offsets"] for e in entries)]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return
    for begin, end in offsets:
        if 0 <= begin <= end:
            _sample(file, 8 + size + begin, 8 + size + end, found)


def _sample(file: BinaryIO, begin: int, end: int, found: hashlib._Hash) -> None:
    """Hash the start, the middle and the end of the bytes from `begin` to `end`."""
    last = max(begin, end - SAMPLE)
    for start in (begin, (begin + last) // 2, last):
        file.seek(start)
        found.update(file.read(min(SAMPLE, end - begin)))
