"""Whole models from every layout and back: transformers' directories, Meta's, ours, and every way to fail."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlamaConfig as OracleConfig

from lm.config import LlamaConfig, RopeScaling
from lm.tokenizer import JsonTokenizer, byte_alphabet
from mm.checkpoint import compose, export_mllama, give
from mm.config import ImageConfig, MultimodalConfig
from mm.model import MultimodalLlama
from vision import mllama
from vision.adapter import ImageAdapterConfig
from vision.encoder import ImageEncoderConfig
from vision.tiling import PIXEL_MEAN, PIXEL_STD, tile_image

SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
VOCAB = 256 + len(SPECIAL)
IMAGE_ID = VOCAB  # as in the released models, the image token is the first beyond the table
END_IDS = [256 + SPECIAL.index(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
ASKED = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def llama3_backend() -> Tokenizer:
    """Bytes, and the special tokens of Llama 3."""
    backend = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in (*SPECIAL, "<|image|>")])
    return backend


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=llama3_backend(), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )  # fmt: skip


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fills a model with numbers at which every part matters, gates included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shift, scale = (1, 0.3) if "norm" in name and name.endswith("weight") else (0, 0.2)
        shift = 0.8 if "gate" in name.rsplit(".", 1)[-1] else shift
        parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


def assert_same_state(actual: MultimodalLlama, expected: MultimodalLlama) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


# ----------------------------------------------------------------------------------------------- transformers' Llama


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = OracleConfig(
        vocab_size=VOCAB, hidden_size=42, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        intermediate_size=53, max_position_embeddings=1009, eos_token_id=END_IDS, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 31,
        },
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    randomise(model)
    return model


@torch.no_grad()
def test_a_llama_saved_by_transformers_speaks_as_there(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    llama3_tokenizer().save_pretrained(tmp_path)
    model = MultimodalLlama.from_pretrained(tmp_path)
    assert model.config.chat == "llama3" and model.config.image is None
    assert model.config.lm.rope_scaling == RopeScaling(original_max_seq_len=31)
    inputs = llama3_tokenizer()("<|begin_of_text|>" + ASKED.format("What is it?"), return_tensors="pt")
    sample = model.processor.encode([{"role": "user", "content": "What is it?"}], add_generation_prompt=True)
    assert sample.ids == inputs["input_ids"][0].tolist()
    logits = llama(**inputs).logits
    torch.testing.assert_close(model(model.processor.collate([sample])), logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.5
    said = llama.generate(**inputs, max_new_tokens=17, do_sample=False)[0, len(sample.ids) :]
    answer = model.generate("What is it?", max_new_tokens=17)
    assert answer.tokens == said.tolist()
    assert answer.text == llama3_tokenizer().decode(said, skip_special_tokens=True)


@torch.no_grad()
def test_a_llama_without_tokenizer_computes_but_does_not_speak(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    model = MultimodalLlama.from_pretrained(tmp_path)
    ids = torch.randint(VOCAB, (2, 37))
    torch.testing.assert_close(model.lm(ids), llama(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("Hi")


# ---------------------------------------------------------------------------------------------------- Llama 3.2 Vision

TILE = 42


@pytest.fixture(scope="module")
def small_mllama() -> MultimodalLlama:
    """A random Llama 3.2 Vision of ours, with the released one's peculiarities."""
    lm = LlamaConfig(
        vocab_size=VOCAB, dim=60, n_layers=5, n_heads=6, n_kv_heads=2, ffn_dim=53, rope_scaling=RopeScaling(),
        max_seq_len=131_072,
    )  # fmt: skip
    encoder = ImageEncoderConfig(
        tile_size=TILE, patch_size=14, width=22, n_blocks=4, n_heads=2, ffn_dim=29, n_global_blocks=2,
        feature_layers=(1, 2), released_padding_quirk=True,
    )  # fmt: skip
    adapter = replace(ImageAdapterConfig.for_lm(lm, encoder.feature_dim), layers=(1, 4))  # Meta's placement
    config = MultimodalConfig(
        lm=lm, chat="llama3", image=ImageConfig(encoder=encoder, adapter=adapter), n_new_tokens=mllama.N_NEW_TOKENS,
        media_ids={"image": IMAGE_ID},
    )  # fmt: skip
    bos_id = 256 + SPECIAL.index("<|begin_of_text|>")
    model = MultimodalLlama(config, JsonTokenizer(llama3_backend(), bos_id=bos_id, eos_ids=END_IDS)).eval()
    randomise(model)
    with torch.no_grad():  # transformers has no place for tiles that no grid reaches
        for table in (m for name, m in model.named_parameters() if name.endswith(("tile_embedding", "ding.embedding"))):
            if table.ndim > 2:
                for row, column in np.ndindex(4, 4):
                    table[row, column] *= (row + 1) * (column + 1) <= 4
    return model


@pytest.fixture(scope="module")
def theirs(small_mllama, tmp_path_factory) -> MllamaForConditionalGeneration:
    """transformers' model with the same weights."""
    directory = tmp_path_factory.mktemp("exported")
    export_mllama(small_mllama, directory, "huggingface")
    model, report = MllamaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    model.generation_config.eos_token_id = END_IDS
    return model.eval()


@pytest.fixture(scope="module")
def saved_mllama(theirs, tmp_path_factory) -> Path:
    """What transformers itself writes: the model and its processor."""
    directory = tmp_path_factory.mktemp("mllama")
    theirs.save_pretrained(directory)
    image_processor = MllamaImageProcessorPil(
        size={"height": TILE, "width": TILE}, max_image_tiles=4, image_mean=PIXEL_MEAN, image_std=PIXEL_STD
    )
    MllamaProcessor(image_processor, llama3_tokenizer()).save_pretrained(directory)
    return directory


@pytest.fixture
def like_meta(theirs):
    """Corrects transformers where the released weights were trained otherwise, see tests/vision/test_mllama.py.

    Features are taken one block earlier, and tokens before the first picture see none. Returns a function that takes
    the mask of a prompt.
    """
    vision = theirs.model.vision_model
    features = vision.intermediate_layers_indices
    vision.intermediate_layers_indices = [i - 1 for i in features]
    sees: list[Tensor] = []

    def hide(module, args, output):
        is_prompt = output[0].shape[1] == sees[-1].shape[1]
        return (output[0] * sees[-1], *output[1:]) if is_prompt else output

    layers = theirs.model.language_model.layers
    hooks = [layers[i].cross_attn.register_forward_hook(hide) for i in theirs.config.text_config.cross_attention_layers]
    yield lambda mask: sees.append(mask.flatten(2).any(-1, keepdim=True))
    for hook in hooks:
        hook.remove()
    vision.intermediate_layers_indices = features


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(131, 61)], [(37, 29), (50, 180)]], ids=["one picture", "two pictures"])
def test_an_mllama_saved_by_transformers_with_its_processor_speaks_as_there(
    theirs, saved_mllama, like_meta, tmp_path, sizes
):
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    processor = AutoProcessor.from_pretrained(saved_mllama, backend="pil")
    text = "<|begin_of_text|>" + ASKED.format("<|image|>" * len(paths) + "What is it?")
    inputs = processor(images=[Image.open(path) for path in paths], text=text, return_tensors="pt")
    like_meta(inputs["cross_attention_mask"])

    model = MultimodalLlama.from_pretrained(saved_mllama)
    content = [*({"type": "image", "image": path} for path in paths), {"type": "text", "text": "What is it?"}]
    sample = model.processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)
    assert sample.ids == inputs["input_ids"][0].tolist()
    logits = theirs(**inputs).logits
    torch.testing.assert_close(model(model.processor.collate([sample])), logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.5

    said = theirs.generate(**inputs, max_new_tokens=11, do_sample=False)[0, len(sample.ids) :]
    answer = model.generate("What is it?", image=paths, max_new_tokens=11)
    assert answer.tokens == said.tolist()
    assert answer.text == processor.decode(said, skip_special_tokens=True)


def test_an_mllama_goes_to_huggingface_and_back(small_mllama, saved_mllama, tmp_path):
    model = MultimodalLlama.from_pretrained(saved_mllama)
    assert model.config == small_mllama.config
    assert_same_state(model, small_mllama)
    export_mllama(model, tmp_path, "huggingface")
    again = MultimodalLlama.from_pretrained(tmp_path)
    assert_same_state(again, small_mllama)
    assert again.generate("Hi", max_new_tokens=5) == small_mllama.generate("Hi", max_new_tokens=5)
    encoder = model.config.image.encoder
    theirs = MllamaImageProcessorPil.from_pretrained(tmp_path)
    picture = Image.effect_noise((97, 31), 60).convert("RGB")
    tiles_NCHW = theirs(picture, return_tensors="pt")["pixel_values"][0, 0]
    ours = tile_image(picture, encoder.tile_size, encoder.max_tiles).pixels_NCHW
    torch.testing.assert_close(tiles_NCHW[: len(ours)], ours, rtol=0, atol=2e-6)


def test_an_mllama_goes_to_meta_and_back(small_mllama, tmp_path, monkeypatch):
    export_mllama(small_mllama, tmp_path, "meta")
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["consolidated.00.pth"]
    # Meta's params.json leaves the encoder's shape out, as there is only one; here it is a smaller one.
    monkeypatch.setattr(mllama, "llama3_2_vision", lambda tile_size: small_mllama.config.image.encoder)
    model = MultimodalLlama.from_pretrained(tmp_path)
    assert model.config == small_mllama.config
    assert_same_state(model, small_mllama)
    assert model.generate("Hi", max_new_tokens=5) == small_mllama.generate("Hi", max_new_tokens=5)


@pytest.mark.parametrize(
    ("source", "layout", "message"),
    [
        ("mllama", "onnx", "layout 'onnx' is unknown; choose 'huggingface' or 'meta'"),
        ("debug", "huggingface", "cannot say .*released_padding_quirk=False"),
        ("debug", "meta", "cannot say .*released_padding_quirk=False"),
        ("text", "meta", "a model without an image part is no Llama 3.2 Vision"),
    ],
)
def test_what_cannot_be_exported_is_explained(small_mllama, tmp_path, source, layout, message):
    model = small_mllama if source == "mllama" else compose("debug", "debug" if source == "debug" else None)
    with pytest.raises(ValueError, match=message):
        export_mllama(model, tmp_path, layout)


# ---------------------------------------------------------------------------------------------------------------- ours


@pytest.fixture
def saved(tmp_path) -> Path:
    MultimodalLlama.from_pretrained("debug").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_comes_back_whole(saved):
    model, again = MultimodalLlama.from_pretrained("debug"), MultimodalLlama.from_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapters.safetensors", "config.json", "generation_config.json", "lm", "tokenizer.json", "tokenizer_config.json",
        "voice",
    ]  # fmt: skip
    assert again.config == model.config and not again.training
    assert_same_state(again, model)
    assert again.tokenizer.special_tokens == model.tokenizer.special_tokens
    pixels = np.random.default_rng(0)
    media = {"image": pixels.random((31, 61, 3)), "video": pixels.random((9, 3, 31, 61))}
    options = {"max_new_tokens": 7, "temperature": 1.0, "seed": 0}
    answers = [again.generate("What?", **{kind: source}, **options) for kind, source in media.items()]
    assert answers == [model.generate("What?", **{kind: source}, **options) for kind, source in media.items()]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("part", ["speech", "video"])
def test_a_model_is_given_one_more_part_and_keeps_what_it_has(part):
    torch.manual_seed(0)
    model = compose("debug", image="debug")
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = give(model, part, "debug")
    state = whole.state_dict()
    rows = before.pop("new_tokens.weight")
    assert torch.equal(state["new_tokens.weight"][: len(rows)], rows)
    new_rows, table = state["new_tokens.weight"][len(rows) :], state["lm.embed_tokens.weight"]
    size = table.norm(dim=1).mean().expand(len(new_rows))
    torch.testing.assert_close(new_rows.norm(dim=1), size, rtol=0.5, atol=0)  # as large as the others
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    new = {name.partition(".")[0] for name in state.keys() - before.keys() - {"new_tokens.weight"}}
    assert new == {"speech": {"speech_encoder", "speech_adapter"}, "video": {"video_adapter"}}[part]
    assert whole.generate("What?", image=np.zeros((7, 5, 3)), max_new_tokens=3).tokens
    with pytest.raises(ValueError, match=f"{part}: this model has a {part} part already"):
        give(whole, part, "debug")


def test_a_model_may_be_saved_where_it_came_from(saved):
    MultimodalLlama.from_pretrained(saved).save_pretrained(saved)
    assert_same_state(MultimodalLlama.from_pretrained(saved), MultimodalLlama.from_pretrained("debug"))


def test_a_text_model_comes_back_too(tmp_path):
    model = compose("debug")
    model.save_pretrained(tmp_path)
    again = MultimodalLlama.from_pretrained(tmp_path)
    assert again.config.image is None and again.image_adapter is None
    assert_same_state(again, model)


def test_every_tensor_takes_the_type_that_was_asked_for(saved):
    model = MultimodalLlama.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generate("Hi", image=np.zeros((7, 5, 3)), max_new_tokens=2).tokens
    assert {p.device.type for p in MultimodalLlama.from_pretrained("debug", device="meta").parameters()} == {"meta"}


KEY = "image_adapter.blocks.3.cross_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: None}, f"missing: {KEY}"),
        ({KEY: torch.zeros(3, 5)}, rf"mis-shaped: {KEY} \(3, 5\), expected \(48, 48\)"),
        ({"image_adapter.extra": torch.zeros(1)}, r"left over: image_adapter\.extra"),
        ({"lm.norm.weight": torch.zeros(48)}, r"tensors of the language model \(lm\.norm\.weight"),
    ],
    ids=["missing", "mis-shaped", "left over", "language model's"],
)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    edit_tensors(saved / "adapters.safetensors", **change)
    with pytest.raises(ValueError, match=message):
        MultimodalLlama.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imagee": {}}, r"config\.json: unknown key 'imagee'; did you mean 'image'\?"),
        ({"media_ids": {"image": 999, "audio": 321, "video": 324}}, "id 999 of 'image' has no embedding row"),
        ({"chat": 7}, r"config\.json\.chat: expected str, got 7"),
        ({"lm_source": "no such model"}, "'no such model' is no existing path"),
        ({"model_type": "opt"}, "holds a 'opt' model, not 'llama'"),
    ],
)
def test_a_wrong_configuration_is_explained(saved, change, message):
    edit_json(saved / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        MultimodalLlama.from_pretrained(saved)


def test_another_language_model_than_the_configuration_says_is_refused(saved):
    edit_json(saved / "lm" / "config.json", rope_theta=7.0)
    with pytest.raises(ValueError, match=r"config\.json describes another language model"):
        MultimodalLlama.from_pretrained(saved)


@pytest.mark.parametrize("name", ["adapters.safetensors", "config.json", "lm/model.safetensors", "lm/config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=r"adapters\.safetensors|config\.json|model\.safetensors"):
        MultimodalLlama.from_pretrained(saved)


@pytest.fixture
def copied_mllama(saved_mllama, tmp_path) -> Path:
    return Path(shutil.copytree(saved_mllama, tmp_path / "copied"))


def test_an_mllama_with_a_tensor_missing_or_mis_shaped_names_it(copied_mllama):
    changes = {"vision_model.class_embedding": None, "multi_modal_projector.bias": torch.zeros(7)}
    edit_tensors(copied_mllama / "model.safetensors", **changes)
    with pytest.raises(ValueError, match=r"missing: vision_model\.class_embedding.*multi_modal_projector\.bias \(7,\)"):
        MultimodalLlama.from_pretrained(copied_mllama)


def test_a_processor_that_normalises_pixels_otherwise_is_refused(copied_mllama):
    MllamaImageProcessorPil(image_mean=[0.5] * 3).save_pretrained(copied_mllama)
    with pytest.raises(ValueError, match=r"image_mean=\[0\.5, 0\.5, 0\.5\]; only \[0\.48145466,"):
        MultimodalLlama.from_pretrained(copied_mllama)


def test_a_source_that_is_nothing_says_what_could_be(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is no existing path, no Hub id"):
        MultimodalLlama.from_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json"):
        MultimodalLlama.from_pretrained(tmp_path)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("place", ["consolidated.00.pth", "pytorch_model.bin", "adapters.safetensors"])
def test_no_pickle_is_executed(saved, small_mllama, tmp_path, place):
    mark = tmp_path / "executed"
    if place == "consolidated.00.pth":
        export_mllama(small_mllama, tmp_path, "meta")
        torch.save({"weight": Evil(mark)}, tmp_path / place)
    elif place == "pytorch_model.bin":
        (tmp_path / "config.json").write_bytes((saved / "lm" / "config.json").read_bytes())
        torch.save({"weight": Evil(mark)}, tmp_path / place)
    else:
        (saved / place).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match=r"unsafe|lacks model\.safetensors|is damaged"):
        MultimodalLlama.from_pretrained(saved if place == "adapters.safetensors" else tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would have
